"""A child that is over at once: `python briefly.py NAME` serves it."""

import sys

from prefect import flow


@flow(name="briefly")
def briefly() -> None:
    """Do nothing."""


if __name__ == "__main__":
    briefly.serve(sys.argv[1])
