"""Logging that never ends what it tells of.

When nobody reads a process's output any more, as after the death of its runner, the console that
Prefect logs to raises `SystemExit` (rich/console.py, `on_broken_pipe`): in the control plane that
would end whatever was about to act, and its exception would go nowhere.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from prefect.logging.loggers import flow_run_logger

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from prefect.client.schemas.objects import FlowRun
    from prefect.flows import Flow


class Log(logging.LoggerAdapter):  # type: ignore[type-arg]
    """A logger that loses a line rather than the caller."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log as any logger does."""
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        try:
            super().log(level, msg, *args, **kwargs)
        except SystemExit:
            return

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Change nothing: the logger within knows what belongs to its records."""
        return msg, kwargs


def get_logger(name: str) -> Log:
    """Return the logger of a module."""
    return Log(logging.getLogger(name), {})


def run_logger(run: FlowRun, flow: Flow[..., Any]) -> Log:
    """Return the logger of a flow run; what it is told is shown with the run."""
    return Log(flow_run_logger(run, flow), {})
