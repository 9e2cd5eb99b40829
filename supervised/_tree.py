"""Reading the whole tree below any run, ours or plain Prefect's, alive or over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from supervised import _identity
from supervised._policy import has_process, is_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import Orchestrator


@attrs.define
class Node:
    """One run of a tree, and what it launched.

    Args:
        run: The run.
        below: What it launched, in the order of creation.
    """

    run: FlowRun
    below: list[Node] = attrs.field(factory=list)

    @property
    def is_live(self) -> bool:
        """Whether the run is not over."""
        return not is_over(self.run)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        """Yield this node and all below it with their depth, parents first."""
        yield depth, self
        for node in self.below:
            yield from node.walk(depth + 1)


async def read_tree(api: Orchestrator, run_id: UUID) -> Node | None:
    """Return the tree below a run, in two requests for each level; `None` if there is no such run.

    Args:
        api: The seam to Prefect.
        run_id: The run at the top.
    """
    (top,) = await api.read_runs([run_id]) or (None,)
    if top is None:
        return None
    root = Node(top)
    nodes = {run_id: root}
    frontier = {run_id}
    while frontier:
        found = [run for run in await api.read_children(frontier) if run.id not in nodes]
        parents = await api.read_parents(found)
        found.sort(key=_created)
        for run in found:
            node = nodes[run.id] = Node(run)
            nodes.get(parents.get(run.id, run_id), root).below.append(node)
        frontier = {run.id for run in found}
    return root


def place(run: FlowRun) -> str:
    """Return where a run executes, as far as the server knows."""
    if not has_process(run):
        return "inline"
    return "/".join(part for part in (run.work_pool_name, run.work_queue_name) if part) or "runner"


def key_of(run: FlowRun) -> str | None:
    """Return the key under which a supervisor has spawned the run, if one did."""
    key = run.labels.get(_identity.KEY)
    return str(key) if key is not None else None


def _created(run: FlowRun) -> float:
    return run.created.timestamp() if run.created is not None else 0.0
