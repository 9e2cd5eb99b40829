"""Logging that never ends what it tells of."""

import logging

from supervised._log import get_logger


def test_a_console_that_exits_costs_a_line_and_not_the_caller():
    class Broken(logging.Handler):
        def emit(self, record):
            raise SystemExit(1)

    handler = Broken()
    logger = logging.getLogger("prefect.supervised.broken")
    logger.addHandler(handler)
    try:
        get_logger("prefect.supervised.broken").warning("nobody reads this")
    finally:
        logger.removeHandler(handler)


def test_a_line_names_the_place_that_it_comes_from(caplog):
    with caplog.at_level(logging.WARNING, logger="prefect.supervised.place"):
        logging.getLogger("prefect.supervised.place").addHandler(caplog.handler)
        get_logger("prefect.supervised.place").warning("here")
        logging.getLogger("prefect.supervised.place").removeHandler(caplog.handler)
    mine = [each for each in caplog.records if each.name == "prefect.supervised.place"]
    assert mine[0].filename == "test_log.py"
