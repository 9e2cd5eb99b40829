"""How far it goes: `python benchmarks/scale.py [--backend sqlite] [--fan-out 1000] [--servers 4]`.

A model of trees of 10 to 1,000,000 runs: what launching, waiting and cancelling take, how many
requests they make, and what they keep in memory. The tree has as many levels as it needs for no
parent to have more than `--fan-out` children, and each of its parents is supervised. The rates are
those that the other benchmarks have measured, docs/benchmarks/results.json; each is an option, to
be replaced by your own. For each figure the model names the size at which it is no longer
comfortable, and the cause.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "results.json"
SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
POLL_SECONDS = 10.0  # supervised/_watch.py, while events flow: at least
POLL_SHARE = 0.05  # and so long that reading takes no more of a server's time
LEASE_TURNS = 4  # in a term, of who renews a lease and who reads it: supervised/_lease.py
PAGE = 200
CREATE = 100
CANCEL = 50
WIDEST = 8  # requests for cancellation under way at a time: supervised/_pace.py
MIB = 2.0**20
SECONDS = {"create", "cancel", "read", "request", "look", "cpu"}  # rates that are times


@attrs.frozen(kw_only=True)
class Rates:
    """What one API server needs, in seconds, and what parents need, in seconds and bytes.

    Args:
        create: To create a child in bulk, its tracking task run included.
        cancel: To set a run to `Cancelling`, in bulk.
        read: To read a run, in a page of 200.
        request: To answer a request that asks for next to nothing.
        look: To see whether the parent of a live child has been cancelled.
        cpu: CPU that a parent needs for a child, from its spawn to its end.
        live: Bytes that a live child takes in its parent.
        finished: Bytes that a finished one takes.
        fan_out: Children of a parent, at most; what is above has as many.
        servers: How many API servers there are. The database is taken to keep up with them.
        requests_per_minute: What the API allows; `None` for no limit.
        lease_seconds: After how long a supervised child takes a silent parent for dead.
        supervised_leaves: Whether the leaves are supervised, too (1), or plain (0).
        look_seconds: How often the server looks at all live children of its own accord
            (`PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS`).
    """

    create: float
    cancel: float
    read: float
    request: float
    look: float
    cpu: float
    live: int
    finished: int
    fan_out: int = 1_000_000
    servers: int = 1
    requests_per_minute: int | None = None
    lease_seconds: int = 30
    supervised_leaves: int = 0
    look_seconds: int = 20


def measured(backend: str) -> Rates:
    """Return the medians of what the benchmarks have measured."""
    results = json.loads(RESULTS.read_text())

    def median(benchmark: str, key: str, *, of: str, each: str | None = None) -> float:
        return statistics.median(
            row[key] / (row[each] if each else 1)
            for row in results[benchmark]["rows"]
            if key in row and row["database"] == backend and row["contender"] == of
        )

    growth = results["growth"]["rows"]
    largest = max(row["children"] for row in growth if "children" in row)

    def cpu(step: str) -> float:
        found = (row for row in growth if row.get("children") == largest and row["collector"])
        return statistics.median(row[step] for row in found if step in row)

    def weighed(of: str) -> int:
        return next(row["bytes"] for row in growth if row.get("of") == of)

    return Rates(
        create=median("launch", "seconds", of="supervised", each="made"),
        cancel=median("sweep", "seconds", of="supervised", each="runs"),
        read=median("sweep", "reading", of="floor", each="runs"),
        request=median("sweep", "request", of="floor"),
        look=median("sweep", "seconds", of="the server's own look", each="runs"),
        cpu=cpu("launch") + cpu("finish"),
        live=weighed("live"),
        finished=weighed("finished"),
    )


@attrs.frozen
class Estimate:
    """One figure at one size, and what sets it."""

    value: float
    cause: str


def main() -> int:
    options = arguments()
    rates = rates_of(options)
    rows = [{"runs": size, **figures(rates, size)} for size in SIZES]
    knees = {name: knee(rates, name) for name in COMFORTABLE}
    if options.json:
        report = {"rates": attrs.asdict(rates), "rows": rows, "knees": knees}
        json.dump(report, sys.stdout, indent=2, default=attrs.asdict)
    elif options.markdown:
        print("\n".join(markdown(rows, knees)))
    else:
        show(rates, rows, knees)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--markdown", action="store_true", help="as docs/explanation/scale.md has it"
    )
    for field in attrs.fields(Rates):
        kind = float if field.name in SECONDS else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind)
    return parser.parse_args()


def rates_of(options: argparse.Namespace) -> Rates:
    given = {field.name: getattr(options, field.name) for field in attrs.fields(Rates)}
    chosen = {name: value for name, value in given.items() if value is not None}
    return attrs.evolve(measured(options.backend), **chosen)


# -- the model ------------------------------------------------------------------------------------


def figures(rates: Rates, size: int) -> dict[str, object]:
    """Return everything about a tree of one size."""
    return {name: figure(rates, size) for name, figure in FIGURES.items()} | {
        "launch requests": requests_to_launch(rates, size),
        "teardown requests": requests_to_cancel(size),
        "a minute of waiting": requests_to_wait(rates, size),
    }


def pages(count: int, page: int = PAGE) -> int:
    return math.ceil(count / page)


def levels(rates: Rates, size: int) -> list[int]:
    """Return how many runs there are on each level below the root, the leaves last."""
    found = [size]
    while found[0] > rates.fan_out:
        found.insert(0, math.ceil(found[0] / rates.fan_out))
    return found


def parents(rates: Rates, size: int) -> int:
    return 1 + sum(levels(rates, size)[:-1])


def all_children(rates: Rates, size: int) -> int:
    """Return how many children all parents have."""
    return sum(levels(rates, size))


def watching(rates: Rates, size: int) -> int:
    """Return how many supervised children watch what is above them."""
    above_leaves = parents(rates, size) - 1
    return above_leaves + (size if rates.supervised_leaves else 0)


def requests_to_launch(rates: Rates, size: int) -> int:
    """A batch: its events, some four looks at what they have led to, the runs, and a read."""
    return pages(size, min(CREATE, rates.fan_out)) * (1 + 4 + 1 + 1)


def requests_to_cancel(size: int) -> int:
    """The requests, a search by tag and by link, and two reads of every end: heard of, and last."""
    return pages(size, CANCEL) + 4 * pages(size)


def requests_to_wait(rates: Rates, size: int) -> int:
    """What all parents read of their children in a minute, and all children of what is above."""
    above = parents(rates, size)
    reads = above * pages(math.ceil(all_children(rates, size) / above) + 1)
    return round(60 / wait(rates, size).value * reads + 60 * signs_of_life(rates, size))


def signs_of_life(rates: Rates, size: int) -> float:
    """Requests in a second: every parent renews its lease, every supervised child reads one."""
    asking = parents(rates, size) + watching(rates, size)
    return asking * LEASE_TURNS / rates.lease_seconds


def longest(rates: Rates, requests: float, *others: Estimate) -> Estimate:
    """Return what takes longest: one of others, or what the API allows in a minute."""
    allowed = requests / rates.requests_per_minute * 60 if rates.requests_per_minute else 0.0
    found = (*others, Estimate(allowed, "requests a minute"))
    return max(found, key=lambda each: each.value)


def launch(rates: Rates, size: int) -> Estimate:
    """Seconds until every run exists.

    One parent is taken to keep one server busy, though it may have two requests under way.
    """
    by_one_server = max(size / rates.servers, min(size, rates.fan_out))
    server = Estimate(by_one_server * rates.create, "the CPU of the API servers")
    own = len(levels(rates, size)) * min(size, rates.fan_out) * rates.cpu
    parent = Estimate(own, "the CPU of a parent")
    return longest(rates, requests_to_launch(rates, size), server, parent)


def teardown(rates: Rates, size: int) -> Estimate:
    """Seconds until every run has been asked to end, and each end was read."""
    asking = size * rates.cancel / min(rates.servers, WIDEST)
    server = Estimate(asking + 4 * size * rates.read, "the CPU of the API servers")
    parent = Estimate(size * rates.cpu, "the CPU of the root's process")
    return longest(rates, requests_to_cancel(size), server, parent)


def wait(rates: Rates, size: int) -> Estimate:
    """Seconds between two reads of all children of a parent, which find what no event has told."""
    children = min(size, rates.fan_out)
    needed = children * rates.read / POLL_SHARE
    if rates.requests_per_minute:
        allowed = pages(children + 1) / (rates.requests_per_minute * POLL_SHARE) * 60
        if allowed > max(needed, POLL_SECONDS):
            return Estimate(allowed, "requests a minute")
    return Estimate(max(needed, POLL_SECONDS), "reading every run, a page of 200 at a time")


def share(rates: Rates, size: int) -> Estimate:
    """Per cent of the API servers' time that waiting takes."""
    reading = all_children(rates, size) * rates.read / wait(rates, size).value
    leases = signs_of_life(rates, size) * rates.request
    cause = "leases, which parents renew and children read" if leases > reading else "reading"
    return Estimate(100 * (reading + leases) / rates.servers, cause)


def own_look(rates: Rates, size: int) -> Estimate:
    """Per cent of its time that the server looks at live children of its own accord.

    However many servers there are: whether they share that has not been measured.
    """
    busy = sum(levels(rates, size)) * rates.look / rates.look_seconds
    return Estimate(100 * busy, "looking at every live child")


def memory(rates: Rates, size: int) -> Estimate:
    """MiB in the parent that has most children, while they live."""
    return Estimate(min(size, rates.fan_out) * rates.live / MIB, "the handles of live children")


def kept(rates: Rates, size: int) -> Estimate:
    """MiB in that parent when all have ended and nobody holds their handles."""
    return Estimate(min(size, rates.fan_out) * rates.finished / MIB, "what is kept of each")


def held(rates: Rates, size: int) -> Estimate:
    """MiB in the root's process while it ends the whole tree, every run of which it knows then."""
    return Estimate(size * rates.live / MIB, "a teardown that knows every run")


FIGURES: dict[str, Callable[[Rates, int], Estimate]] = {
    "launch": launch,
    "read again": wait,
    "servers' time": share,
    "own look": own_look,
    "teardown": teardown,
    "live": memory,
    "ended": kept,
    "in teardown": held,
}
UNITS = {
    "launch": "s",
    "read again": "s",
    "servers' time": "%",
    "own look": "%",
    "teardown": "s",
    "live": "MiB",
    "ended": "MiB",
    "in teardown": "MiB",
}
COMFORTABLE = {
    "launch": 60.0,
    "read again": 30.0,
    "servers' time": 25.0,
    "own look": 100.0,
    "teardown": 20.0,
    "live": 4096.0,
    "ended": 4096.0,
    "in teardown": 4096.0,
}


def knee(rates: Rates, name: str) -> dict[str, object] | None:
    """Return the size beyond which a figure is no longer comfortable, and why; `None` if none."""
    low, high = 1, 10**9
    if FIGURES[name](rates, high).value <= COMFORTABLE[name]:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if FIGURES[name](rates, middle).value <= COMFORTABLE[name]:
            low = middle
        else:
            high = middle - 1
    return {"runs": low, "limit": COMFORTABLE[name], "cause": FIGURES[name](rates, low + 1).cause}


# -- for people -----------------------------------------------------------------------------------


COLUMNS = ["runs", *FIGURES, "launch requests", "teardown requests", "a minute of waiting"]


def heads() -> list[str]:
    return [f"{name} ({UNITS[name]})" if name in UNITS else name for name in COLUMNS]


def show(rates: Rates, rows: list[dict[str, object]], knees: dict[str, Any]) -> None:
    console = Console(width=140)
    table = Table(title=str(rates), title_justify="left")
    for name in heads():
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(cell(row[name]) for name in COLUMNS))
    console.print(table)
    for name, found in knees.items():
        console.print(f"{name}: {told(name, found)}")


def markdown(rows: list[dict[str, object]], knees: dict[str, Any]) -> Iterator[str]:
    yield f"| {' | '.join(heads())} |"
    yield "|---" * len(COLUMNS) + "|"
    for row in rows:
        yield f"| {' | '.join(cell(row[name]) for name in COLUMNS)} |"
    yield ""
    yield "| figure | its knee |"
    yield "|---|---|"
    for name, found in knees.items():
        yield f"| {name} | {told(name, found)} |"


def told(name: str, knee: dict[str, Any] | None) -> str:
    limit = f"{COMFORTABLE[name]:,.0f} {UNITS[name]}"
    if knee is None:
        return f"never more than {limit}"
    return f"{knee['runs']:,} runs ({limit}); beyond, because of {knee['cause']}"


def cell(value: object) -> str:
    number = value.value if isinstance(value, Estimate) else value
    return f"{number:,.0f}" if number >= 10 or isinstance(number, int) else f"{number:.2g}"


if __name__ == "__main__":
    sys.exit(main())
