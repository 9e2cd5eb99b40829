"""The fenced blocks of the documentation, and what is to be done with them.

The first line of a Python block may say so, for readers and for tests alike:

- `# file: NAME`   it is saved under that name, beside the other blocks of its page;
- `# serve: NAME`  and started as a runner, for the rest of the page;
- `# run: NAME`    and run to its end, which must be a good one. If a `text` block follows, its
  lines must be printed in that order; other lines may stand between them;
- `# test: NAME`   and handed to pytest.

Every other Python block is a fragment, and only has to compile.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"# (?P<what>file|serve|run|test): (?P<name>\w+\.py)\n")


@attrs.frozen
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    expected: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """What its first line asks for; empty for a fragment."""
        found = _DIRECTIVE.match(self.text)
        return found["what"] if found else ""

    @property
    def name(self) -> str:
        """The file that it is saved as; empty for a fragment."""
        found = _DIRECTIVE.match(self.text)
        return found["name"] if found else ""

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        return f"{title(self.page)}:{self.line}"


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page; a run block knows the output that the page shows for it."""
    text = page.read_text()
    found = [
        Block(page, text.count("\n", 0, fence.start()) + 2, fence["language"], fence["text"])
        for fence in _FENCE.finditer(text)
    ]
    return [
        attrs.evolve(block, expected=tuple(after.text.splitlines()))
        if block.what == "run" and after is not None and after.language == "text"
        else block
        for block, after in itertools.pairwise([*found, None])
    ]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]
