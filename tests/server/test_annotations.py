"""Types that are written as strings, as under this import, mean the same as for `@flow`."""

from __future__ import annotations

import asyncio
from datetime import date

import pydantic
import pytest
from prefect import flow

from supervised import supervised_flow, supervisor

BOTH = pytest.mark.parametrize("decorate", [flow, supervised_flow], ids=["plain", "supervised"])


def sync_flow(decorate):
    @decorate
    def meet(day: date, who: Later, *, until: date | None = None) -> object:
        return day, who, until

    return meet


def async_flow(decorate):
    @decorate
    async def meet(day: date, who: Later, *, until: date | None = None) -> object:
        return day, who, until

    return meet


class Later(pydantic.BaseModel):
    """A type that is defined below the flows that use it."""

    number: int


class Calendar:
    """Has a flow as a method."""

    @supervised_flow
    def weekday(self, day: date) -> str:
        return f"{day:%A}"


GIVEN = {"day": "2024-02-03", "who": {"number": "1"}, "until": "2024-02-04"}
MEANT = (date(2024, 2, 3), Later(number=1), date(2024, 2, 4))


@BOTH
def test_a_call_casts_what_it_is_given(server, decorate):
    assert sync_flow(decorate)(**GIVEN) == MEANT
    assert sync_flow(decorate).with_options(name="renamed")(**GIVEN) == MEANT
    assert asyncio.run(async_flow(decorate)(**GIVEN)) == MEANT
    assert Calendar().weekday("2024-02-03") == "Saturday"


@BOTH
@pytest.mark.parametrize("isolation", ["none", "process"])
@pytest.mark.parametrize("make", [sync_flow, async_flow])
def test_a_child_is_given_what_its_flow_wants(server, decorate, make, isolation):
    @supervised_flow
    def parent():
        return supervisor.spawn(make(decorate), GIVEN, isolation=isolation).result()

    assert parent() == MEANT
