"""Waiting for a teardown goes on, whatever arrives, and remembers it."""

import asyncio
import concurrent.futures
import signal

import pytest
from prefect.exceptions import TerminationSignal

from supervised import _scope


class Leaving:
    """Takes note of what arrives."""

    def __init__(self):
        self.noted = []

    def interrupted_by(self, exc):
        self.noted.append(exc)


@pytest.mark.parametrize(
    "interrupt",
    [TerminationSignal(signal=signal.SIGTERM), KeyboardInterrupt(), asyncio.CancelledError()],
    ids=lambda exc: type(exc).__name__,
)
def test_a_signal_that_is_raised_in_the_step_that_waits_does_not_end_the_wait(interrupt):
    """A handler's exception is raised wherever the main thread is: rarely there, but it was."""
    leaving, teardown = Leaving(), concurrent.futures.Future()
    arriving = [interrupt]

    def gives_up():
        if arriving:
            raise arriving.pop()
        teardown.set_result(None)
        return False

    asyncio.run(_scope._wait_shielded(leaving, teardown, gives_up))
    assert leaving.noted == [interrupt]
    assert teardown.done()


def test_an_error_of_ours_ends_the_wait():
    def gives_up():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(_scope._wait_shielded(Leaving(), concurrent.futures.Future(), gives_up))
