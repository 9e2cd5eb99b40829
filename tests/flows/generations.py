"""Parents that are begun more than once, each time in a process of its own.

`python generations.py NAME` serves them.
"""

import asyncio
import json
import sys
from pathlib import Path

import prefect
from prefect.context import FlowRunContext
from tree import asked

from supervised import Child, _scope, supervised_flow, supervisor

_scope._CHECK_SECONDS = 20.0  # an attempt that asks a busy server in vain writes its end


def attempt() -> int:
    """Return which attempt this is, by what the server had counted when it began."""
    return FlowRunContext.get().flow_run.run_count


def note(folder: str, what: str, content: object) -> None:
    """Write down something for the test, all at once."""
    draft = Path(folder) / f"{what}.draft"
    draft.write_text(json.dumps(content))
    draft.rename(Path(folder) / what)


async def told(folder: str, what: str) -> None:
    """Wait until the test has said so."""
    while not asked(folder, what):
        await asyncio.sleep(0.05)


async def note_children(folder: str, *children: Child) -> None:
    """Write down the runs that this attempt has, once it has them."""
    while any(child.flow_run_id is None for child in children):
        await asyncio.sleep(0.05)
    note(folder, f"attempt-{attempt()}", [str(child.flow_run_id) for child in children])


@supervised_flow(retries=3, persist_result=True)
async def copies(folder: str, queue: str, older: str, more: bool = True) -> list[int]:
    """Begun anew while it lives: the older copy goes on as it is told, the later one works."""
    shared = supervisor.spawn(queue, {"x": 1}, key="shared")
    if attempt() > 1:
        own = [supervisor.spawn(queue, {"x": 2}, key="own")] if more else []
        await note_children(folder, shared, *own)
        await told(folder, "go")
        return await supervisor.gather(shared, *own)
    await note_children(folder, shared)
    await told(folder, "replaced")
    if "spawns" in older:
        try:
            await supervisor.spawn(queue, {"x": 3}, key="late")
        except Exception as exc:
            note(folder, "refused", str(exc))
    if "awaits" in older:
        await shared
    if "returns" in older:
        return [-1]
    raise ValueError("the older copy has failed")


@supervised_flow(persist_result=True)
async def resumed(folder: str, queue: str, names: list[str]) -> list[object]:
    """Its process is killed, and it is begun anew in another one: what it sends differs then."""
    given = {"names": set(names), "nested": {"deep": [frozenset(names)]}}
    children = [
        supervisor.spawn(queue, given),
        supervisor.spawn(queue, given, key="explicit"),
    ]
    if asked(folder, "served"):
        waits = {"folder": folder, "part": 3, "waits": True}
        children.append(supervisor.spawn("persisted/test", waits))
    note(folder, f"order-{attempt()}", list(set(names)))
    await note_children(folder, *children)
    return await supervisor.gather(*children)


@supervised_flow(persist_result=True)
async def changed(folder: str, queue: str) -> int:
    """Begun anew, it has other work for the same key."""
    child = supervisor.spawn(queue, {"x": attempt()}, key="one")
    await note_children(folder, child)
    return await child


if __name__ == "__main__":
    name = sys.argv[1]
    prefect.serve(*(each.to_deployment(name) for each in (copies, resumed, changed)))
