"""Telling people what happened, in words that servers, databases and exporters take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_CHARACTERS = 2_000  # in the state of each of hundreds of runs
_TOLD_FAILURES = 3
_TOLD_CHARACTERS = 400
_CUT = " [...] "


def text_of(exc: BaseException) -> str:
    """Return what an exception says; one that cannot say it must not end what tells of it."""
    try:
        return sendable(str(exc))
    except Exception:
        return "(it has no text)"


def sendable(text: str) -> str:
    r"""Return a text without what would fail the request that it is sent in.

    A lone surrogate, which the name of a file may have, is no UTF-8; PostgreSQL refuses NUL.

    Example:
        ```python
        sendable("\udce9t\udce9.csv\0")  # '\\udce9t\\udce9.csv\\x00'
        ```
    """
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def clause(text: str) -> str:
    """Return a text that can be sent, and is not too long to be sent hundreds of times."""
    return cut(sendable(text), MOST_CHARACTERS)


def cut(text: str, at_most: int) -> str:
    """Return at most so many characters; the end of a longer text stays, where the cause is."""
    if len(text) <= at_most:
        return text
    kept = at_most - len(_CUT)
    return text[: kept // 2] + _CUT + text[len(text) - (kept - kept // 2) :]


def first_line(text: str) -> str:
    """Return the first line in which anything stands."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def headline(errors: Sequence[BaseException]) -> str:
    """Tell of failures in one line: the first few and, of what is a group, its members."""
    alone = [each for error in errors for each in _members(error)]
    told = [cut(_in_a_line(error), _TOLD_CHARACTERS) for error in alone[:_TOLD_FAILURES]]
    if len(alone) > _TOLD_FAILURES:
        told.append(f"and {len(alone) - _TOLD_FAILURES} more")
    return "; ".join(told)


def _members(error: BaseException) -> Sequence[BaseException]:
    """Return the errors in a group, and in its groups; of any other one, itself."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    members: Sequence[BaseException] = error.exceptions
    return [each for member in members for each in _members(member)]


def _in_a_line(error: BaseException) -> str:
    text = " ".join(text_of(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
