"""One trace tells the whole story, across processes; asserted where it arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prefect.client.orchestration import get_client
from support.otlp import receiving
from support.stage import Played, Stage
from support.world import eventually

from supervised import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.orchestration import SyncPrefectClient
    from support.otlp import Point

    from supervised.testing import LocalServer

LABEL = "__OTEL_TRACEPARENT"
DARK = {"PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false"}


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def stage(
    server: LocalServer, client: SyncPrefectClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """A server, a receiver for the traces of all processes, and the flows served."""
    with receiving() as (otlp, endpoint):
        stage = Stage(server, otlp, endpoint, tmp_path_factory.mktemp("stage"))
        with stage.serving("traced", client):
            yield stage


@pytest.fixture(scope="module")
def day(stage: Stage) -> Played:
    """Inline, deployed and detached children that all complete."""
    return stage.play("day")


@pytest.fixture(scope="module")
def night(stage: Stage) -> Played:
    """An inline child fails; an inline and a deployed sibling are cancelled."""
    return stage.play("night")


@pytest.fixture(scope="module")
def evening(stage: Stage) -> Played:
    """Deadlines of three kinds are exceeded, and one child is cancelled by its handle."""
    return stage.play("evening")


@pytest.fixture(scope="module")
def storm(stage: Stage) -> Played:
    """One deployed child is killed, another fails."""
    return stage.play("storm")


@pytest.fixture(scope="module")
def noon(stage: Stage) -> Played:
    """Inline children on two levels, and a deployed one that never starts."""
    return stage.play("noon")


# -- the tree -----------------------------------------------------------------------------------


def test_a_run_and_all_that_it_launched_are_one_trace(day: Played) -> None:
    """Each child's own spans stand under the child, wherever it ran, and not beside it."""
    day.assert_tree(
        """
        day INTERNAL
          supervise day INTERNAL completed
            child extract INTERNAL completed
              extract INTERNAL
                extract work INTERNAL
            child crunch INTERNAL completed
              crunch INTERNAL
                crunch work INTERNAL
            child audit PRODUCER detached
              audit INTERNAL
                leaf work INTERNAL
            child load CLIENT completed
              load INTERNAL
                supervise mid INTERNAL completed
                  child step INTERNAL completed
                    step INTERNAL
                      extract work INTERNAL
                mid work INTERNAL
        """,
        kind=True,
        outcome=True,
    )


def test_a_deployed_child_traces_from_its_own_process(day: Played) -> None:
    here = {name: day.span(name).process for name in ("supervise day", "child load", "extract")}
    assert set(here.values()) == {day.process}
    elsewhere = {day.span(name).process for name in ("load", "supervise mid", "child step")}
    assert len(elsewhere) == 1
    assert len({day.process, day.span("audit").process, *elsewhere}) == 3


def test_the_spans_name_the_library_and_its_version(day: Played) -> None:
    ours = {span.name for span in day.otlp.spans(day.trace_id, scope="supervised")}
    assert {name.split()[0] for name in ours} == {"supervise", "child"}
    assert day.span("supervise mid").scope_version == __version__


def test_a_scope_covers_its_children_and_they_cover_their_runs(day: Played) -> None:
    scope = day.span("supervise day")
    for name in ("extract", "crunch", "load"):
        child, run = day.span(f"child {name}"), day.span(name)
        assert scope.start <= child.start <= run.start
        assert child.end <= scope.end
    # What runs elsewhere may still be tidying up when its end is seen here.
    assert day.span("extract").end <= day.span("child extract").end
    assert day.span("crunch").end <= day.span("child crunch").end


def test_a_detached_childs_span_ends_once_its_run_exists(day: Played) -> None:
    """It says that work was handed over; nobody here waits for how that work ends."""
    audit = day.span("child audit")
    assert audit.end < day.span("audit").end
    assert audit.event_names == ["supervised.child.created", "supervised.child.detached"]


@pytest.mark.parametrize("name", ["audit", "load"])
def test_the_request_that_creates_a_run_carries_its_place_in_the_trace(
    day: Played, client: SyncPrefectClient, name: str
) -> None:
    """Later the run's own process writes its own place over it."""
    child, run = day.span(f"child {name}"), day.span(name)
    created = day.child(name)
    assert created["labels"][LABEL].split("-")[1:3] == [child.trace_id, child.span_id]
    traceparent = client.read_flow_run(created["run"]).labels[LABEL]
    assert traceparent.split("-")[1:3] == [run.trace_id, run.span_id]


def test_a_child_that_never_starts_keeps_its_place_in_the_trace(
    noon: Played, client: SyncPrefectClient
) -> None:
    child = noon.span("child waiting")
    traceparent = client.read_flow_run(noon.child("waiting")["run"]).labels[LABEL]
    assert traceparent.split("-")[1:3] == [child.trace_id, child.span_id]


def test_inline_children_trace_below_each_other(noon: Played) -> None:
    noon.assert_tree(
        """
        noon
          supervise noon
            child waiting
            child extract
              extract
                extract work
            child mid
              mid
                supervise mid
                  child step
                    step
                      extract work
                mid work
        """
    )


# -- outcomes -----------------------------------------------------------------------------------


def test_a_completed_child_is_no_error_and_says_where_it_ran(day: Played) -> None:
    load = day.span("child load")
    assert load.attributes == {
        "supervised.child.name": "load",
        "supervised.child.kind": "deployment",
        "supervised.attempt": 1,
        "prefect.flow.name": "mid",
        "prefect.deployment.name": "mid/traced",
        "prefect.flow_run.id": day.child("load")["run"],
        "prefect.state.type": "COMPLETED",
        "prefect.state.name": "Completed",
        "supervised.outcome": "completed",
    }
    assert load.status == "UNSET"
    assert load.event_names == ["supervised.child.created", "supervised.child.running"]


def test_a_scope_says_what_it_was_and_what_became_of_its_children(day: Played) -> None:
    scope = day.span("supervise day")
    assert scope.attributes == {
        "supervised.policy.on_failure": "cancel_siblings",
        "supervised.grace_seconds": 20.0,
        "prefect.flow.name": "day",
        "prefect.flow_run.id": day.run,
        "code.function.name": "__main__.day",
        "supervised.outcome": "completed",
        "supervised.children.spawned": 4,
        "supervised.children.completed": 3,
        "supervised.children.failed": 0,
        "supervised.children.crashed": 0,
        "supervised.children.timed_out": 0,
        "supervised.children.cancelled": 0,
        "supervised.children.abandoned": 0,
        "supervised.children.detached": 1,
    }
    assert scope.status == "UNSET"


def test_a_failure_is_told_with_its_siblings_and_its_teardown(night: Played) -> None:
    night.assert_tree(
        """
        night
          supervise night failed ERROR
            child near cancelled
              near
            child far cancelled
              far
                leaf work
            child bad failed ERROR
              bad
            teardown completed
        """,
        outcome=True,
    )


def test_a_failed_child_carries_its_exception_and_its_scope_does_not(night: Played) -> None:
    bad = night.span("child bad")
    assert bad.attributes["error.type"] == "ValueError"
    assert bad.attributes["prefect.state.name"] == "Failed"
    assert "part 0 is bad" in bad.description
    exception = bad.events[-1]
    assert exception.name == "exception"
    assert exception.attributes["exception.message"] == "part 0 is bad"
    scope = night.span("supervise night")
    assert scope.attributes["error.type"] == "ExceptionGroup"
    assert "exception" not in scope.event_names


@pytest.mark.parametrize("name", ["near", "far"])
def test_a_cancelled_sibling_is_no_error_and_says_who_asked(
    night: Played, client: SyncPrefectClient, name: str
) -> None:
    span = night.span(f"child {name}")
    assert (span.status, span.outcome) == ("UNSET", "cancelled")
    assert "error.type" not in span.attributes
    assert span.attributes["supervised.cancel.source"] == "sibling_failed"
    # A process that takes its notice late says `Crashed` before its runner has the last word.
    assert span.attributes["prefect.state.name"] in {"Cancelled", *["Crashed"] * (name == "far")}
    eventually(
        lambda: client.read_flow_run(night.child(name)["run"]).state_name == "Cancelled",
        seconds=30,
        what="it is Cancelled",
    )
    (request,) = [event for event in span.events if event.name == "supervised.cancel.requested"]
    assert request.attributes["source"] == "sibling_failed"
    assert request.attributes["reason"] == "sibling 'bad' failed: ValueError: part 0 is bad"


@pytest.mark.parametrize("name", ["near", "far"])
def test_a_cancelled_sibling_links_to_the_child_that_failed(night: Played, name: str) -> None:
    (link,) = night.span(f"child {name}").links
    assert link.span_id == night.span("child bad").span_id
    assert link.attributes == {"supervised.link": "cancelled_by"}


def test_a_server_that_accepts_the_cancellation_is_an_event(night: Played) -> None:
    assert night.span("child far").event_names == [
        "supervised.child.created",
        "supervised.child.running",
        "supervised.cancel.requested",
        "supervised.cancel.acknowledged",
    ]


def test_a_teardown_says_why_and_what_it_did(night: Played) -> None:
    teardown = night.span("teardown")
    assert teardown.attributes == {
        "supervised.cancel.source": "sibling_failed",
        "supervised.children.live": 2,
        "supervised.grace_seconds": 20.0,
        "supervised.escalations": 0,
        "supervised.children.abandoned": 0,
        "supervised.outcome": "completed",
    }
    assert teardown.status == "UNSET"
    assert "supervised.teardown.requested" in teardown.event_names


def test_deadlines_are_told_without_a_teardown_where_nothing_was_left_to_tear_down(
    evening: Played,
) -> None:
    evening.assert_tree(
        """
        evening
          supervise evening failed ERROR
            child near timed_out ERROR
              near
            child far timed_out ERROR
            child limited timed_out ERROR
              limited
            child unneeded cancelled
              unneeded
        """,
        outcome=True,
    )


@pytest.mark.parametrize(
    ("name", "state", "source"),
    [
        ("near", "Cancelled", "deadline"),
        ("far", "Cancelled", "deadline"),
        ("limited", "TimedOut", None),  # the flow's own limit: nobody had to ask
    ],
)
def test_a_child_that_exceeds_its_deadline_is_an_error_of_that_type(
    evening: Played, name: str, state: str, source: str | None
) -> None:
    span = evening.span(f"child {name}")
    assert (span.status, span.outcome) == ("ERROR", "timed_out")
    assert span.attributes["error.type"] == "timeout"
    assert span.attributes["prefect.state.name"] == state
    assert span.attributes.get("supervised.cancel.source") == source


@pytest.mark.parametrize(("name", "limit"), [("near", "1"), ("far", "1"), ("limited", "2.5")])
def test_the_status_of_an_exceeded_deadline_says_which_it_was(
    evening: Played, name: str, limit: str
) -> None:
    assert f"{limit} s" in evening.span(f"child {name}").description


def test_a_child_cancelled_by_its_handle_is_no_error(evening: Played) -> None:
    unneeded = evening.span("child unneeded")
    assert (unneeded.status, unneeded.outcome) == ("UNSET", "cancelled")
    assert "error.type" not in unneeded.attributes
    assert unneeded.attributes["supervised.cancel.source"] == "explicit"
    assert unneeded.links == ()


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("scenario", ["day", "night", "evening", "storm", "noon"])
def test_an_event_of_a_child_happens_once(scenario: str, request: pytest.FixtureRequest) -> None:
    played = request.getfixturevalue(scenario)
    for name in played.report["children"]:
        names = played.span(f"child {name}").event_names
        assert len(names) == len(set(names)), name


def test_of_a_killed_child_its_parent_alone_tells(storm: Played) -> None:
    """All spans of a killed process are lost with it."""
    storm.assert_tree(
        """
        storm
          supervise storm failed ERROR
            child killed crashed ERROR
            child wrong failed ERROR
              wrong
                leaf work
        """,
        outcome=True,
    )
    killed = storm.span("child killed")
    assert killed.attributes["error.type"] == "prefect.Crashed"
    assert killed.attributes["prefect.state.type"] == "CRASHED"
    assert "-9" in killed.description


def test_a_failure_that_stayed_in_another_process_has_prefects_state_for_its_type(
    storm: Played,
) -> None:
    wrong = storm.span("child wrong")
    assert wrong.attributes["error.type"] == "prefect.Failed"
    assert "no time is left" in wrong.description


# -- metrics ------------------------------------------------------------------------------------


def last(played: Played, name: str) -> list[Point]:
    """The last point of each series that the scenario's own process exported."""
    series = {}
    for point in played.otlp.points(name, played.process):
        series[tuple(sorted(point.attributes.items()))] = point
    return list(series.values())


def test_the_duration_of_children_arrives_by_kind_flow_and_outcome(night: Played) -> None:
    points = last(night, "supervised.child.duration")
    assert {tuple(sorted(point.attributes.values())): point.value for point in points} == {
        ("ValueError", "bad", "failed", "inline"): 1,
        ("cancelled", "endless", "inline"): 1,
        ("cancelled", "deployment", "leaf"): 1,
    }
    assert {point.unit for point in points} == {"s"}
    assert {(point.bounds[0], point.bounds[-1]) for point in points} == {(0.1, 86400)}


def test_active_children_are_counted_while_they_live(night: Played) -> None:
    points = night.otlp.points("supervised.child.active", night.process)
    by_kind = {"inline": [], "deployment": []}
    for point in points:
        by_kind[point.attributes["supervised.child.kind"]].append(point.value)
    assert max(by_kind["inline"]) == 2
    assert max(by_kind["deployment"]) == 1
    assert (by_kind["inline"][-1], by_kind["deployment"][-1]) == (0, 0)
    assert {point.unit for point in points} == {"{child}"}


def test_the_duration_of_a_teardown_arrives_by_its_source_and_outcome(night: Played) -> None:
    (point,) = last(night, "supervised.teardown.duration")
    assert (point.value, point.unit) == (1, "s")
    assert point.attributes == {
        "supervised.cancel.source": "sibling_failed",
        "supervised.outcome": "completed",
    }


def test_without_a_teardown_none_is_measured(day: Played) -> None:
    assert last(day, "supervised.teardown.duration") == []


# -- other people's settings --------------------------------------------------------------------


def test_with_prefects_telemetry_off_a_process_is_one_trace(stage: Stage) -> None:
    """Then nobody but us can put a child's own spans below the child."""
    stage.play("noon", **DARK).assert_tree(
        """
        supervise noon
          child waiting
          child extract
            extract work
          child mid
            supervise mid
              child step
                extract work
            mid work
        """
    )


def test_with_prefects_telemetry_off_processes_are_one_trace(
    stage: Stage, client: SyncPrefectClient
) -> None:
    with stage.serving("untraced", client, **DARK):
        stage.play("dusk", **DARK).assert_tree(
            """
            supervise dusk
              child load
                supervise mid
                  child step
                    extract work
                mid work
            """
        )


def test_runs_carry_w3c_traceparents_whatever_the_global_propagator(stage: Stage) -> None:
    played = stage.play("noon", TRACED_B3="1")
    for name in ("extract", "mid", "waiting"):
        child = played.span(f"child {name}")
        assert child.parent_id == played.span("supervise noon").span_id
        traceparent = played.child(name)["labels"][LABEL]
        assert traceparent.split("-")[:3] == ["00", child.trace_id, child.span_id]


def test_our_own_spans_are_one_trace_whatever_the_global_propagator(stage: Stage) -> None:
    played = stage.play("noon", TRACED_B3="1", **DARK)
    ours = played.otlp.spans(played.trace_id, scope="supervised")
    assert {span.name for span in ours} == {
        "supervise noon",
        "child waiting",
        "child extract",
        "child mid",
        "supervise mid",
        "child step",
    }


def test_without_an_sdk_none_is_imported_and_no_run_carries_a_place_in_a_trace(
    stage: Stage, client: SyncPrefectClient
) -> None:
    played = stage.play("noon", traced=False)
    assert not played.report["has_sdk"]
    outcomes = {name: played.child(name)["outcome"] for name in ("extract", "mid", "waiting")}
    assert outcomes == {"extract": "completed", "mid": "completed", "waiting": "cancelled"}
    for child in played.report["children"].values():
        assert LABEL not in child["labels"]
        assert LABEL not in client.read_flow_run(child["run"]).labels


def test_a_disabled_sdk_changes_nothing_but_the_silence(stage: Stage) -> None:
    played = stage.play("noon", OTEL_SDK_DISABLED="true")
    outcomes = {name: child["outcome"] for name, child in played.report["children"].items()}
    assert outcomes == {"extract": "completed", "mid": "completed", "waiting": "cancelled"}
    assert all(LABEL not in child["labels"] for child in played.report["children"].values())
    assert played.otlp.trace_of(played.run) is None


def test_an_endpoint_that_nobody_answers_changes_no_outcome(stage: Stage) -> None:
    nowhere = "http://127.0.0.1:9"
    played = stage.play(
        "noon",
        OTEL_EXPORTER_OTLP_ENDPOINT=nowhere,
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
    )
    outcomes = {name: child["outcome"] for name, child in played.report["children"].items()}
    assert outcomes == {"extract": "completed", "mid": "completed", "waiting": "cancelled"}
