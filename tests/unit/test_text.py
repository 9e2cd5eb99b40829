"""What is told can be sent, is short, and names the cause: it is what people see first."""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime, timezone
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervised import (
    CancelReason,
    DeploymentNotFoundError,
    TeardownError,
    supervised_flow,
    supervisor,
)
from supervised._scope import _summary
from supervised._text import MOST_CHARACTERS, clause, cut, first_line, headline, sendable
from supervised._types import TeardownReport
from supervised.testing import FakePrefect

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

ANY_TEXT = st.text(st.characters(codec=None, categories=None))  # lone surrogates, too
ODD_NAME = "\udce9t\udce9.csv"  # os.fsdecode(b"\xe9t\xe9.csv")

# -- laws ---------------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_what_is_made_sendable_is_unicode_without_nul_and_stays_so(text):
    sent = sendable(text)
    assert sent.encode().decode() == sent
    assert "\0" not in sent
    assert sendable(sent) == sent


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_ordinary_text_is_sent_as_it_is(text):
    assert sendable(text) == text


@given(st.text(), st.integers(20, 50))
def test_of_a_long_text_both_ends_stay_within_the_limit(text, at_most):
    kept = cut(text, at_most)
    assert len(kept) <= at_most
    if kept != text:
        head, tail = kept.split(" [...] ", 1)[0], kept.rsplit(" [...] ", 1)[1]
        assert text.startswith(head)
        assert text.endswith(tail)
        assert len(kept) == at_most


@given(ANY_TEXT)
def test_a_reason_can_be_sent_whatever_it_tells_of(text):
    reason = CancelReason(source="explicit", message=text * 1000)
    assert reason.message == clause(text * 1000)
    assert len(reason.message) <= MOST_CHARACTERS
    assert "\0" not in reason.message.encode().decode()


# -- one line for several failures --------------------------------------------------------------


def test_of_many_failures_the_first_are_told_and_the_others_counted():
    errors = [DeploymentNotFoundError(f"number {number}") for number in range(5)]
    assert headline(errors) == (
        "DeploymentNotFoundError: number 0; DeploymentNotFoundError: number 1; "
        "DeploymentNotFoundError: number 2; and 2 more"
    )


def test_of_a_group_its_members_are_told():
    group = ExceptionGroup("unhandled errors in a TaskGroup", [KeyError("a"), OSError("b")])
    assert headline([group, ValueError("c")]) == "KeyError: 'a'; OSError: b; ValueError: c"


def test_several_lines_become_one_and_a_long_one_keeps_its_end():
    told = headline([ValueError("\nmany words " * 100 + "\n  the cause")])
    assert told.startswith("ValueError: many words many words")
    assert told.endswith("the cause")
    assert len(told) == 400


def test_one_long_word_is_told_in_part():
    assert headline([ValueError("x" * 1000)]).startswith("ValueError: xxxxxxxxxx")


def test_a_failure_that_has_no_text_is_told_all_the_same():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    assert headline([KeyError(), Mute()]) == "KeyError; Mute: (it has no text)"


def test_an_exception_that_only_looks_like_a_group_is_told_itself():
    class Several(Exception):
        exceptions = ()

    assert headline([Several("lost")]) == "Several: lost"


@pytest.mark.parametrize(
    ("text", "line"), [("", ""), ("\n \n", ""), ("\n  the cause \nmore", "the cause")]
)
def test_the_first_line_is_the_first_in_which_anything_stands(text, line):
    assert first_line(text) == line


# -- what a run's state says --------------------------------------------------------------------


def fails(message: str, *, name: str, below: str | None = None):
    """Return a supervised flow that fails with this message, or because of a child."""

    @supervised_flow(name=name)
    async def parent():
        if below is None:
            raise OSError(message)
        supervisor.spawn(below, name=f"{below} of {name}")
        await asyncio.sleep(600)

    return parent


def test_a_childs_failure_that_nobody_awaited_is_told_in_the_state_of_its_parent():
    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=1, fails=True)
        run = prefect.start(fails("", name="root", below="score/gpu"))
        prefect.until(lambda: run.state is not None and run.state.is_final())
        assert run.state.is_failed()
        assert "1 failure(s) in supervised flow 'root': ChildFailed: " in run.state.message
        assert "score/gpu of root" in run.state.message


def test_the_cause_at_the_bottom_of_a_tree_is_told_at_its_top():
    with FakePrefect() as prefect:
        prefect.deploy("leaf/test", fails("the disk is full", name="leaf"))
        prefect.deploy("low/test", fails("", name="low", below="leaf/test"))
        prefect.deploy("mid/test", fails("", name="mid", below="low/test"))
        run = prefect.start(fails("", name="root", below="mid/test"))
        prefect.until(lambda: run.state is not None and run.state.is_final(), within=60)
        assert "the disk is full" in run.state.message


def test_what_may_still_be_alive_is_told_before_what_has_failed():
    report = TeardownReport(
        flow_name="root",
        flow_run_id=uuid4(),
        cause="failed",
        reason="parent 'root' failed",
        started_at=datetime.now(timezone.utc),
        seconds=1.0,
        receipts=(),
    )
    errors = [*(ValueError(number) for number in range(5)), TeardownError(report)]
    assert _summary("root", errors).startswith("6 failure(s) in supervised flow 'root': TeardownEr")


def test_children_end_though_what_has_failed_cannot_be_sent():
    """It may name a file that somebody has named in another encoding."""

    @supervised_flow
    async def root():
        child = supervisor.spawn("score/gpu")
        while not child.state.is_running():
            await asyncio.sleep(0.1)
        raise FileNotFoundError(f"no such file: {ODD_NAME}")

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=600)
        run = prefect.start(root)
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        child = run.below[0]
        prefect.until(lambda: child.state.is_final(), within=30)
        assert child.state.is_cancelled()
