"""Stories in virtual time: what would take hours is over at once, and no machine is too slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from supervised import _clock
from supervised.testing._virtual import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


def play(story: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop whose time passes without waiting, and by which we go, too."""
    loop = VirtualLoop()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_clock, "monotonic", loop.time)
            return loop.run_until_complete(story)
    finally:
        loop.close()
