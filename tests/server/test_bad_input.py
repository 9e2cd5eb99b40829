"""Bad input is refused in words that say what to do, and spoils nothing else."""

import asyncio
import contextlib
import socket
import sys
import threading
from uuid import uuid4

import anyio
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import DeploymentStatus
from prefect.exceptions import ObjectNotFound, ParameterTypeError
from prefect.flows import bind_flow_to_infrastructure
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker
from support.world import FLOWS, eventually

from supervised import (
    ChildFailed,
    DeploymentNotFoundError,
    DeploymentPausedError,
    DuplicateKeyError,
    InvalidTargetError,
    NoApiError,
    NoSupervisorError,
    ParametersError,
    ServerUnreachableError,
    SpawnError,
    _launch,
    supervised_flow,
    supervisor,
)
from supervised._api import open_orchestrator
from supervised.testing import running


@flow
async def double(x: int) -> int:
    return 2 * x


@flow
def generator():
    yield 1


def in_a_scope(act):
    """Run *act* in the body of a supervised flow whose children may fail."""

    @supervised_flow(on_child_failure="ignore")
    async def parent():
        good = supervisor.spawn(double, {"x": 1})
        result = await act()
        assert await good == 2  # an error in one launch never breaks the others
        return result

    return asyncio.run(parent())


def test_spawning_outside_a_run_says_where_to_spawn():
    with pytest.raises(NoSupervisorError, match="@supervised_flow"):
        supervisor.spawn(double, {"x": 1})


@pytest.mark.parametrize("target", [42, None, "no-slash", "a/b/c", "/half", double.fn, generator])
def test_a_target_that_is_neither_flow_nor_deployment_is_refused_at_once(server, target):
    async def act():
        with pytest.raises(InvalidTargetError, match=r"deployment|generator"):
            supervisor.spawn(target)

    in_a_scope(act)


def test_a_flow_that_is_bound_to_infrastructure_is_not_run_here_instead(server):
    bound = bind_flow_to_infrastructure(double, work_pool="gpus", worker_cls=ProcessWorker)

    async def act():
        with pytest.raises(InvalidTargetError, match=r"supervisor\.adopt"):
            supervisor.spawn(bound, {"x": 1})

    in_a_scope(act)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_a_negative_timeout_is_refused_at_once(server, timeout):
    async def act():
        with pytest.raises(ValueError, match="timeout_seconds"):
            supervisor.spawn(double, {"x": 1}, timeout_seconds=timeout)

    in_a_scope(act)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grace_seconds": -1}, "grace_seconds"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"on_child_failure": "explode"}, "on_child_failure"),
        ({"on_parent": "explode"}, "on_parent"),
        ({"on_parent": {"exploded": "wait"}}, "on_parent"),
    ],
)
def test_options_out_of_range_are_refused_at_decoration(options, words):
    with pytest.raises(ValueError, match=words):
        supervised_flow(**options)(lambda: None)


def test_an_inline_child_cannot_be_detached(server):
    async def act():
        with pytest.raises(ValueError, match="inline"):
            supervisor.spawn(double, {"x": 1}, on_parent="detach")
        child = supervisor.spawn(double, {"x": 5})
        with pytest.raises(ValueError, match="inline"):
            child.detach()

    in_a_scope(act)


@pytest.mark.parametrize(
    "target", ["nobody/home", str(uuid4()), uuid4()], ids=["name", "text of an id", "id"]
)
def test_an_unknown_deployment_is_the_childs_outcome(server, target):
    async def act():
        child = supervisor.spawn(target, name="lost")
        with pytest.raises(DeploymentNotFoundError, match="prefect deployment ls") as caught:
            await child
        assert caught.value.child == "lost"
        assert child.outcome == "failed"

    in_a_scope(act)


@pytest.mark.parametrize("parameters", [{}, {"x": 1, "y": 2}])
def test_parameters_that_do_not_fit_a_flow_are_the_childs_outcome(server, parameters):
    async def act():
        with pytest.raises(ParametersError, match=r"double.*\(x: int\)"):
            await supervisor.spawn(double, parameters)

    in_a_scope(act)


def test_a_value_of_the_wrong_type_fails_the_child(server):
    async def act():
        with pytest.raises(ParametersError, match="do not fit flow 'double'") as caught:
            await supervisor.spawn(double, {"x": "many"})
        assert isinstance(caught.value.__cause__, ParameterTypeError)

    in_a_scope(act)


def test_parameters_that_do_not_fit_a_flow_which_the_child_calls_are_its_own_failure(server):
    @flow
    async def calls_double():
        await double(x="many")

    async def act():
        with pytest.raises(ChildFailed, match="valid integer"):
            await supervisor.spawn(calls_double)

    in_a_scope(act)


@pytest.fixture
def deployment(server):
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(double)
        name = f"d-{uuid4()}"
        deployment_id = client.create_deployment(
            flow_id,
            name,
            parameter_openapi_schema={
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
            },
            enforce_parameter_schema=True,
        )
        yield client, deployment_id, f"double/{name}"


def test_parameters_that_a_deployment_refuses_are_the_childs_outcome(deployment):
    _, _, name = deployment

    async def act():
        with pytest.raises(ParametersError, match="many"):
            await supervisor.spawn(name, {"x": "many"})

    in_a_scope(act)


def test_a_parameter_that_a_deployment_does_not_have_is_the_childs_outcome(deployment):
    _, _, name = deployment

    async def act():
        with pytest.raises(ParametersError, match="takes no parameter 'y'. It takes: x"):
            await supervisor.spawn(name, {"x": 1, "y": 2})

    in_a_scope(act)


def test_a_deployment_is_given_what_its_parameters_were_at_the_spawn(deployment):
    client, _, name = deployment

    @supervised_flow
    async def parent():
        parameters = {"x": 1}
        child = supervisor.spawn(name, parameters)
        parameters["x"] = 2
        while child.flow_run_id is None:
            await asyncio.sleep(0.01)
        child.cancel()
        await child.wait_async()
        return child.flow_run_id

    assert client.read_flow_run(asyncio.run(parent())).parameters == {"x": 1}


@pytest.mark.parametrize("key", [None, "mine"])
def test_two_flows_of_one_name_are_different_work(server, key):
    @flow(name="double")
    async def other(x: int) -> int:
        return 200 * x

    async def act():
        first = supervisor.spawn(double, {"x": 3}, key=key)
        if key is not None:
            with pytest.raises(DuplicateKeyError, match="other parameters"):
                supervisor.spawn(other, {"x": 3}, key=key)
        else:
            assert await supervisor.spawn(other, {"x": 3}) == 600
        assert await first == 6

    in_a_scope(act)


def test_a_key_is_never_shared_by_work_that_cannot_be_compared(server):
    @flow
    async def locked(lock: object) -> bool:
        return lock is not None

    async def act():
        child = supervisor.spawn(locked, {"lock": threading.Lock()}, key="mine")
        with pytest.raises(DuplicateKeyError, match="beyond comparison"):
            supervisor.spawn(locked, {"lock": threading.Lock()}, key="mine")
        assert await child

    in_a_scope(act)


def test_a_deployment_that_is_paused_and_that_nothing_serves_is_the_childs_outcome(deployment):
    client, deployment_id, name = deployment
    client.pause_deployment(deployment_id)

    async def act():
        with pytest.raises(DeploymentPausedError, match="Serve it again"):
            await supervisor.spawn(name, {"x": 1})

    in_a_scope(act)


@contextlib.contextmanager
def served(name, server, folder):
    """Serve tests/flows/briefly.py under this name."""
    env = {**server.env, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    command = [sys.executable, "briefly.py", name]
    with running(command, env=env, log=folder / "briefly.log", cwd=FLOWS):
        yield


def ready(client, name):
    """Return the deployment if the server knows that something asks for its runs."""
    with contextlib.suppress(ObjectNotFound):
        deployment = client.read_deployment_by_name(f"briefly/{name}")
        return deployment if deployment.status is DeploymentStatus.READY else None


def test_a_deployment_whose_schedules_are_paused_takes_children_as_it_takes_plain_runs(
    server, tmp_path
):
    name = f"d-{uuid4()}"
    with served(name, server, tmp_path), get_client(sync_client=True) as client:
        deployment = eventually(lambda: ready(client, name), seconds=60, what="it is served")
        client.pause_deployment(deployment.id)

        async def act():
            await supervisor.spawn(f"briefly/{name}")
            assert client.read_deployment(deployment.id).paused

        in_a_scope(act)


def test_a_child_waits_for_what_serves_it_while_that_is_started_again(server, tmp_path):
    name = f"d-{uuid4()}"
    with get_client(sync_client=True) as client:
        with served(name, server, tmp_path):
            deployment = eventually(lambda: ready(client, name), seconds=60, what="it is served")
        assert client.read_deployment(deployment.id).paused, "`serve` leaves it like this"

        async def act():
            child = supervisor.spawn(f"briefly/{name}")
            with anyio.fail_after(30):
                while child.flow_run_id is None:
                    await asyncio.sleep(0.05)
            with served(name, server, tmp_path):
                await child

        in_a_scope(act)


def test_a_failed_launch_that_nobody_awaits_fails_the_parent(server):
    @supervised_flow
    async def parent():
        supervisor.spawn("nobody/home")
        await asyncio.sleep(3600)

    with pytest.raises(BaseException) as caught:
        asyncio.run(parent())
    (error,) = caught.value.exceptions
    assert isinstance(error, DeploymentNotFoundError)


def test_an_unreachable_server_is_retried_and_then_the_childs_outcome(monkeypatch):
    monkeypatch.setattr(_launch, "_PATIENCE_SECONDS", 1.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/api"

        async def launch():
            async with open_orchestrator() as api:
                await _launch.patiently(lambda: api.read_deployment("some/deployment"))

        with temporary_settings({PREFECT_API_URL: url}):
            with pytest.raises(ServerUnreachableError, match="PREFECT_API_URL"):
                asyncio.run(launch())


def test_no_configured_api_says_how_to_configure_one(monkeypatch):
    from prefect.settings import PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

    async def launch():
        async with open_orchestrator():
            pass

    settings = {PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}
    with temporary_settings(settings, restore_defaults={PREFECT_API_URL}):
        with pytest.raises(NoApiError, match="prefect config set PREFECT_API_URL"):
            asyncio.run(launch())


def test_every_launch_error_is_a_spawn_error():
    for error in (DeploymentNotFoundError, DeploymentPausedError, ParametersError, NoApiError):
        assert issubclass(error, SpawnError)
