"""User hooks, normalised once: Prefect's engine calls them by position, its runner by keyword.

A hook written `def h(flow, fr, state)` therefore works on failure under plain Prefect and dies
with a `TypeError` exactly on cancellation, which the runner only logs
(prefect/flow_engine.py `call_hooks`, prefect/runner/_hook_runner.py `_run_hooks`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

HOOK_OPTIONS = ("on_completion", "on_failure", "on_cancellation", "on_crashed", "on_running")
_PARAMETERS = ("flow", "flow_run", "state")

H = TypeVar("H", bound=Callable[..., Any])


def normalise_hooks(option: str, hooks: Any) -> list[Any] | None:
    """Return hooks that may be called by position and by keyword.

    Args:
        option: The option they were given for, e.g. *on_failure*.
        hooks: One callable or an iterable of them; `None` stays `None`.

    Raises:
        TypeError: If something is not callable, or does not take three arguments.
    """
    if hooks is None:
        return None
    if callable(hooks):
        try:
            return [normalise_hook(option, hooks)]
        except TypeError as exc:
            raise TypeError(f"{exc}\n\n{_not_iterable(option, hooks)}") from None
    if not isinstance(hooks, Iterable):
        raise TypeError(_not_iterable(option, hooks))
    listed = list(hooks)
    for hook in listed:
        _require_callable(option, hook)
    return [normalise_hook(option, hook) for hook in listed]


def normalise_hook(option: str, hook: H) -> H | Hook:
    """Return the hook itself where Prefect can call it both ways, or a stand-in that it can."""
    _require_callable(option, hook)
    if isinstance(hook, Hook):
        return hook
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # a builtin: called by position it may well work
        return Hook(hook)
    try:
        signature.bind(*_PARAMETERS)
    except TypeError:
        raise TypeError(
            f"The '{option}' hook {_name(hook)}{signature} cannot be called with three arguments. "
            f"Write it as: def {_name(hook)}(flow, flow_run, state)"
        ) from None
    return hook if _takes_keywords(hook, signature) else Hook(hook)


def _require_callable(option: str, hook: object) -> None:
    if not callable(hook):
        kind = type(hook).__name__
        raise TypeError(f"Expected callables in '{option}'; got {kind} instead. {_advice(option)}")


class Hook:
    """A user's hook under Prefect's own parameter names; it equals what it stands in for."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        functools.update_wrapper(self, hook, updated=())
        self.hook = hook
        self.__name__ = _name(hook)
        # Prefect's runner awaits hooks that `inspect` calls async, and looks through this.
        self.__wrapped__ = hook if inspect.isfunction(hook) else _call_method(hook)

    def __call__(self, flow: Any, flow_run: Any, state: Any) -> Any:
        return self.hook(flow, flow_run, state)

    def __eq__(self, other: object) -> bool:
        return self.hook == (other.hook if isinstance(other, Hook) else other)

    def __hash__(self) -> int:
        return hash(self.hook)

    def __repr__(self) -> str:
        return repr(self.hook)


def _takes_keywords(hook: Callable[..., Any], signature: inspect.Signature) -> bool:
    try:
        by_name = signature.bind(**{name: name for name in _PARAMETERS})
        # A decorator shows the signature of what it wraps, but may not take keywords itself.
        inspect.signature(hook, follow_wrapped=False).bind(**dict.fromkeys(_PARAMETERS))
    except TypeError:
        return False
    # Both must agree, or a call by position would hand over the wrong things.
    by_position = signature.bind(*_PARAMETERS)
    return by_name.arguments == by_position.arguments and not _is_async_object(hook)


def _is_async_object(hook: Callable[..., Any]) -> bool:
    return not inspect.iscoroutinefunction(hook) and inspect.iscoroutinefunction(_call_method(hook))


def _call_method(hook: Callable[..., Any]) -> Any:
    if isinstance(hook, functools.partial):
        return hook.func
    return hook if inspect.isroutine(hook) else type(hook).__call__


def _name(hook: Callable[..., Any]) -> str:
    if isinstance(hook, functools.partial):
        return _name(hook.func)
    return getattr(hook, "__name__", type(hook).__name__)


def _not_iterable(option: str, hooks: object) -> str:
    return (
        f"Expected iterable for '{option}'; got {type(hooks).__name__} instead. {_advice(option)}"
    )


def _advice(option: str) -> str:
    return (
        f"Please provide a list of hooks to '{option}':\n\n"
        f"@flow({option}=[hook1, hook2])\ndef my_flow():\n\tpass"
    )
