"""`@supervised_flow` and the flow it makes."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from prefect.context import FlowRunContext
from prefect.flows import Flow, flow
from typing_extensions import ParamSpec

from supervised import _compat
from supervised._context import current_supervisor
from supervised._hooks import HOOK_OPTIONS, normalise_hook, normalise_hooks
from supervised._policy import check_budget, check_limit, check_seconds, resolve_on_parent
from supervised._types import OnChildFailure, OnParent, ScopeOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from prefect.client.schemas.objects import FlowRun, State
    from prefect.deployments.storage import ReadableDeploymentStorage  # type: ignore[import-not-found]
    from prefect.flows import FlowStateHook
    from prefect.futures import PrefectFuture
    from prefect.results import ResultSerializer, ResultStorage
    from prefect.runner.storage import RunnerStorage
    from prefect.task_runners import TaskRunner

    from supervised._restart import Restart
    from supervised._supervisor import Supervisor

P = ParamSpec("P")
R = TypeVar("R")

# How Prefect marks the function of a flow that is bound as a method.
_BINDINGS = ("__prefect_self__", "__prefect_cls__")
_FAILURE_POLICIES = ("cancel_siblings", "wait", "ignore")


# What runs a scope is imported with the first run of one: most processes that import a flow deploy,
# serve or list it.


def end_what_is_left(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """End what a run launched, when its runner finds that it is gone."""
    from supervised import _reap

    _reap.end_what_is_left(flow, flow_run, state)


class _HooksForRunners:
    """A flow's hooks for one end, as the user gave them, and for runners one more.

    It ends what a run has left behind whose process could not. Everybody else, the engine included,
    sees what `@flow` would show.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, flow: Flow[..., Any] | None, owner: type) -> Any:
        if flow is None:
            return self
        hooks: list[Any] = vars(flow)[self._name]
        return [*hooks, end_what_is_left] if _compat.is_called_by_runner() else hooks

    def __set__(self, flow: Flow[..., Any], hooks: list[Any]) -> None:
        vars(flow)[self._name] = hooks


class SupervisedFlow(Flow[P, R], Generic[P, R]):
    """A Prefect flow whose runs end everything that they launched.

    Made by `supervised_flow`; it is a `prefect.Flow` in every respect, and takes the same
    arguments, then those of the scope.

    Args:
        fn: The user's function.
        scope_options: What `supervised_flow` adds to the options of `flow`.
    """

    def __init__(
        self, fn: Any, *args: Any, scope_options: ScopeOptions | None = None, **kwargs: Any
    ) -> None:
        for option in HOOK_OPTIONS:
            if option in kwargs:
                kwargs[option] = normalise_hooks(option, kwargs[option])
        # First the original: version, entrypoint, parameters and kind are read off its code.
        super().__init__(fn, *args, **kwargs)
        self.scope_options = scope_options or ScopeOptions()
        self._supervise(self.fn)

    def _supervise(self, original: Callable[P, R]) -> None:
        bound = {name: value for name, value in vars(self.fn).items() if name in _BINDINGS}
        self.unsupervised_fn: Callable[P, R] = original
        # Prefect runs `fn`, not `__call__`, for everything that a runner starts.
        self.fn = _wrap(original, self.scope_options)
        vars(self.fn).update(bound)

    on_cancellation_hooks: Any = _HooksForRunners()
    on_crashed_hooks: Any = _HooksForRunners()

    def with_options(self, **options: Any) -> SupervisedFlow[P, R]:
        """Return a copy with other options, those of the scope included.

        Args:
            **options: Options of `Flow.with_options`, and those that `supervised_flow` adds to
                the options of `flow`.

        Raises:
            TypeError: If an option does not exist.
        """
        given = {name: options.pop(name) for name in _SCOPE_OPTION_NAMES if name in options}
        hooks: dict[str, Any] = {
            name: normalise_hooks(name, options.pop(name))
            for name in HOOK_OPTIONS
            if name in options
        }
        plain = super().with_options(**{**options, **hooks})
        new = copy.copy(self)
        new.__dict__.update(plain.__dict__)
        new.scope_options = _scope_options(base=self.scope_options, **given)
        new._supervise(self.unsupervised_fn)
        return new

    def __get__(self, instance: Any, owner: Any) -> SupervisedFlow[P, R]:
        """Bind the flow as a method, on a function of its own.

        Prefect's binding marks the one shared function, so the last instance bound wins for
        all of them (prefect/flows.py, `Flow.__get__`).
        """
        if not self.isclassmethod and instance is None:
            return self
        bound = copy.copy(self)
        bound._supervise(self.unsupervised_fn)
        if self.isclassmethod:
            bound.fn.__prefect_cls__ = owner  # type: ignore[attr-defined]
        elif not self.isstaticmethod:
            bound.fn.__prefect_self__ = instance  # type: ignore[attr-defined]
        return bound

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters as the function's annotations want them.

        Raises:
            ParameterTypeError: If one of them does not fit.
        """
        plain = copy.copy(self)
        # Annotations that are strings are looked up where the function says that it is from, and
        # what wraps it is from here (3.9.1, _internal/pydantic/validated_func.py).
        plain.fn = self.unsupervised_fn
        return Flow.validate_parameters(plain, parameters)

    def on_completion(self, fn: FlowStateHook[P, R]) -> FlowStateHook[P, R]:
        """Add a hook that runs when a run completes."""
        self.on_completion_hooks.append(normalise_hook("on_completion", fn))
        return fn

    def on_failure(self, fn: FlowStateHook[P, R]) -> FlowStateHook[P, R]:
        """Add a hook that runs when a run fails."""
        self.on_failure_hooks.append(normalise_hook("on_failure", fn))
        return fn

    def on_cancellation(self, fn: FlowStateHook[P, R]) -> FlowStateHook[P, R]:
        """Add a hook that runs when a run is cancelled."""
        self.on_cancellation_hooks.append(normalise_hook("on_cancellation", fn))
        return fn

    def on_crashed(self, fn: FlowStateHook[P, R]) -> FlowStateHook[P, R]:
        """Add a hook that runs when a run crashes."""
        self.on_crashed_hooks.append(normalise_hook("on_crashed", fn))
        return fn

    def on_running(self, fn: FlowStateHook[P, R]) -> FlowStateHook[P, R]:
        """Add a hook that runs when a run starts."""
        self.on_running_hooks.append(normalise_hook("on_running", fn))
        return fn


def _wrap(fn: Callable[P, R], options: ScopeOptions) -> Callable[P, R]:
    """Return *fn* run in a scope; of the same kind, because Prefect picks its engine by it."""
    wrap: Callable[[Callable[..., Any], ScopeOptions], Callable[..., Any]] = _wrap_sync
    if inspect.isasyncgenfunction(fn):
        wrap = _wrap_async_generator
    elif inspect.isgeneratorfunction(fn):
        wrap = _wrap_generator
    elif inspect.iscoroutinefunction(fn):
        wrap = _wrap_async
    return wrap(fn, options)


def _wrap_sync(fn: Callable[..., Any], options: ScopeOptions) -> Callable[..., Any]:
    @functools.wraps(fn)
    def supervised(*args: Any, **kwargs: Any) -> Any:
        supervisor = _open(fn, options)
        if supervisor is None:
            return fn(*args, **kwargs)
        from supervised import _scope

        return _scope.run_sync(supervisor, functools.partial(fn, *args, **kwargs))

    return supervised


def _wrap_async(fn: Callable[..., Any], options: ScopeOptions) -> Callable[..., Any]:
    @functools.wraps(fn)
    async def supervised(*args: Any, **kwargs: Any) -> Any:
        supervisor = _open(fn, options)
        if supervisor is None:
            return await fn(*args, **kwargs)
        from supervised import _scope

        return await _scope.run_async(supervisor, functools.partial(fn, *args, **kwargs))

    return supervised


def _wrap_generator(fn: Callable[..., Any], options: ScopeOptions) -> Callable[..., Any]:
    @functools.wraps(fn)
    def supervised(*args: Any, **kwargs: Any) -> Any:
        supervisor = _open(fn, options)
        if supervisor is None:
            return (yield from fn(*args, **kwargs))
        from supervised import _scope

        return (yield from _scope.run_generator(supervisor, fn(*args, **kwargs)))

    return supervised


def _wrap_async_generator(fn: Callable[..., Any], options: ScopeOptions) -> Callable[..., Any]:
    @functools.wraps(fn)
    async def supervised(*args: Any, **kwargs: Any) -> Any:
        supervisor = _open(fn, options)
        generator = fn(*args, **kwargs)
        if supervisor is not None:
            from supervised import _scope

            generator = _scope.run_async_generator(supervisor, generator)
        try:
            async for item in generator:
                yield item
        finally:
            await generator.aclose()

    return supervised


def _open(fn: Callable[..., Any], options: ScopeOptions) -> Supervisor | None:
    """Return a supervisor for the run of *fn*; there is none for `flow.fn(...)` elsewhere."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow is None:
        return None
    if getattr(context.flow, "unsupervised_fn", None) is not fn:
        return None
    current = current_supervisor.get()
    if current is not None and current.flow_run_id == context.flow_run.id:
        return None  # `flow.fn(...)`, called within a scope of this very run
    from supervised._supervisor import Supervisor

    return Supervisor(options, context.flow, context)


_SCOPE_OPTION_NAMES = (
    "grace_seconds",
    "on_parent",
    "on_child_failure",
    "max_concurrent",
    "lease_seconds",
    "restart",
    "deadline_seconds",
    "requests_per_minute",
)


def _scope_options(
    *,
    base: ScopeOptions | None = None,
    grace_seconds: float | None = None,
    on_parent: OnParent | None = None,
    on_child_failure: OnChildFailure | None = None,
    max_concurrent: int | None = None,
    lease_seconds: float | None = None,
    restart: Restart | None = None,
    deadline_seconds: float | None = None,
    requests_per_minute: int | None = None,
) -> ScopeOptions:
    """Return validated options over *base*.

    Raises:
        ValueError: If a value is out of range, or a word is not understood.
    """
    base = base or ScopeOptions()
    if on_child_failure is not None and on_child_failure not in _FAILURE_POLICIES:
        raise ValueError(
            f"on_child_failure: {on_child_failure!r} is no policy; "
            f"use {', '.join(_FAILURE_POLICIES)}"
        )
    if restart is not None:
        from supervised._restart import check_restart

        check_restart(restart)
    limit = check_limit("max_concurrent", max_concurrent)
    grace = check_seconds("grace_seconds", grace_seconds)
    budget = check_limit("requests_per_minute", requests_per_minute)
    deadline = check_seconds("deadline_seconds", deadline_seconds)
    lease = check_seconds("lease_seconds", lease_seconds, least=1.0)
    options = ScopeOptions(
        grace_seconds=base.grace_seconds if grace is None else grace,
        on_parent=resolve_on_parent(on_parent, base.on_parent),
        on_child_failure=on_child_failure or base.on_child_failure,
        max_concurrent=base.max_concurrent if limit is None else limit,
        lease_seconds=base.lease_seconds if lease is None else lease,
        restart=restart or base.restart,
        deadline_seconds=base.deadline_seconds if deadline is None else deadline,
        requests_per_minute=base.requests_per_minute if budget is None else budget,
    )
    check_budget(options.requests_per_minute, options.lease_seconds)
    return options


class SupervisedFlowDecorator:
    """The type of `supervised_flow`; call it as you would call `prefect.flow`."""

    @overload
    def __call__(self, __fn: Callable[P, R]) -> SupervisedFlow[P, R]: ...

    @overload
    def __call__(
        self,
        __fn: None = None,
        *,
        name: str | None = None,
        version: str | None = None,
        flow_run_name: Callable[[], str] | str | None = None,
        retries: int | None = None,
        retry_delay_seconds: float | None = None,
        task_runner: TaskRunner[PrefectFuture[Any]]
        | type[TaskRunner[PrefectFuture[Any]]]
        | None = None,
        description: str | None = None,
        timeout_seconds: float | None = None,
        validate_parameters: bool = True,
        persist_result: bool | None = None,
        result_storage: ResultStorage | str | None = None,
        result_serializer: ResultSerializer | None = None,
        cache_result_in_memory: bool = True,
        log_prints: bool | None = None,
        on_completion: Hooks | None = None,
        on_failure: Hooks | None = None,
        on_cancellation: Hooks | None = None,
        on_crashed: Hooks | None = None,
        on_running: Hooks | None = None,
        grace_seconds: float | None = None,
        on_parent: OnParent | None = None,
        on_child_failure: OnChildFailure | None = None,
        max_concurrent: int | None = None,
        lease_seconds: float | None = None,
        restart: Restart | None = None,
        deadline_seconds: float | None = None,
        requests_per_minute: int | None = None,
    ) -> Callable[[Callable[P, R]], SupervisedFlow[P, R]]: ...

    def __call__(self, __fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Make a function a supervised flow.

        Replaces `@flow`, bare or called. A flow that spawns nothing behaves as under `@flow`.
        All options of `prefect.flow` pass through.

        Args:
            __fn: The function, for the bare form.
            grace_seconds: Seconds that a whole teardown may take; 20 by default, because a
                runner kills a process 30 s after it asked it to end.
            on_parent: What the end of a run does to its children, by default: *completed* waits
                for them, everything else cancels them.
            on_child_failure: What a failed child does: *cancel_siblings* (default) ends the
                scope, *wait* lets the others finish and then raises, *ignore* leaves it to the
                handle.
            max_concurrent: Children launched and not over at any one time; no limit by default.
            lease_seconds: Seconds without a sign of life from the run's process after which its
                children elsewhere take it for dead and end themselves; 30 by default.
            restart: Limits within which children that fail or crash are restarted; never by
                default.
            deadline_seconds: Seconds from the body's beginning after which the scope is torn down
                and the run ends as *TimedOut*. What is left of it holds for everything below too:
                nested scopes, and supervised children elsewhere. No limit by default.
            requests_per_minute: How many requests supervision may make in a minute, in this
                process; a teardown's go before launches, and launches before reads. No limit by
                default. `Retry-After` of the server is honoured in any case.
            **options: Every option of `prefect.flow`. Hooks may be one callable or a list, of
                three arguments of any names.

        Returns:
            The flow, or a decorator that makes it.

        Raises:
            TypeError: If a hook cannot be called with three arguments, or is not callable.
            ValueError: If a scope option is out of range.

        Example:
            ```python
            @supervised_flow(retries=1, grace_seconds=10)
            async def nightly(day: str) -> None:
                supervisor.spawn("score/gpu", {"day": day})
            ```
        """
        if __fn is None:
            return functools.partial(self, **options)
        scope = {name: options.pop(name) for name in _SCOPE_OPTION_NAMES if name in options}
        return SupervisedFlow(__fn, scope_options=_scope_options(**scope), **options)

    @staticmethod
    def from_source(
        source: str | Path | RunnerStorage | ReadableDeploymentStorage, entrypoint: str
    ) -> Flow[..., Any] | Coroutine[Any, Any, Flow[..., Any]]:
        """Load a flow from a remote source, as `prefect.flow.from_source` does."""
        return Flow.from_source(source, entrypoint)


Hooks = Any
supervised_flow = SupervisedFlowDecorator()
# What tools that look at `flow` see; our own options are in the overloads and the docstring.
supervised_flow.__signature__ = inspect.signature(flow)  # type: ignore[attr-defined]
