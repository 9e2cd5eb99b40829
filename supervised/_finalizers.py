"""Finalizers: what a teardown has to end that Prefect knows nothing of."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from typing import TYPE_CHECKING, Any

import anyio
import attrs

from supervised._log import get_logger
from supervised._text import text_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = get_logger("prefect.supervised.finalizers")

FINALIZER_THREAD = "supervised-finalizer"


@attrs.define(eq=False)
class Finalizer:
    """One callback that a teardown calls; returned by `supervisor.on_teardown`.

    Args:
        callback: What is called, with *args* and *kwargs*.
    """

    callback: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    _owner: Finalizers
    _context: contextvars.Context = attrs.field(factory=contextvars.copy_context)

    def remove(self) -> None:
        """Take the callback off: what it is for has ended by itself. Harmless if it is off."""
        self._owner.remove(self)

    @property
    def name(self) -> str:
        """The callback's name, for people."""
        own = getattr(self.callback, "__name__", None)
        return own if isinstance(own, str) else type(self.callback).__qualname__

    async def run(self) -> BaseException | None:
        """Call the callback in a thread of its own, an async one in a loop of its own.

        Neither it nor what it raises reaches the control plane: that has trees to end.

        Returns:
            What it raised.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[BaseException | None] = loop.create_future()

        def tell(raised: BaseException | None) -> None:
            if not answer.done():
                answer.set_result(raised)

        def call() -> None:
            raised = self._context.run(self._call)
            try:
                loop.call_soon_threadsafe(tell, raised)
            except RuntimeError:  # nobody waits any more
                logger.debug("Finalizer %s ended too late", self.name)

        # A daemon: a callback that never returns must not keep the process alive.
        threading.Thread(target=call, name=FINALIZER_THREAD, daemon=True).start()
        return await answer

    def _call(self) -> BaseException | None:
        try:
            result = self.callback(*self.args, **self.kwargs)
            if inspect.isawaitable(result):
                asyncio.run(_awaited(result))
        except BaseException as exc:  # even SystemExit is the report's, and ends nothing else
            return exc
        return None


class Finalizers:
    """The finalizers of one scope; thread-safe. Each is called once, the last added first."""

    def __init__(self) -> None:
        self._stack: list[Finalizer] = []
        self._lock = threading.Lock()

    def add(
        self, callback: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Finalizer:
        """Have a callback called by the teardown.

        Raises:
            TypeError: If it cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"A finalizer must be callable; got {callback!r}")
        finalizer = Finalizer(callback, args, kwargs, self)
        with self._lock:
            self._stack.append(finalizer)
        return finalizer

    def remove(self, finalizer: Finalizer) -> None:
        """Forget a finalizer."""
        with self._lock:
            if finalizer in self._stack:
                self._stack.remove(finalizer)

    def __len__(self) -> int:
        return len(self._stack)

    async def run(self, seconds: float) -> list[str]:
        """Call all, one after another.

        Args:
            seconds: How long that may take altogether; who has not been called by then never is.

        Returns:
            What went wrong, a line each.
        """
        errors: list[str] = []
        deadline = anyio.current_time() + seconds
        while (finalizer := self._pop()) is not None:
            left = deadline - anyio.current_time()
            if left <= 0:
                errors.append(f"{finalizer.name}: not called, the grace of {seconds:g} s was over")
                continue
            try:
                with anyio.fail_after(left):
                    exc = await finalizer.run()
            except TimeoutError:
                errors.append(f"{finalizer.name}: not done within the grace of {seconds:g} s")
                continue
            except RuntimeError as could_not_start:  # no thread can be had
                exc = could_not_start
            if exc is not None:
                logger.debug("Finalizer %s failed", finalizer.name, exc_info=exc)
                errors.append(f"{finalizer.name}: {type(exc).__name__}: {text_of(exc)}")
        return errors

    def _pop(self) -> Finalizer | None:
        with self._lock:
            return self._stack.pop() if self._stack else None


async def _awaited(awaitable: Awaitable[object]) -> None:
    await awaitable
