"""Runs are created in bulk where that is possible, and each by itself where it is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from types import SimpleNamespace
from uuid import uuid4

import anyio
import httpx
import pytest
from prefect.client.schemas.objects import DeploymentStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from support.virtual import play

from supervised import _api
from supervised._api import Deployment, PrefectOrchestrator, RunRequest
from supervised._budget import RequestBudget
from supervised._bulk import LIMIT, Look, Looks
from supervised._launch import freeze_parameters

MANY = 20


class Client:
    """Answers to what creates runs, in memory; counts what it was asked."""

    api_url = "http://prefect.test/api"

    def __init__(self):
        self.runs = {}
        self.alone = 0
        self.sizes = []  # of the requests in bulk
        self.checked = []  # whether the server was to check the parameters of each

    async def request(self, method, path, *, json, path_params):
        assert path.endswith("/create_flow_run/bulk")
        self.sizes.append(len(json))
        self.checked += [body.get("enforce_parameter_schema", True) for body in json]
        results = [{"flow_run_id": self._made(body), "error": None} for body in json]
        return SimpleNamespace(json=lambda: {"results": results})

    async def create_task_run(self, **given):
        return SimpleNamespace(id=given["id"])

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


def requested(number, value, **options):
    """Return the request for a run with these parameters."""
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
        **{"is_linked": False, **options},
    )


def create(client, values, **options):
    """Create a run for each of these parameters at once; return what each has led to."""
    deployment = Deployment(id=uuid4(), name="score/gpu", version=None)

    async def act():
        api = PrefectOrchestrator(client, RequestBudget())
        requests = [requested(number, value, **options) for number, value in enumerate(values)]
        return await asyncio.gather(
            *(api.create_deployment_run(deployment, request) for request in requests),
            return_exceptions=True,
        )

    return asyncio.run(act())


@pytest.mark.parametrize(
    "answer",
    ["<html>", "{}", "[]", '{"results": null}', '{"results": ["?"]}', '{"results": [{}]}']
    + [
        f'{{"results": [{{"error": null, "flow_run_id": {odd}}}]}}' for odd in ("5", '"?"', '["?"]')
    ],
)
def test_an_answer_that_makes_no_sense_leaves_each_run_to_be_asked_for_by_itself(
    answer, monkeypatch
):
    """A proxy's, perhaps: the runs may be there, and their keys find them."""
    monkeypatch.setattr("supervised._bulk._PAUSES", (0.0,))

    class Odd(Client):
        async def request(self, method, path, *, json, path_params):
            await super().request(method, path, json=json, path_params=path_params)
            return httpx.Response(200, text=answer)

    client = Odd()
    runs = create(client, range(MANY))
    assert [run.idempotency_key for run in runs] == [str(n) for n in range(MANY)]
    assert client.alone == MANY


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


def test_the_server_is_sent_no_empty_request_if_nobody_wants_what_was_to_be_sent():
    client = Client()
    runs = create(client, range(MANY), begin=lambda: False)  # but wanted until just before
    assert runs == [None] * MANY
    assert client.sizes == []


class Catalogue(Client):
    """Has one deployment, which takes a moment to find."""

    def __init__(self, **fields):
        super().__init__()
        self.lookups = []
        self._found = DeploymentResponse(
            **{"id": uuid4(), "name": "gpu", "flow_id": uuid4(), "enforce_parameter_schema": False}
            | fields
        )

    def serve(self):
        self._found.paused = False

    async def read_deployment_by_name(self, name):
        return await self.read_deployment(name)

    async def read_deployment(self, target):
        self.lookups.append(target)
        await asyncio.sleep(0.01)
        return self._found

    async def read_flow(self, flow_id):
        return SimpleNamespace(name="score")


@pytest.mark.parametrize("target", ["score/gpu", uuid4()], ids=["by name", "by id"])
def test_a_deployment_that_many_ask_for_is_looked_up_once_in_ten_seconds(target, monkeypatch):
    client = Catalogue()

    async def act():
        api = PrefectOrchestrator(client, RequestBudget())
        found = await asyncio.gather(*(api.read_deployment(target) for _ in range(MANY)))
        assert {deployment.name for deployment in found} == {"score/gpu"}
        assert client.lookups == [target]
        later = _api.monotonic() + 10.1
        monkeypatch.setattr(_api, "monotonic", lambda: later)  # somebody may have ended it
        await api.read_deployment(target)
        assert client.lookups == [target] * 2

    asyncio.run(act())


def test_a_deployment_that_is_not_served_is_looked_up_again_half_a_second_later(monkeypatch):
    """Who has just served it is not refused because of what was known before."""
    client = Catalogue(paused=True, status=DeploymentStatus.NOT_READY)

    async def act():
        api = PrefectOrchestrator(client, RequestBudget())
        assert not (await api.read_deployment("score/gpu")).is_served
        client.serve()
        later = _api.monotonic() + 0.6
        monkeypatch.setattr(_api, "monotonic", lambda: later)
        assert (await api.read_deployment("score/gpu")).is_served

    asyncio.run(act())


@pytest.mark.parametrize("pool", [None, "gpus"])
@pytest.mark.parametrize("status", [None, *DeploymentStatus])
@pytest.mark.parametrize("paused", [False, True])
def test_a_deployment_is_not_served_if_what_has_served_it_paused_it_and_went_silent(
    paused, status, pool
):
    client = Catalogue(paused=paused, status=status, work_pool_name=pool)
    api = PrefectOrchestrator(client, RequestBudget())
    deployment = asyncio.run(api.read_deployment("score/gpu"))
    has_ended = (paused, status, pool) == (True, DeploymentStatus.NOT_READY, None)
    assert deployment.is_served is not has_ended


NUMBER = {"title": "Parameters", "properties": {"value": {"type": "integer"}}}


class Enforcing(Catalogue):
    """Has a deployment whose parameters have to fit a schema, which may change, or be gone."""

    def __init__(self, schema=NUMBER):
        super().__init__()
        self.become(schema)
        self.error = None

    def become(self, schema):
        self._found.enforce_parameter_schema = True
        self._found.parameter_openapi_schema = schema
        self._found.parameters = {}

    async def read_deployment(self, target):
        if self.error:
            raise self.error
        return await super().read_deployment(target)


def create_later(client, values, change, monkeypatch):
    """Look the deployment up, change it, and create runs when that is no longer known."""

    async def act():
        api = PrefectOrchestrator(client, RequestBudget())
        deployment = await api.read_deployment("score/gpu")
        change()
        later = _api.monotonic() + 10.1
        monkeypatch.setattr(_api, "monotonic", lambda: later)
        requests = [requested(number, value) for number, value in enumerate(values)]
        return await asyncio.gather(
            *(api.create_deployment_run(deployment, request) for request in requests)
        )

    return asyncio.run(act())


def test_the_server_checks_what_is_not_known_to_fit_and_nothing_else(monkeypatch):
    client = Enforcing()
    assert None not in create_later(client, [*range(MANY), "many"], lambda: None, monkeypatch)
    assert client.checked == [*[False] * MANY, True]


def test_what_fits_a_schema_that_is_no_longer_the_deployments_is_checked(monkeypatch):
    client = Enforcing()
    required = {**NUMBER, "required": ["another"]}
    create_later(client, range(MANY), lambda: client.become(required), monkeypatch)
    assert client.checked == [True] * MANY


@pytest.mark.parametrize("status", [404, 500])
def test_if_a_deployment_cannot_be_read_again_the_server_checks_the_parameters(status, monkeypatch):
    client = Enforcing()

    def fail():
        request = httpx.Request("GET", "http://prefect.test")
        response = httpx.Response(status, request=request)
        error = httpx.HTTPStatusError("no", request=request, response=response)
        failed = PrefectHTTPStatusError.from_httpx_error(error)
        client.error = ObjectNotFound(failed) if status == 404 else failed

    assert None not in create_later(client, range(MANY), fail, monkeypatch)
    assert client.checked == [True] * MANY


def test_if_checking_takes_too_long_the_server_does_the_rest(monkeypatch):
    monkeypatch.setattr("supervised._bulk._CHECK_SECONDS", 0.0)
    client = Enforcing()
    create_later(client, range(MANY), lambda: None, monkeypatch)
    assert client.checked == [True] * MANY


class OneByOne(Client):
    """Creates the next batch when somebody has been told of the first."""

    def __init__(self):
        super().__init__()
        self.is_told = asyncio.Event()

    async def request(self, method, path, **options):
        if self.sizes:
            await asyncio.wait_for(self.is_told.wait(), 60)
        return await super().request(method, path, **options)


def test_who_is_in_one_batch_hears_of_its_run_while_the_next_batch_is_created():
    async def act():
        client = OneByOne()
        api = PrefectOrchestrator(client, RequestBudget())
        deployment = Deployment(id=uuid4(), name="score/gpu", version=None)

        async def created(number):
            run = await api.create_deployment_run(deployment, requested(number, number))
            client.is_told.set()
            return run

        runs = await asyncio.gather(*(created(number) for number in range(LIMIT + MANY)))
        assert all(run is not None for run in runs)
        assert client.sizes == [LIMIT, MANY]

    asyncio.run(act())


class Database(Client):
    """Records task runs, and creates runs in seconds, of which it may refuse some.

    Args:
        writers: How many writes it takes at a time; one more throws out a creation.
    """

    def __init__(self, writers):
        super().__init__()
        self.order = []
        self.flows = []
        self.refuses = False
        self._writers = writers
        self._lock = asyncio.Lock()
        self._under_way = 0

    async def request(self, method, path, *, json, path_params=None):
        if path == "/events":
            self.order.append("record")
            return None
        if path == "/task_runs/count":
            count = len(json["task_runs"]["id"]["any_"])
            return SimpleNamespace(json=lambda: count)
        self.order.append("create")
        self._under_way += 1
        is_thrown_out = self._under_way > self._writers
        async with self._lock if self._writers == 1 else contextlib.nullcontext():
            await asyncio.sleep(0.1 if is_thrown_out else 3.0)
        self._under_way -= 1
        if is_thrown_out or self.refuses:
            results = [{"flow_run_id": None, "error": "database is locked"} for _ in json]
            return SimpleNamespace(json=lambda: {"results": results})
        return await super().request(method, path, json=json, path_params=path_params)

    async def create_flow_from_name(self, name):
        self.flows.append(name)
        async with self._lock if self._writers == 1 else contextlib.nullcontext():
            pass


async def launch(api, count, first):
    deployment = Deployment(id=uuid4(), name="score/gpu", version=None)
    requests = [requested(first + number, number, is_linked=True) for number in range(count)]
    runs = await asyncio.gather(
        *(api.create_deployment_run(deployment, request) for request in requests)
    )
    assert None not in runs


def test_where_the_database_has_one_writer_nothing_is_recorded_while_others_are_created():
    async def story():
        client = Database(writers=1)
        api = PrefectOrchestrator(client, RequestBudget())
        await launch(api, 2 * LIMIT, 0)
        await launch(api, 2 * LIMIT, 1000)
        assert client.order == ["record", "create"] * 4
        assert client.flows == ["score"], "it was known"

    play(story())


def test_two_hundreds_are_created_side_by_side_where_the_database_takes_that():
    async def story():
        client = Database(writers=2)
        api = PrefectOrchestrator(client, RequestBudget())
        began = asyncio.get_running_loop().time()
        await launch(api, 2 * LIMIT, 0)
        assert asyncio.get_running_loop().time() - began < 2 * 3.0
        assert client.flows == ["score"] * 2

    play(story())


def test_what_is_thrown_out_beside_another_is_created_and_then_one_goes_at_a_time():
    async def story():
        client = Database(writers=2)
        api = PrefectOrchestrator(client, RequestBudget())
        await launch(api, 2 * LIMIT, 0)
        client._writers = 1  # another server is behind the address now
        client.order.clear()
        await launch(api, 2 * LIMIT, 1000)
        assert client.order.count("create") == 3
        assert api._writers.width == 1
        assert client.alone == 0

    play(story())


def test_what_is_refused_alone_says_nothing_about_two_at_a_time():
    async def story():
        client = Database(writers=2)
        api = PrefectOrchestrator(client, RequestBudget())
        await launch(api, 2 * LIMIT, 0)
        client.refuses = True
        await launch(api, MANY, 1000)
        assert client.alone == MANY
        assert api._writers.width == 2

    play(story())


def test_when_all_have_been_created_nobody_waits_for_another_attempt(monkeypatch):
    pauses = []
    monkeypatch.setattr(anyio, "sleep", recording(pauses))
    assert None not in create(Client(), range(MANY))
    assert sum(pauses) == 0


def recording(pauses):
    here = threading.get_ident()

    async def sleep(seconds):
        if threading.get_ident() != here:
            await asyncio.sleep(seconds)  # another test's thread, which is ending
        else:
            pauses.append(seconds)

    return sleep


class Recorder:
    """Records events one after the other, once it has begun."""

    def __init__(self, begins, each):
        self.begins, self.each = begins, each

    def look(self, count, taken):
        return Look(taken, max(0, min(count, int((taken - self.begins) / self.each))))

    def wait(self, looks, count):
        """Look until all are recorded; return how late that was, and after how many looks."""
        seen, taken = [Look()], looks.first(count)
        while (last := self.look(count, taken)).recorded < count:
            taken += looks.again(count, seen[-1], last)
            seen.append(last)
        seen.append(last)
        looks.learn(seen[1], last)
        return taken - (self.begins + count * self.each), len(seen) - 1


@pytest.mark.parametrize("each", [0.0005, 0.0043, 0.02, 0.05])
@pytest.mark.parametrize("begins", [0.03, 0.35, 1.5])
def test_looks_come_soon_after_what_they_look_for_and_are_few(begins, each):
    """Whatever a server needs, and however that changes."""
    looks = Looks()
    for recorder in (Recorder(begins, each), Recorder(0.03, each), Recorder(0.03, 0.0043)):
        for _ in range(3):
            believed, whole = looks.first(100), recorder.begins + 100 * recorder.each
            late, asked = recorder.wait(looks, 100)
            assert late <= max(0.05, whole / 4, believed - whole)
            assert asked <= 15


def test_of_a_server_that_goes_on_as_it_began_the_end_is_foretold():
    looks, recorder = Looks(), Recorder(0.1, 0.0043)
    for _ in range(3):
        late, asked = recorder.wait(looks, 100)
        assert late <= 0.05
        assert asked <= 4


def test_what_a_few_have_taken_does_not_put_off_the_look_at_many():
    looks = Looks()
    before = looks.first(100)
    looks.learn(Look(3.0, 12), Look(3.0, 12))
    assert looks.first(100) == before
