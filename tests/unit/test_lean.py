"""A model in less memory is the same model."""

from __future__ import annotations

from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.results import ResultRecordMetadata
from prefect.states import Completed, Failed, Running, Scheduled

from supervised._lean import lean

METADATA = ResultRecordMetadata(storage_key="here", serializer={"type": "json"})


@pytest.mark.parametrize(
    "state", [Scheduled(), Running(), Failed(message="boom"), Completed(data=METADATA), None]
)
def test_a_lean_run_is_equal_and_says_the_same(state):
    run = FlowRun(id=uuid4(), flow_id=uuid4(), state=state, labels={"a": 1}, tags=["x"])
    parsed = FlowRun.model_validate_json(run.model_dump_json())
    made = lean(parsed)
    assert made == parsed
    assert made.model_dump_json(exclude_unset=True) == parsed.model_dump_json(exclude_unset=True)
    assert lean(made) == made


def test_lean_runs_share_which_fields_were_given():
    runs = [lean(FlowRun(id=uuid4(), flow_id=uuid4(), state=Running())) for _ in range(2)]
    assert runs[0].__pydantic_fields_set__ is runs[1].__pydantic_fields_set__


def test_what_a_state_holds_stays_what_it_is():
    state = Completed(data=METADATA)
    assert lean(state).data is METADATA
