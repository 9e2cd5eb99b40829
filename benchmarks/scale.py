"""How far it goes: `python benchmarks/scale.py [--backend sqlite] [--requests-per-minute 1250]`.

A model of trees of 10 to 1,000,000 runs: what launching, waiting and cancelling take, how many
requests they make, and what the parent keeps in memory. The rates are those that the other
benchmarks have measured, docs/benchmarks/results.json; each is an option, to be replaced by your
own. For each figure the model names the size at which it is no longer comfortable, and the cause.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "results.json"
SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
POLL_SECONDS = 10.0  # supervised/_watch.py, while events flow: at least
POLL_SHARE = 0.05  # and so long that reading takes no more of a server's time
PAGE = 200
CREATE = 100
CANCEL = 50
COMFORTABLE = {"launch": 60.0, "wait": 30.0, "teardown": 20.0, "memory": 4.0, "kept": 4.0}


@attrs.frozen(kw_only=True)
class Rates:
    """What one API server needs, in seconds, and what one parent holds, in bytes.

    Args:
        create: To create a child in bulk, its tracking task run included.
        cancel: To set a run to `Cancelling`, in bulk.
        read: To read a run, in a page of 200.
        servers: How many API servers there are. The database is taken to keep up with them.
        requests_per_minute: What the API allows; `None` for no limit.
        live: What a live child takes in the parent.
        finished: What a finished one takes.
    """

    create: float
    cancel: float
    read: float
    live: int
    finished: int
    servers: int = 1
    requests_per_minute: int | None = None


def measured(backend: str) -> Rates:
    """Return the medians of what the benchmarks have measured."""
    results = json.loads(RESULTS.read_text())

    def median(benchmark: str, key: str, *, each: str | None = None) -> float:
        return statistics.median(
            row[key] / (row[each] if each else 1)
            for row in results[benchmark]["rows"]
            if key in row
            and row.get("database", backend) == backend
            and row.get("contender", "floor") == "floor"
        )

    return Rates(
        create=median("launch", "seconds", each="made"),
        cancel=median("sweep", "seconds", each="runs"),
        read=median("sweep", "reading", each="runs"),
        live=round(median("growth", "bytes of a live child")),
        finished=round(median("growth", "bytes of a finished child")),
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
    else:
        show(rates, rows, knees)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--json", action="store_true")
    for field in attrs.fields(Rates):
        kind = float if field.name in {"create", "cancel", "read"} else int
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
        "launch requests": requests_to_launch(size),
        "teardown requests": requests_to_cancel(size),
        "wait requests": round(60 / wait(rates, size).value * pages(size + 1)),
    }


def pages(count: int, page: int = PAGE) -> int:
    return math.ceil(count / page)


def requests_to_launch(size: int) -> int:
    """Events, about five looks at what they have led to, the runs, and a read of them."""
    return pages(size, CREATE) * (1 + 5 + 1 + 1)


def requests_to_cancel(size: int) -> int:
    """The requests, and the search of the tree by tag and by link."""
    return pages(size, CANCEL) + 2 * pages(size)


def longest(server: float, requests: float, rates: Rates) -> Estimate:
    """Return what takes longer: the server's work, or what the API allows."""
    budget = requests / rates.requests_per_minute * 60 if rates.requests_per_minute else 0.0
    if budget > server:
        return Estimate(budget, "requests a minute")
    return Estimate(server, "the CPU of the API servers")


def launch(rates: Rates, size: int) -> Estimate:
    """Seconds until every child has a run. One bulk request is worked on by one server."""
    return longest(size * rates.create / rates.servers, requests_to_launch(size), rates)


def teardown(rates: Rates, size: int) -> Estimate:
    """Seconds until every run has been asked to end."""
    server = size * (rates.cancel + 2 * rates.read) / rates.servers
    return longest(server, requests_to_cancel(size), rates)


def wait(rates: Rates, size: int) -> Estimate:
    """Seconds between two reads of every run, which find what no event has told of."""
    needed = size * rates.read / POLL_SHARE
    if rates.requests_per_minute:
        allowed = pages(size + 1) / (rates.requests_per_minute * POLL_SHARE) * 60
        if allowed > max(needed, POLL_SECONDS):
            return Estimate(allowed, "requests a minute")
    return Estimate(max(needed, POLL_SECONDS), "reading every run, a page of 200 at a time")


def memory(rates: Rates, size: int) -> Estimate:
    """GiB in the parent while all children live."""
    return Estimate(size * rates.live / 2**30, "the handles of live children")


def kept(rates: Rates, size: int) -> Estimate:
    """GiB in the parent when all children have completed and nobody holds their handles."""
    return Estimate(size * rates.finished / 2**30, "what is kept of finished children")


FIGURES: dict[str, Callable[[Rates, int], Estimate]] = {
    "launch": launch,
    "wait": wait,
    "teardown": teardown,
    "memory": memory,
    "kept": kept,
}


def knee(rates: Rates, name: str) -> dict[str, object]:
    """Return the size beyond which a figure is no longer comfortable, and why."""
    low, high = 1, 10**9
    while low < high:
        middle = (low + high + 1) // 2
        if FIGURES[name](rates, middle).value <= COMFORTABLE[name]:
            low = middle
        else:
            high = middle - 1
    return {"runs": low, "limit": COMFORTABLE[name], "cause": FIGURES[name](rates, low + 1).cause}


# -- for people -----------------------------------------------------------------------------------

UNITS = {"launch": "s", "wait": "s", "teardown": "s", "memory": "GiB", "kept": "GiB"}


def show(rates: Rates, rows: list[dict[str, object]], knees: dict[str, dict[str, object]]) -> None:
    console = Console(width=120)
    table = Table(title=str(rates), title_justify="left")
    names = ["runs", *FIGURES, "launch requests", "teardown requests", "wait requests"]
    for name in names:
        table.add_column(f"{name} ({UNITS[name]})" if name in UNITS else name, justify="right")
    for row in rows:
        table.add_row(*(cell(row[name]) for name in names))
    console.print(table)
    for name, found in knees.items():
        console.print(
            f"{name}: comfortable up to {found['runs']:,} runs "
            f"({found['limit']:g} {UNITS[name]}); then {found['cause']} is what limits it"
        )


def cell(value: object) -> str:
    number = value.value if isinstance(value, Estimate) else value
    return f"{number:,.0f}" if number >= 10 or isinstance(number, int) else f"{number:.2g}"


if __name__ == "__main__":
    sys.exit(main())
