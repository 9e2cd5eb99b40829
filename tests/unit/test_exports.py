"""What `supervised` exports: names, and a tree of exceptions that is as it is drawn."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.metadata
import inspect
import pickle
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from uuid import UUID

import pytest
from prefect.states import Cancelled

import supervised
from supervised import _errors
from supervised._types import CancelReason, Receipt, TeardownReport

RUN = UUID(int=7)
REPORT = TeardownReport(
    flow_name="etl",
    flow_run_id=RUN,
    cause="failed",
    reason="ValueError: bad",
    started_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
    seconds=20.0,
    receipts=(
        Receipt(name="load", flow_run_id=UUID(int=8), status="cancelled", reason="asked"),
        Receipt(name="score", flow_run_id=UUID(int=9), status="unverified", reason="silent"),
    ),
)

# -- names --------------------------------------------------------------------------------------


def test_all_is_sorted_and_has_no_name_twice():
    assert sorted(set(supervised.__all__)) == supervised.__all__


@pytest.mark.parametrize("name", supervised.__all__)
def test_every_exported_name_can_be_imported_and_says_what_it_is(name):
    namespace = {}
    exec(f"from supervised import {name}", namespace)
    assert namespace[name] is getattr(supervised, name)
    assert inspect.getdoc(namespace[name])


def test_everything_public_in_the_facade_is_exported():
    public = {
        name
        for name, value in vars(supervised).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public <= set(supervised.__all__)
    assert set(supervised.__all__) <= set(dir(supervised))


def test_a_type_checker_sees_every_export_where_it_really_comes_from():
    tree = ast.parse(Path(supervised.__file__).read_text())
    (block,) = [each for each in tree.body if isinstance(each, ast.If) and not each.orelse][:1]
    imports = [each for each in block.body if isinstance(each, ast.ImportFrom)]
    seen = {alias.name: each.module for each in imports for alias in each.names}
    assert sorted(seen) == supervised.__all__
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(supervised, name)


def test_importing_the_package_imports_nothing_else_of_it_and_nothing_of_prefect():
    ours = "[name for name in sys.modules if name.startswith(('supervised', 'prefect'))]"
    code = f"import sys, supervised; print({ours})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['supervised']"


def test_a_star_import_brings_the_exports_and_nothing_else():
    namespace = {}
    exec("from supervised import *", namespace)
    assert set(supervised.__all__) == set(namespace) - {"__builtins__"}


def test_the_version_is_that_of_the_distribution():
    assert importlib.metadata.version("prefect-supervised") == supervised.__version__


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'supervised' has no attribute 'nursery'"):
        supervised.nursery  # noqa: B018


# -- the tree of exceptions ---------------------------------------------------------------------


def drawn_tree():
    """Read the drawing: each exception with its parent and the builtin beside it."""
    tree, ancestors = {}, []
    for line in _errors.__doc__.splitlines():
        drawn = re.match(
            r"^(?P<indent>(?:[│ ] {2})*)[├└]─ (?P<name>\w+)(?: \((?P<beside>\w+)\))?", line
        )
        if drawn is None and line != "SupervisedError":
            continue
        depth = 0 if drawn is None else 1 + len(drawn["indent"]) // 3
        name = line if drawn is None else drawn["name"]
        del ancestors[depth:]
        tree[name] = (ancestors[-1] if ancestors else "Exception", drawn and drawn["beside"])
        ancestors.append(name)
    return tree


TREE = drawn_tree()
REAL = {
    name: value
    for name, value in vars(_errors).items()
    if inspect.isclass(value) and issubclass(value, BaseException)
}


def test_the_drawing_shows_every_exception_and_no_other():
    assert set(TREE) == set(REAL)
    assert len(TREE) > 10


@pytest.mark.parametrize("name", TREE)
def test_an_exception_has_the_bases_it_is_drawn_with(name):
    parent, beside = TREE[name]
    drawn_bases = [parent] if beside is None else [parent, beside]
    assert drawn_bases == [base.__name__ for base in REAL[name].__bases__]


@pytest.mark.parametrize("name", TREE)
def test_every_exception_is_exported_and_ordinary(name):
    assert REAL[name] is getattr(supervised, name)
    assert issubclass(REAL[name], Exception)


# -- exceptions as values -----------------------------------------------------------------------


def an_error(name):
    """An exception with every field filled."""
    kind = REAL[name]
    if issubclass(kind, supervised.ChildError):
        return kind(
            "failed: bad",
            child="score",
            flow_run_id=RUN,
            state=Cancelled(message="because"),
            reason=CancelReason(source="explicit", message="asked"),
            url="http://ui.test/runs/flow-run/7",
        )
    if issubclass(kind, supervised.SpawnError):
        return kind("cannot be launched", child="score")
    if issubclass(kind, supervised.TeardownError):
        return kind(REPORT)
    return kind("went wrong")


@pytest.mark.parametrize("name", TREE)
@pytest.mark.parametrize(
    "again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickled", "copied"]
)
def test_an_exception_survives_the_way_from_a_child_process_to_its_parent(name, again):
    error = an_error(name)
    arrived = again(error)
    assert type(error) is type(arrived)
    assert str(error) == str(arrived)
    assert vars(error) == vars(arrived)


def test_a_child_error_says_what_which_and_where():
    assert str(an_error("ChildFailed")) == (
        f"Child 'score' (flow run {RUN}) failed: bad. See http://ui.test/runs/flow-run/7"
    )
    assert str(supervised.ChildFailed("failed: bad", child="score")) == "Child 'score' failed: bad"


def test_a_teardown_error_names_the_runs_that_may_be_alive_and_only_them():
    message = str(an_error("TeardownError"))
    assert message.startswith(f"1 run(s) below 'etl' {RUN} may still be alive: score (")
    assert "load" not in message
    assert "prefect flow-run cancel" in message
