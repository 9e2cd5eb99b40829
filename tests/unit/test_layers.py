"""Modules import strictly downward, in the order that the package's docstring states."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import supervised

FOLDER = Path(supervised.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("_*.py") if path.stem != "__init__")
ROWS = [
    re.findall(r"`(\w+)`", line.partition(":")[0])
    for line in supervised.__doc__.splitlines()
    if line.startswith("- ")
]
ORDER = [module for row in ROWS for module in row]


class Imports(ast.NodeVisitor):
    """Collects what a module imports when it runs, inside functions too."""

    def __init__(self):
        self.found = set()

    def visit_If(self, node):
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
        for child in node.orelse if name == "TYPE_CHECKING" else [*node.body, *node.orelse]:
            self.visit(child)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        assert node.level == 0, "imports are absolute"
        self.found |= {f"{node.module}.{alias.name}" for alias in node.names}


def imports_of(module):
    """Every dotted name that a module imports at run time."""
    imports = Imports()
    package = FOLDER / module
    for path in package.glob("*.py") if package.is_dir() else [package.with_suffix(".py")]:
        imports.visit(ast.parse(path.read_text()))
    return imports.found


def own_imports_of(module):
    """The modules of ours that a module imports, by their bare names."""
    ours = {tuple(name.split(".")) for name in imports_of(module)}
    return {name[1] if len(name) > 1 else "__init__" for name in ours if name[0] == "supervised"}


def test_the_layout_names_every_module_once_and_no_other():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", [module for module in MODULES if module in ORDER])
def test_a_module_imports_only_from_those_below_it(module):
    below = ORDER[ORDER.index(module) + 1 :]
    assert own_imports_of(module) <= set(below)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_the_facade_or_the_helpers_for_tests(module):
    imported = own_imports_of(module)
    assert imported <= set(MODULES)


def test_the_values_import_nothing_of_ours_but_how_words_are_made():
    assert own_imports_of("_types") == {"_text"}
    assert own_imports_of("_text") == set()


@pytest.mark.parametrize("module", [*MODULES, "__init__", "cli", "guard", "testing"])
def test_only_the_telemetry_module_imports_opentelemetry_and_only_its_api(module):
    roots = {
        ".".join(name.split(".")[:2])
        for name in imports_of(module)
        if name.split(".")[0] == "opentelemetry"
    }
    allowed = {
        "opentelemetry.context",
        "opentelemetry.metrics",
        "opentelemetry.trace",
    }
    assert roots <= (allowed if module == "_telemetry" else set())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import a.b", {"a.b"}),
        ("from a import b, c", {"a.b", "a.c"}),
        ("def f():\n    from a import b", {"a.b"}),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", {"b"}),
        ("if typing.TYPE_CHECKING:\n    import a", set()),
        ("if sys.version_info >= (3, 11):\n    import a\nelse:\n    import b", {"a", "b"}),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}),
    ],
)
def test_the_check_itself_sees_what_runs(source, found):
    imports = Imports()
    imports.visit(ast.parse(source))
    assert found == imports.found
