"""The holder's side of a lease."""

import asyncio
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun

from supervised._budget import RequestBudget
from supervised._lease import LeaseHolder


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
        await asyncio.wait_for(holding, 5)

    asyncio.run(story())
