"""Cancelling by hand: everything that was alive is told of, the run itself first."""

from __future__ import annotations

import pytest
from prefect.states import Running

from supervised import CancelReason, supervised_flow, supervisor
from supervised._api import Ack
from supervised._by_hand import cancel_tree
from supervised._tree import read_tree
from supervised.testing import FakePrefect

WHY = CancelReason(source="explicit", message="somebody said so")


def cancelled(prefect, run, *, api=None, grace_seconds=20, meanwhile=lambda: None, **options):
    """Read the tree of a run, let something happen, and cancel it; return the report."""
    api = api or prefect.connect()

    async def act():
        node = await read_tree(api, run.id)
        meanwhile()
        return await cancel_tree(api, node, reason=WHY, grace_seconds=grace_seconds, **options)

    return prefect.call(act())


@pytest.fixture
def tree():
    """A supervised run with two children that run."""

    @supervised_flow
    async def root():
        await supervisor.gather(supervisor.spawn("leaf/a"), supervisor.spawn("leaf/b"))

    with FakePrefect() as prefect:
        prefect.deploy("leaf/a", takes=600)
        prefect.deploy("leaf/b", takes=600)
        prefect.deploy("root/test", root, runner="root")
        run = prefect.start("root/test")
        prefect.until(lambda: sum(each.state.is_running() for each in run.below) == 2)
        yield prefect, run


def told(report):
    return sorted((receipt.depth, receipt.status) for receipt in report.receipts)


def test_a_run_without_children_is_told_of_itself(tree):
    prefect, run = tree
    leaf = run.below[0]
    report = cancelled(prefect, leaf)
    assert told(report) == [(0, "cancelled")]
    assert report.receipts[0].flow_run_id == leaf.id
    assert leaf.state.is_cancelled()


def test_all_of_a_tree_is_told_of_though_its_own_scope_is_faster(tree):
    prefect, run = tree
    report = cancelled(prefect, run)
    assert told(report) == [(0, "cancelled"), (1, "cancelled"), (1, "cancelled")]
    assert report.ok


def test_a_run_that_is_to_go_on_is_not_told_of(tree):
    prefect, run = tree
    report = cancelled(prefect, run, with_top=False)
    assert told(report) == [(1, "cancelled"), (1, "cancelled")]


def test_what_has_ended_by_itself_meanwhile_is_told_of(tree):
    prefect, run = tree
    report = cancelled(prefect, run, meanwhile=run.below[0].kill)
    assert [depth for depth, _ in told(report)] == [0, 1, 1]


def test_of_a_tree_that_is_over_there_is_nothing_to_tell(tree):
    prefect, run = tree
    cancelled(prefect, run)
    assert cancelled(prefect, run).receipts == ()


def test_a_request_that_the_server_refuses_is_repeated_and_then_told_with_its_reason():
    with FakePrefect() as prefect:
        run = prefect.server.create("alone", state=Running())
        api, asked = prefect.connect(), []

        async def refuse(run_ids, message):
            asked.append(message)
            return [Ack(run_id, None, "you may only read") for run_id in run_ids]

        api.request_cancel = refuse
        report = cancelled(prefect, run, api=api, grace_seconds=4)
        (receipt,) = report.receipts
        assert receipt.status == "unverified"
        assert receipt.reason == (
            "still Running: the server has refused the request: you may only read"
        )
        assert len(asked) >= 4


def test_a_run_that_does_not_end_is_told_of_when_the_grace_is_over():
    with FakePrefect() as prefect:
        run = prefect.server.create("alone", state=Running())
        report = cancelled(prefect, run, grace_seconds=10)
        (receipt,) = report.receipts
        assert receipt.status == "unverified"
        assert "still Cancelling: 10 s after the request; its runner or" in receipt.reason
        assert report.seconds < 12, "the grace is for all of it"
