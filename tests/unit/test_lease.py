"""The holder's side of a lease."""

import asyncio
from uuid import uuid4

import anyio
import pytest
from prefect.client.schemas.objects import FlowRun
from support.virtual import play

from supervised import _identity, supervised_flow, supervisor
from supervised._budget import RequestBudget
from supervised._lease import LeaseHolder
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator


class Unanswering:
    """A server that takes requests and never answers."""

    budget = RequestBudget()

    def __init__(self):
        self.asked = asyncio.Event()

    async def label(self, *_):
        self.asked.set()
        await asyncio.sleep(3600)


def test_a_renewal_that_nobody_answers_does_not_hold_up_the_end():
    async def story():
        api = Unanswering()
        holder = LeaseHolder(api, FlowRun(id=uuid4(), flow_id=uuid4()), 0.04)
        holding = asyncio.create_task(holder.hold())
        await api.asked.wait()
        holder.drop()
        await asyncio.wait_for(holding, 60)

    asyncio.run(story())


def test_renewals_that_nobody_answers_in_time_do_not_put_off_the_next():
    begun = []

    class Late(Unanswering):
        async def label(self, *_):
            begun.append(asyncio.get_running_loop().time())
            await asyncio.sleep(3600)

    async def story():
        holder = LeaseHolder(Late(), FlowRun(id=uuid4(), flow_id=uuid4()), 10)
        with anyio.move_on_after(11):
            await holder.renew()
            await holder.hold()

    play(story())
    assert begun == pytest.approx([0, 2.5, 5, 7.5, 10])


def test_a_scope_that_ends_while_it_asks_for_its_lease_gives_no_sign_of_life_afterwards(
    monkeypatch,
):
    label, asked = FakeOrchestrator.label, []

    async def label_slowly(self, run_id, labels):
        if _identity.LEASE in labels:
            asked.append(prefect.seconds)
            await asyncio.sleep(4)
        await label(self, run_id, labels)

    monkeypatch.setattr(FakeOrchestrator, "label", label_slowly)

    @supervised_flow(lease_seconds=20, retries=1, retry_delay_seconds=600)
    async def root():
        supervisor.spawn("score/gpu")
        await asyncio.sleep(1)
        raise ValueError("bad")

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu")
        run = prefect.start(root)
        prefect.until(lambda: run.state.name == "AwaitingRetry", within=60)
        assert len(asked) == 1
        prefect.advance(300)
        assert run.has_process
        assert len(asked) == 1
