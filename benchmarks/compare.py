"""Everything in one run: `python benchmarks/compare.py [--quick]`; about an hour and a half.

Runs the benchmarks that compare plain Prefect, the forum's recipe, ours and the server's floor, one
after another, and writes docs/benchmarks/results.json, the plot beside it, and docs/benchmarks.md.
`--render` only writes the page anew from the results that are there.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import matplotlib as mpl
import prefect
from stage import find_binaries

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SCRIPTS = {
    "cascade": [],
    "launch": [],
    "sweep": [],
    "noticing": [],
    "waiting": [],
    "overhead": [],
    "growth": [],
    "gains": [],
}
QUICK = {
    "cascade": ["--shapes", "8 leaves", "--repetitions", "1"],
    "launch": ["--repetitions", "1", "--children", "50"],
    "sweep": ["--repetitions", "1", "--runs", "100"],
    "noticing": ["--children", "3"],
    "waiting": ["--minutes", "0.5"],
    "overhead": ["--flows", "10"],
    "growth": ["--children", "10", "100", "--repetitions", "1", "--memory", "100"],
    "gains": ["--children", "20"],
}
REPEATED = {"cascade", "launch", "sweep", "growth"}
Row = Mapping[str, Any]


def main() -> int:
    options = arguments()
    docs = HERE / "quick" if options.quick else DOCS
    path = docs / "benchmarks" / "results.json"
    if not options.render:
        results = json.loads(path.read_text()) if path.exists() else {}
        for name in options.only:
            sys.stderr.write(f"== {name}\n")
            extra = QUICK[name] if options.quick else SCRIPTS[name]
            if options.repetitions and name in REPEATED:
                extra = [*extra, "--repetitions", str(options.repetitions)]
            results[name] = {"when": today(), "machine": machine(), "rows": run(name, extra)}
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    plot(results, path.with_name("cascade.svg"))
    (docs / "benchmarks.md").write_text(page(results))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument(
        "--quick", action="store_true", help="whether it works, in benchmarks/quick"
    )
    parser.add_argument("--repetitions", type=int, help="fewer or more of them than by default")
    parser.add_argument("--render", action="store_true")
    return parser.parse_args()


def run(name: str, extra: list[str]) -> list[Row]:
    """Run one benchmark; what it says while it works goes to its log."""
    log = HERE / f"{name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), *extra],
            stdout=subprocess.PIPE,
            stderr=output,
            check=True,
        )
    log.unlink()
    rows: list[Row] = json.loads(done.stdout[done.stdout.index(b"[\n") :])
    return rows


def today() -> str:
    return dt.datetime.now(dt.timezone.utc).date().isoformat()


def machine() -> str:
    return ", ".join(
        [
            f"{os.cpu_count()} cores",
            platform.system(),
            f"Python {platform.python_version()}",
            f"Prefect {prefect.__version__}",
            f"SQLite {sqlite3.sqlite_version}",
            *postgresql(),
        ]
    )


def postgresql() -> list[str]:
    """Return what PostgreSQL says of itself, if there is one."""
    if (binaries := find_binaries()) is None:
        return []
    said = subprocess.run([binaries / "postgres", "--version"], capture_output=True, check=True)
    return [f"PostgreSQL {said.stdout.decode().split()[2]}"]


# -- the figures ----------------------------------------------------------------------------------


@attrs.frozen
class Figure:
    """One line of the table.

    Args:
        what: What is measured.
        of: The benchmark.
        top: Which of its values is divided.
        bottom: By which.
        target: What the ratio is to be.
    """

    what: str
    of: str
    top: Callable[[Row], float | None]
    bottom: Callable[[Row], float | None]
    target: str


def values(key: str, **wanted: Any) -> Callable[[Row], float | None]:
    """Return what picks a value from the rows that are meant."""

    def pick(row: Row) -> float | None:
        if any(row.get(name) != value for name, value in wanted.items()):
            return None
        found = row.get(key)
        return float(row["given up"]) if found is None and "given up" in row else found

    return pick


def cascade(
    contender: str, shape: str, what: str = "children gone"
) -> Callable[[Row], float | None]:
    return values(what, contender=contender, shape=shape)


LEAVES, LEVELS = "8 leaves", "3 levels, 13 runs"
CHAINS = ("1 level", "2 levels", "3 levels")  # one child each
RECIPE = {LEAVES: ">= 3", LEVELS: ">= 7"} | dict(zip(CHAINS, (">= 3", ">= 5", ">= 7"), strict=True))
# The root's own process stays until every child is over, and reports.
ENDS = {"children gone": "last child's process gone", "all gone": "the root's process gone too"}
FIGURES = [
    *(
        Figure(
            f"{shape}, root cancelled: {told}, plain / ours",
            "cascade",
            cascade("plain Prefect", shape, what),
            cascade("supervised", shape, what),
            target,
        )
        for shape, target in (
            (LEAVES, ">= 15 (SQLite), >= 4 (PostgreSQL)"),
            (LEVELS, ">= 20, >= 8"),
        )
        for what, told in ENDS.items()
    ),
    *(
        Figure(
            f"{shape}: {told}, the recipe / ours",
            "cascade",
            cascade("recipe", shape, what),
            cascade("supervised", shape, what),
            target,
        )
        for shape, target in RECIPE.items()
        for what, told in ENDS.items()
    ),
    *(
        Figure(
            f"{shape}: last child's process gone, the recipe / floor",
            "cascade",
            cascade("recipe", shape),
            cascade("floor", shape),
            "",
        )
        for shape in RECIPE
    ),
    *(
        Figure(
            f"3 levels / 1 level, one child each: last child's process gone, {contender}",
            "cascade",
            cascade(contender, "3 levels"),
            cascade(contender, "1 level"),
            target,
        )
        for contender, target in (("supervised", "flat"), ("floor", ""), ("recipe", ""))
    ),
    *(
        Figure(
            f"{shape}: {told}, ours / floor",
            "cascade",
            cascade("supervised", shape, what),
            cascade("floor", shape, what),
            "<= 2",
        )
        for shape in (LEAVES, LEVELS, *CHAINS)
        for what, told in ENDS.items()
    ),
    *(
        Figure(
            f"500 live runs cancelled on the server, ours / {floor}",
            "sweep",
            values("seconds", contender="supervised"),
            values("seconds", contender=floor),
            "<= 1.15",
        )
        for floor in ("floor", "floor, 4 at a time")
    ),
    Figure(
        "requests of a parent while 200 plain children run for 10 minutes, plain / ours",
        "waiting",
        values("requests", contender="plain Prefect"),
        values("requests", contender="supervised"),
        ">= 100",
    ),
    Figure(
        "launching 200 deployed children: time, ours / `gather(arun_deployment)`",
        "launch",
        values("seconds", contender="supervised"),
        values("seconds", contender="plain Prefect"),
        "<= 0.5",
    ),
    Figure(
        "the same: requests",
        "launch",
        values("requests", contender="supervised"),
        values("requests", contender="plain Prefect"),
        "<= 0.1",
    ),
    *(
        Figure(
            f"the same: time, ours / {floor}",
            "launch",
            values("seconds", contender="supervised"),
            values("seconds", contender=floor),
            "<= 1.2",
        )
        for floor in ("floor", "floor, 2 at a time")
    ),
    *(
        Figure(
            f"the same: time, {floor} / `gather(arun_deployment)`",
            "launch",
            values("seconds", contender=floor),
            values("seconds", contender="plain Prefect"),
            "",
        )
        for floor in ("floor", "floor, 2 at a time")
    ),
    *(
        Figure(
            f"a flow without spawn, supervised / plain: {what}",
            "overhead",
            values(what, figure="no spawn", contender="supervised"),
            values(what, figure="no spawn", contender="plain Prefect"),
            target,
        )
        for what, target in (("seconds", "<= 1.01"), ("requests", "1"), ("threads", "1"))
    ),
    Figure(
        "from the call to the body of an inline child, ours / plain",
        "overhead",
        values("seconds", figure="inline", contender="supervised"),
        values("seconds", figure="inline", contender="plain Prefect"),
        "<= 1.05",
    ),
]


def medians(rows: Iterable[Row], pick: Callable[[Row], float | None]) -> list[float]:
    return [value for value in map(pick, rows) if value is not None]


def divided(top: list[float], bottom: list[float]) -> float:
    """Return the median of the ratios, one of each repetition if there are as many of both."""
    if len(top) == len(bottom):
        return statistics.median(over / below for over, below in zip(top, bottom, strict=True))
    return statistics.median(top) / statistics.median(bottom)


def told(found: list[float]) -> str:
    """Return a median and the range, for people."""
    middle = statistics.median(found)
    if len(found) == 1 or max(found) == min(found):
        return f"{middle:,.3g}" if middle < 1000 else f"{middle:,.0f}"
    return f"{middle:.3g} ({min(found):.3g} to {max(found):.3g})"


# -- the page -------------------------------------------------------------------------------------


def page(results: Mapping[str, Any]) -> str:
    lines = [INTRODUCTION]
    if "cascade" in results:
        lines += [PICTURE, ""]
    lines += ["| figure | database | above the line | below it | ratio | target |"]
    lines += ["|---|---|---|---|---|---|"]
    for figure in FIGURES:
        rows = results.get(figure.of, {}).get("rows", [])
        for database in ("sqlite", "postgresql"):
            here = [row for row in rows if row.get("database") == database]
            top, bottom = medians(here, figure.top), medians(here, figure.bottom)
            if top and bottom:
                ratio = divided(top, bottom)
                cells = [figure.what, NAMES[database], told(top), told(bottom)]
                lines.append(f"| {' | '.join([*cells, f'**{ratio:.3g}**', figure.target])} |")
    lines += [
        "",
        *refused(results),
        *noticing(results),
        "",
        *imports(results),
        "",
        *growth(results),
        "",
        *gains(results),
        "",
        *provenance(results),
        "",
    ]
    return "\n".join(lines)


NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
INTRODUCTION = """# Benchmarks

How supervised trees compare with plain Prefect, with the forum's recipe (a hook on every level that
cancels the next), and with the floor: the same work, asked of the same server in the best known
way. Each ratio is from one script, in which the contenders take turns: the median of the ratios of
its repetitions, where both were repeated as often. Seconds and counts are medians, with the range
in brackets if something was measured more than once. "8 leaves" is a root with eight children; "3
levels, 13 runs" one with three, and three below each; "1 level" to "3 levels" are one child below
the other. While launches, cancelling 500 runs and overhead are measured, the server does not look
every 20 s whether the parents of live children have been cancelled ([Scale](explanation/scale.md)).
Ours checks parameters against the deployment's schema before it sends them, so that the server need
not; the floor, which sends what fits, has the server not check either.

Everything here is written by `python benchmarks/compare.py`, which can measure one benchmark at a
time, so the dates may differ; what has been added to a run, or measured under other conditions, is
told at the end. A figure that misses its target stays. Where the recipe is compared on the wide
trees, and where the time is not to grow with the depth, the target is beyond what this machine
allows: the floor, which cancels all runs by one request, misses it as well. A supervised child that
waits makes eight requests a minute of its own, which the parent's do not include.
"""
PICTURE = "![Seconds until the last process is gone](benchmarks/cascade.svg)"


def refused(results: Mapping[str, Any]) -> list[str]:
    """Tell of launches that did not launch all: their time is one for less."""
    return [
        f"{row['contender']} on {NAMES[row['database']]} has launched {row['made']} of "
        f"{row['asked for']} in {row['seconds']:.3g} s; the others failed.\n"
        for row in results.get("launch", {}).get("rows", [])
        if row["made"] < row["asked for"]
    ]


def noticing(results: Mapping[str, Any]) -> list[str]:
    lines = ["## From a child's end to the return of `await child`", ""]
    lines += ["| database | | seconds |", "|---|---|---|"]
    for row in results.get("noticing", {}).get("rows", []):
        lines.append(f"| {NAMES[row['database']]} | {row['contender']} | {told(row['seconds'])} |")
    return [*lines, "", "Targets: 0.3 s with events, 2 s without (medians)."]


def imports(results: Mapping[str, Any]) -> list[str]:
    rows = results.get("overhead", {}).get("rows", [])
    found = [row for row in rows if row["figure"] == "import"]
    lines = ["## Importing it", "", "| | seconds | of them ours (ms) |", "|---|---|---|"]
    for name in dict.fromkeys(row["contender"] for row in found):
        of_it = [row for row in found if row["contender"] == name]
        ours = [1e3 * row["ours"] for row in of_it if "ours" in row]
        whole = told([row["seconds"] for row in of_it])
        lines.append(f"| `{name}` | {whole} | {told(ours) if ours else ''} |")
    target = "Target: `import supervised` adds nothing that can be measured to `import prefect`."
    return [*lines, "", target, "", *spans(rows)]


def spans(rows: Iterable[Row]) -> list[str]:
    lines = [
        "## What a span costs",
        "",
        "| | without an SDK (µs) | with one (µs) |",
        "|---|---|---|",
    ]
    found = [row for row in rows if row["figure"] == "span"]
    for name in dict.fromkeys(row["contender"] for row in found):
        cells = [
            told(
                [1e6 * each for each in medians(found, values("seconds", contender=name, sdk=sdk))]
            )
            for sdk in (False, True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def growth(results: Mapping[str, Any]) -> list[str]:
    lines = ["## What a child costs as the tree grows", ""]
    lines += ["CPU of the parent on a simulated server, in milliseconds a child:", ""]
    lines += ["| children | collector | launched | heard of the end | cancelled |"]
    lines += ["|---|---|---|---|---|"]
    rows = results.get("growth", {}).get("rows", [])
    sizes = sorted({(row["children"], row["collector"]) for row in rows if "children" in row})
    for children, collector in sorted(sizes, key=lambda size: (size[1], size[0])):
        here = [
            row
            for row in rows
            if (row.get("children"), row.get("collector")) == (children, collector)
        ]
        cells = [told([1000 * row[key] for row in here if key in row]) for key in COSTS]
        lines.append(f"| {children:,} | {'on' if collector else 'off'} | {' | '.join(cells)} |")
    for few, (collector, name) in itertools.product((10, 100), ((False, "off"), (True, "on"))):
        cells = [f"10,000 / {few}", name, *grown(rows, few, collector)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Target: 1.3 at most, from 10 to 10,000. Ten children share what a scope"]
    lines += ["costs by itself, a hundred hardly notice it. The collector looks through the"]
    lines += ["simulated server's objects, too, which no parent has."]
    weights = {row["of"]: row["bytes"] for row in rows if "of" in row}
    weighed = " and ".join(f"{each:,}" for each in {row["memory"] for row in rows if "of" in row})
    lines += ["", f"Bytes that a child takes in its parent, in a tree of {weighed}:", ""]
    lines += [f"| {' | '.join(weights)} |", "|" + "---|" * len(weights)]
    lines += [f"| {' | '.join(f'{weight:,}' for weight in weights.values())} |"]
    return [*lines, "", "Targets: 10,240 while it lives, and 1,024 afterwards."]


COSTS = ("launch", "finish", "cancel")


def grown(rows: Iterable[Row], size: int, collector: bool) -> list[str]:
    """Return how much more each step costs a child in a large tree than in a small one."""
    ratios = []
    for key in COSTS:
        few = medians(rows, values(key, children=size, collector=collector))
        many = medians(rows, values(key, children=10_000, collector=collector))
        both = few and many
        ratios.append(f"**{statistics.median(many) / statistics.median(few):.2g}**" if both else "")
    return ratios


def gains(results: Mapping[str, Any]) -> list[str]:
    rows = results.get("gains", {}).get("rows", [])
    if not rows:
        return []
    lines = ["## What each part gains", ""]
    lines += ["The same figure as it is, and with one part switched off (`benchmarks/gains.py`):"]
    lines += ["200 children are launched (many: 600), 400 cancelled, 2,000 weighed.", ""]
    lines += ["| part | figure | database | with | without | without / with |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        with_it, without = row["with"], row["without"]
        cells = [row["part"], row["figure"], NAMES.get(row["database"], "")]
        cells += [f"{told(found)} {row['unit']}" for found in (with_it, without)]
        ratio = statistics.median(without) / statistics.median(with_it)
        lines.append(f"| {' | '.join(cells)} | {ratio:.2g} |")
    return lines


def provenance(results: Mapping[str, Any]) -> list[str]:
    lines = ["## Where the figures are from", ""]
    for name, result in results.items():
        remark = f"; {result['remark']}" if "remark" in result else ""
        lines.append(f"- `benchmarks/{name}.py`, {result['when']}: {result['machine']}{remark}")
    return lines


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw how long trees live on, on a logarithmic scale."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "supervised"
    import matplotlib.pyplot as plt

    rows = results.get("cascade", {}).get("rows", [])
    databases = [name for name in NAMES if any(row["database"] == name for row in rows)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    if not rows:
        return
    figure, axes = plt.subplots(
        len(databases), 1, figsize=(9, 3.2 * len(databases)), squeeze=False, sharex=True
    )
    for (axis,), database in zip(axes, databases, strict=True):
        for number, contender in enumerate(contenders):
            heights = [
                medians(
                    [row for row in rows if row["database"] == database],
                    cascade(contender, shape, "all gone"),
                )
                for shape in shapes
            ]
            axis.bar(
                [place + 0.2 * number for place in range(len(shapes))],
                [statistics.median(height) if height else 0 for height in heights],
                width=0.19,
                label=contender,
            )
        axis.set_yscale("log")
        axis.set_ylabel(f"{NAMES[database]}: seconds")
        axis.set_xticks([place + 0.3 for place in range(len(shapes))], shapes)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
