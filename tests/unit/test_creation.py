"""Runs are created in bulk where that is possible, and each by itself where it is not."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from uuid import uuid4

import pytest

from supervised._api import Deployment, PrefectOrchestrator, RunRequest
from supervised._budget import RequestBudget
from supervised._launch import freeze_parameters

MANY = 20


class Client:
    """Answers to what creates runs, in memory; counts what it was asked."""

    api_url = "http://prefect.test/api"

    def __init__(self):
        self.runs = {}
        self.alone = 0

    async def request(self, method, path, *, json, path_params):
        assert path.endswith("/create_flow_run/bulk")
        results = [{"flow_run_id": self._made(body), "error": None} for body in json]
        return SimpleNamespace(json=lambda: {"results": results})

    async def create_flow_run_from_deployment(self, deployment_id, *, idempotency_key, **body):
        self.alone += 1
        json.dumps(body["parameters"], ensure_ascii=False, allow_nan=False).encode()
        return self.runs[self._made({"idempotency_key": idempotency_key})]

    async def read_flow_runs(self, *, flow_run_filter, offset, **_):
        ids = [str(run_id) for run_id in flow_run_filter.id.any_]
        return [self.runs[run_id] for run_id in ids][offset:]

    def _made(self, body):
        run_id = str(uuid4())
        key = body["idempotency_key"]
        self.runs[run_id] = SimpleNamespace(id=run_id, idempotency_key=key)
        return run_id


def create(client, values, *, is_linked=False, **callbacks):
    """Create a run for each of these parameters at once; return what each has led to."""
    deployment = Deployment(id=uuid4(), name="score/gpu", version=None, paused=False)

    def requested(number, value):
        return RunRequest(
            name=None,
            parameters=freeze_parameters("score/gpu", {"value": value}),
            tags=(),
            labels={},
            idempotency_key=str(number),
            parent_run_id=uuid4(),
            tracking_key=str(number),
            tracking_id=uuid4(),
            task_inputs={},
            is_linked=is_linked,
            **callbacks,
        )

    async def act():
        api = PrefectOrchestrator(client, RequestBudget())
        requests = [requested(number, value) for number, value in enumerate(values)]
        return await asyncio.gather(
            *(api.create_deployment_run(deployment, request) for request in requests),
            return_exceptions=True,
        )

    return asyncio.run(act())


@pytest.mark.parametrize("bad", [object(), "\ud800"], ids=["object", "surrogate"])
def test_parameters_that_are_no_json_fail_alone(bad):
    client = Client()
    first, *others = create(client, [bad, *range(1, MANY)])
    assert isinstance(first, Exception)
    assert [run.idempotency_key for run in others] == [str(n) for n in range(1, MANY)]
    assert client.alone == 1


def test_of_a_few_that_are_created_by_themselves_none_is_that_nobody_wants_any_more():
    client = Client()
    runs = create(client, range(5), begin=lambda: client.alone < 3)
    assert [run is not None for run in runs] == [True, True, True, False, False]
    assert client.alone == 3


def test_for_what_nobody_wants_the_server_is_asked_nothing():
    client = Client()
    nobody = {"is_wanted": lambda: False, "begin": lambda: False}
    runs = create(client, range(MANY), is_linked=True, **nobody)
    assert runs == [None] * MANY
    assert not client.runs
