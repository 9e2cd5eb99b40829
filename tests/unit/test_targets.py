"""What a teardown knows of each run it has to end, and of those that it leaves alone."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Cancelling, Pending, Running

from supervised import _clock
from supervised._targets import Target, Targets


@pytest.fixture
def targets():
    return Targets()


def a_run(*, deployed=True, state=None):
    return FlowRun(
        id=uuid4(),
        flow_id=uuid4(),
        state=state or Running(),
        deployment_id=uuid4() if deployed else None,
    )


def add(targets, *above, deployed=True, **known):
    """Add a target that is a run below others."""
    run = a_run(deployed=deployed)
    ids = frozenset(each.run_id for each in above)
    target = Target(name="leaf", depth=1, run=run, state=run.state, above=ids, **known)
    targets.add(target)
    return target


def test_a_read_that_was_overtaken_does_not_bring_a_run_back():
    target = Target(name="leaf", depth=1)
    over, before = Cancelled(), Running()
    before.timestamp = over.timestamp - timedelta(seconds=1)
    target.learn(over)
    target.learn(before)
    assert target.state is over
    assert target.over_since is not None


def test_the_end_is_that_which_was_seen_first():
    target = Target(name="leaf", depth=1)
    target.learn(Cancelled())
    first = target.terminal_at
    target.learn(Cancelled())
    assert target.terminal_at is first


def test_a_step_is_taken_once_and_its_child_told(make_child):
    child = make_child()
    target = Target(name="leaf", depth=1, child=child)
    taken = [step for step in ("nudged", "closed", "nudged") if target.note_step(step)]
    assert taken == ["nudged", "closed"]
    assert target.escalations == list(child.escalations) == ["nudged", "closed"]


def test_who_is_asked_next_was_not_asked_before_or_in_vain_a_while_ago(targets):
    target = add(targets)
    assert target.is_to_be_asked
    target.note_request()
    first = target.requested_at
    assert not target.is_to_be_asked
    target.note_failure("the request was cut off")
    assert target.is_to_be_asked
    target.ask_after = _clock.monotonic() + 60
    assert not target.is_to_be_asked
    target.note_request()
    assert target.requested_at is first, "when it was asked for the first time"


@pytest.mark.parametrize("action", ["wait", "detach"])
def test_nobody_is_asked_whose_policy_is_another(targets, action):
    assert not add(targets, action=action).is_to_be_asked


def test_a_detached_run_is_left_alone_with_all_that_was_not_asked_below_it(targets):
    top, other = add(targets), add(targets)
    below, asked = add(targets, top), add(targets, top)
    asked.note_request()
    targets.spare([top.run_id])
    assert list(targets) == [other, asked]
    assert targets.of_run(below.run_id) is None
    assert targets.is_left_alone(top.run_id)


def test_many_that_were_detached_are_left_alone_at_once(targets):
    tops, others = [add(targets) for _ in range(3)], [add(targets) for _ in range(3)]
    below = [add(targets, top) for top in tops]
    targets.spare([top.run_id for top in tops])
    assert list(targets) == others
    assert all(targets.is_left_alone(top.run_id) for top in tops)
    assert all(targets.of_run(each.run_id) is None for each in below)


def test_who_has_been_asked_is_ended_though_it_was_detached_then(targets):
    target = add(targets)
    target.note_request()
    targets.spare([target.run_id])
    assert list(targets) == [target]
    assert not targets.is_left_alone(target.run_id)


def test_what_is_waited_for_is_left_alone_until_it_is_over(targets):
    target = add(targets, action="wait")
    assert targets.is_left_alone(target.run_id)
    target.learn(Cancelled())
    assert not targets.is_left_alone(target.run_id)
    assert not targets.is_left_alone(uuid4())


def test_an_inline_run_is_over_with_the_process_of_the_deployed_ones_above_it(targets):
    host = add(targets)
    inline = add(targets, host, deployed=False)
    assert targets.hosts_of(inline) == [host]
    assert not targets.host_is_over(inline)
    host.learn(Cancelled())
    assert targets.host_is_over(inline)


@pytest.mark.parametrize("top_is_gone", [False, True])
def test_where_no_host_is_known_it_counts_whether_the_top_is_gone(top_is_gone):
    targets = Targets(top_is_gone=top_is_gone)
    inline = add(targets, deployed=False)
    assert targets.host_is_over(inline) is top_is_gone


def test_a_host_that_was_over_before_is_gone_too(targets):
    host = Target(name="host", depth=1, run=a_run())
    inline = add(targets, host, deployed=False)
    assert not targets.host_is_over(inline)
    targets.gone.add(host.run_id)
    assert targets.host_is_over(inline)


def test_a_run_that_is_created_for_a_child_is_taken_up_and_told_of(make_child):
    heard = []
    targets, child = Targets(), make_child()
    targets.on_run = heard.append
    target = Target(name="leaf", depth=1, child=child, attempt=child.attempt)
    targets.add(target)
    targets.set_new_runs()
    assert target.run is None
    run = a_run(state=Pending())
    child.assign_run(run)
    targets.set_new_runs()
    assert targets.of_run(run.id) is target
    assert heard == [run.id]
    target.learn(Cancelling())
    targets.set_new_runs()
    assert target.state.is_cancelling(), "what is known since then counts"
