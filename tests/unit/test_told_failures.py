"""The state of a failed run says what failed, and why: it is what people see first."""

import asyncio

from supervised import DeploymentNotFoundError, supervised_flow, supervisor
from supervised._scope import _headline
from supervised.testing import FakePrefect


def test_a_childs_failure_that_nobody_awaited_is_told_in_the_state_of_its_parent():
    @supervised_flow
    async def root():
        supervisor.spawn("score/gpu", name="third quarter")
        await asyncio.sleep(600)

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=1, fails=True)
        run = prefect.start(root)
        prefect.until(lambda: run.state is not None and run.state.is_final())
        assert run.state.is_failed()
        assert "1 failure(s) in supervised flow 'root': ChildFailed: " in run.state.message
        assert "third quarter" in run.state.message


def test_of_many_failures_the_first_are_told_and_the_others_counted():
    errors = [DeploymentNotFoundError(f"number {number}") for number in range(5)]
    assert _headline("nightly", errors) == (
        "5 failure(s) in supervised flow 'nightly': DeploymentNotFoundError: number 0; "
        "DeploymentNotFoundError: number 1; DeploymentNotFoundError: number 2; and 2 more"
    )


def test_a_long_failure_is_told_in_one_short_line():
    told = _headline("nightly", [ValueError("many words " * 100 + "\nand lines")])
    assert told.startswith("1 failure(s) in supervised flow 'nightly': ValueError: many words many")
    assert told.endswith("[...]")
    assert len(told) < 400


def test_a_failure_that_has_no_text_is_told_all_the_same():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    assert _headline("nightly", [KeyError(), Mute()]) == (
        "2 failure(s) in supervised flow 'nightly': KeyError; Mute: (it has no text)"
    )
