"""The bell: SIGTERM is heard whatever its handler does."""

import os
import signal
import socket
import threading

import pytest

from supervised._bell import SIGNAL_THREAD, Bell

SECONDS = 60


@pytest.fixture(autouse=True)
def a_handler():
    """Survive SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def bell():
    """A bell that nobody listens to afterwards."""
    for thread in listening_threads():
        thread.join(SECONDS)  # an earlier bell's
    made = Bell()
    yield made
    for listener in list(made._listeners):
        made.remove(listener)


def wakeup_fd():
    current = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(current)
    return current


def listening_threads():
    return [thread for thread in threading.enumerate() if thread.name == SIGNAL_THREAD]


def test_everybody_who_listens_hears_sigterm(bell):
    first, second = threading.Event(), threading.Event()
    bell.add(first.set)
    bell.add(second.set)
    os.kill(os.getpid(), signal.SIGTERM)
    assert first.wait(SECONDS)
    assert second.wait(SECONDS)


def test_other_signals_are_not_heard(bell):
    heard = threading.Event()
    bell.add(heard.set)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(SECONDS)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_nothing_is_left_when_the_last_has_gone(bell):
    before = wakeup_fd()
    bell.add(print)
    (thread,) = listening_threads()
    assert wakeup_fd() != before
    bell.remove(print)
    thread.join(SECONDS)
    assert wakeup_fd() == before
    assert listening_threads() == []


def test_it_leaves_the_descriptor_to_whoever_has_it(bell):
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno())
    try:
        bell.add(print)
        assert wakeup_fd() == writing.fileno()
        assert listening_threads() == []
        bell.remove(print)
        assert wakeup_fd() == writing.fileno()
    finally:
        signal.set_wakeup_fd(before)
        reading.close()
        writing.close()


def test_it_does_not_give_back_what_somebody_else_has_taken_since(bell):
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    bell.add(print)
    signal.set_wakeup_fd(writing.fileno())
    try:
        bell.remove(print)
        assert wakeup_fd() == writing.fileno()
    finally:
        signal.set_wakeup_fd(-1)
        reading.close()
        writing.close()


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_signal_to_a_forked_child_does_not_ring_here(bell):
    heard = threading.Event()
    bell.add(heard.set)
    os.register_at_fork(after_in_child=bell.forget_after_fork)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0 if wakeup_fd() == -1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not heard.wait(0.2)
