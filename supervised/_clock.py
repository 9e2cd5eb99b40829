"""The one clock that supervision counts by: that of the running event loop, if there is one.

A loop's clock is the system's, unless somebody has made it a virtual one, as `supervised.testing`
does.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from prefect.types._datetime import now

if TYPE_CHECKING:
    from datetime import datetime


def monotonic() -> float:
    """Return seconds from any fixed point."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


def utc_now() -> datetime:
    """Return the date and time."""
    try:
        virtual = getattr(asyncio.get_running_loop(), "utc_now", None)
    except RuntimeError:
        virtual = None
    moment: datetime = virtual() if virtual is not None else now("UTC")
    return moment
