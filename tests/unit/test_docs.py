"""The documentation holds together: code compiles, links lead somewhere, nothing is left out."""

from __future__ import annotations

import ast
import re
import sys

import pytest
from support.docs import PAGES, ROOT, Block, python_blocks, title

import supervised

_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"`[^`\n]*`")

BLOCKS = [block for page in PAGES for block in python_blocks(page)]


def prose(page):
    return _QUOTED.sub("", _FENCED.sub("", page.read_text()))


def anchors(page):
    """The anchors that a page offers, as the usual renderers name them."""
    headings = _HEADING.findall(_FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


LINKS = [
    (page, target)
    for page in [*PAGES, *sorted((ROOT / "examples").rglob("*.md"))]
    for target in _LINK.findall(prose(page))
    if not target.startswith(("http://", "https://"))
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_python_blocks_compile(block: Block):
    if "except*" in block.text and sys.version_info < (3, 11):
        pytest.skip("except* is Python 3.11")
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compile(block.text, block.place, "exec", flags=flags, dont_inherit=True)


@pytest.mark.parametrize(
    ("page", "target"), LINKS, ids=[f"{title(page)}: {target}" for page, target in LINKS]
)
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists()
    assert not anchor or anchor in anchors(there)


@pytest.mark.parametrize("name", supervised.__all__)
def test_the_reference_has_every_public_name(name):
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert re.search(rf"\b{name}\b", reference)


def test_the_reference_draws_the_tree_of_errors_as_the_code_does():
    from supervised import _errors

    drawn = re.findall(r"[├└]─ (\w+)", (ROOT / "docs" / "reference.md").read_text())
    assert re.findall(r"[├└]─ (\w+)", _errors.__doc__) == drawn


def test_the_map_leads_to_every_page():
    index = ROOT / "docs" / "index.md"
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for page, target in LINKS
        if page == index
    }
    assert {page for page in PAGES if "docs" in page.parts} - {index} <= linked


def test_files_of_one_page_have_different_names():
    for page in PAGES:
        names = [block.name for block in python_blocks(page) if block.name]
        assert sorted(set(names)) == sorted(names)


SHORT = [
    ("on_parent=", "keep-a-child-alive"),
    ("on_child_failure=", "handle-failures"),
    ("first_success(", "join-children"),
    ("as_completed(", "join-children"),
    ("restart=", "restart-children"),
    ("key=", "spawn-deployments"),
    ("retries=", "survive-retries"),
    ("reuse=", "survive-retries"),
    ("suspend_flow_run(", "survive-retries"),
    ("isolation=", "isolate-children"),
    ("adopt(", "adopt-runs"),
    ("max_concurrent=", "limit-and-order"),
    ("requests_per_minute=", "limit-and-order"),
    ("after=", "limit-and-order"),
    ("timeout_seconds=", "limit-and-order"),
    ("on_teardown(", "clean-up"),
]


def lines(block):
    """How many lines somebody has to read: those of the directive and blank ones do not count."""
    return len([line for line in block.text.splitlines()[1:] if line.strip()])


@pytest.mark.parametrize(("what", "page"), SHORT)
def test_there_is_an_example_of_ten_lines_that_runs(what, page):
    shown = {
        block.place: lines(block)
        for block in python_blocks(ROOT / "docs" / "how-to" / f"{page}.md")
        # A suspended flow is resumed by a script, which runs; the flow is in a file that is served.
        if block.what in {"run", "file"} and what in block.text
    }
    assert min(shown.values(), default=None) in range(11), shown
