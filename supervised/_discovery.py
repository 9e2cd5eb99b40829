"""What a teardown finds to end: the scope's children, and what lives below, at all levels."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from supervised import _identity
from supervised._log import get_logger
from supervised._policy import has_process, is_over
from supervised._targets import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import Orchestrator
    from supervised._child import Child
    from supervised._finished import Finished
    from supervised._grace import Grace
    from supervised._mandate import Mandate
    from supervised._search import Search
    from supervised._targets import Targets
    from supervised._types import Cause

logger = get_logger("prefect.supervised.teardown")


class Discovery:
    """Makes targets of what is to end, as often as it is asked to, and leaves alone what is not.

    Args:
        api: The seam to Prefect.
        targets: Gets what is found.
        mandate: Says what is to become of whom, and below which runs to search.
        search: Finds what our tag does not.
        grace: Told when the server answers: what there is to ask then takes time.
        children: The registry's children, direct and known, over or not.
        finished: Those that were over before.
        in_body: Supervised runs in this process, below the body.
    """

    def __init__(
        self,
        api: Orchestrator,
        targets: Targets,
        mandate: Mandate,
        *,
        search: Search,
        grace: Grace,
        children: Callable[[], Iterable[Child[Any]]],
        finished: Callable[[], Iterable[Finished]],
        in_body: Callable[[], set[UUID]],
    ) -> None:
        self.error = "" if mandate.delegate_to else "there was no time for it"
        """Why the tree has not been searched to its end; empty if it has."""
        self._api = api
        self._targets = targets
        self._mandate = mandate
        self._search = search
        self._grace = grace
        self._children = children
        self._finished = finished
        self._in_body = in_body
        self._ended: set[UUID] = set()  # the children that were over
        self._noted: tuple[int, Cause] | None = None  # for how many that were over, and what end
        self._to_cut_loose: list[FlowRun] = []

    def take_children(self) -> None:
        """Take up the direct children; newer ones turn up here on every call."""
        for child in self._children():
            # Who was told to cancel is cancelled, whatever its parent's end would have meant.
            action = "cancel" if child.cancel_reason else child.on_parent[self._mandate.cause]
            if action == "detach" or child.detach_requested or child.outcome == "detached":
                if child.flow_run_id is not None:
                    self._targets.spared.add(child.flow_run_id)
                if not child.is_over:
                    child.detach()
                continue
            if child.is_over and child.cancel_reason is None:
                continue
            if self._mandate.is_handed_over and not child.is_local:
                continue
            target = self._targets.of_child(child.key)
            if target is None:
                target = Target(
                    name=child.name, depth=1, action=action, child=child, attempt=child.attempt
                )
                self._targets.add(target)
            if target.run is None and child.flow_run is not None:
                self._targets.set_run(target, child.flow_run, child.state)

    async def search(self) -> None:
        """Find the live runs of all levels: ours by tag, everybody else's by parent link."""
        known_error = self.error
        self.error = "there was no time for it"  # should the grace end the search
        try:
            await self._find_tagged()
            await self._find_linked()
            while self._to_cut_loose:
                # Or Prefect's own cascade would follow the link, in 20 s.
                await self._api.cut_loose(self._to_cut_loose[-1], {_identity.DETACHED: True})
                self._to_cut_loose.pop()
            self.error = ""
        except Exception as exc:
            self.error = repr(exc)
            level = logging.DEBUG if known_error == self.error else logging.WARNING
            run_id = self._mandate.lineage.run_id
            logger.log(level, "Could not search the tree of %s; trying again", run_id)
            logger.debug("Searching failed", exc_info=True)

    # -- by tag -----------------------------------------------------------------------------

    async def _find_tagged(self) -> None:
        tagged = await self._api.read_tagged(self._mandate.lineage.tag, live_only=True)
        tops = self._mandate.tops
        # Before the others: what a detached run has launched still carries the old path.
        # A top itself may be detached, from what is above it; that spares nothing below.
        detached = {run.id for run in tagged if run.labels.get(_identity.DETACHED)}
        self._targets.spare(detached.difference(tops))
        children = self._known_children()
        # Parents before their children: what is to become of a run decides on all below it.
        for run in sorted(tagged, key=lambda run: len(_identity.path_of(run.labels))):
            path = _identity.path_of(run.labels)
            top = next((run_id for run_id in path if run_id in tops), None)
            if top is None or run.id in tops or not _identity.is_below(run.labels, top):
                continue
            if not _identity.is_ours(run):
                continue
            between = path[path.index(top) + 1 :]
            if not any(self._targets.is_left_alone(run_id) for run_id in between):
                self._take_run(run, children, depth=len(between) + 1)

    # -- by parent link ---------------------------------------------------------------------

    async def _find_linked(self) -> None:
        self._note_finished()
        live = self._note_over()
        tops, is_left_alone = self._mandate.tops, self._targets.is_left_alone
        await self._search.below(tops, live, self._take_page, is_left_alone)

    def _note_finished(self) -> None:
        """Note the children that were over; what a detached one has left is nobody's to end."""
        finished, cause = list(self._finished()), self._mandate.cause
        if self._noted == (len(finished), cause):  # there may be 100,000
            return
        for each in finished:
            if each.flow_run_id is not None:
                self._ended.add(each.flow_run_id)
                self._note_ended(each.flow_run_id, each.ended_at, each.had_process)
                if each.cancel_reason is None and each.action(cause) == "detach":
                    self._targets.spared.add(each.flow_run_id)
        self._noted = len(finished), cause

    def _note_over(self) -> set[UUID]:
        """Note what else is over; return the runs that are known and may launch something."""
        live = set()
        ends = [(child.flow_run, _end_of(child)) for child in self._children()]
        ends += [(target.run, target.over_since) for target in self._targets]
        for run, at in ends:
            if run is not None and at is not None:
                self._note_ended(run.id, at, has_process(run))
            elif run is not None:
                live.add(run.id)
        return live

    def _note_ended(self, run_id: UUID, at: datetime, had_process: bool) -> None:
        self._search.add_over(run_id, at if had_process else None)
        if had_process:
            self._targets.gone.add(run_id)

    async def _take_page(self, page: list[FlowRun], depth: int) -> None:
        """Take up what lives among the runs of a page, unless it is known."""
        self._grace.allow_time_to_ask()  # the server answers
        new = [run for run in page if self._may_be_new(run)]
        linked = [run for run in new if self._needs_parent(run)]
        parents = await self._api.read_parents(linked) if linked else {}
        detached = [run.id for run in page if run.labels.get(_identity.DETACHED)]
        self._targets.spare(detached)
        gone = {run.id for run in page if is_over(run) and has_process(run)}
        self._targets.gone |= gone.difference(detached)
        known = self._known_children() if new else set()
        for run in new:
            self._take_run(run, known, depth=depth, parent_id=parents.get(run.id))

    def _may_be_new(self, run: FlowRun) -> bool:
        is_known = run.id in self._ended or self._targets.of_run(run.id) is not None
        return not is_known and not is_over(run)

    def _needs_parent(self, run: FlowRun) -> bool:
        """Whether only its parent tells what a run belongs to: which process, or which top."""
        is_of_several = len(self._mandate.tops) > 1 and not _identity.path_of(run.labels)
        return is_of_several or not has_process(run)

    # -- either -----------------------------------------------------------------------------

    def _take_run(
        self,
        run: FlowRun,
        children: set[object],
        *,
        depth: int,
        parent_id: UUID | None = None,
    ) -> None:
        """Take up a run that was found on the server, unless it is detached or known.

        Args:
            run: The run.
            children: What has a target of its own, see `_known_children`.
            depth: Levels below the top.
            parent_id: Its parent, where its labels do not say and it matters.
        """
        if run.id in self._in_body():
            return
        is_known = run.id in self._targets.spared or self._targets.of_run(run.id) is not None
        if is_known or run.labels.get(_identity.DETACHED):
            return
        if run.id in children or _identity.spawn_of(run.labels) in children:
            return  # its own target
        action = self._mandate.action_for_run(run, depth)
        if action == "detach" or (action == "wait" and not self._mandate.can_wait):
            self._targets.spared.add(run.id)
            if action == "detach":
                self._to_cut_loose.append(run)
            return
        above = self._runs_above(run, parent_id)
        self._targets.add(
            Target(name=run.name, depth=depth, action=action, run=run, state=run.state, above=above)
        )

    def _runs_above(self, run: FlowRun, parent_id: UUID | None) -> frozenset[UUID]:
        above = frozenset(_identity.path_of(run.labels))
        if parent_id is None:
            return above
        parent = self._targets.of_run(parent_id)
        return above | {parent_id} | (parent.above if parent is not None else frozenset())

    def _known_children(self) -> set[object]:
        """Return the runs of the direct children, and the spawns that have not been answered."""
        run_id = self._mandate.lineage.run_id
        return {
            child.flow_run_id or (run_id, child.key, child.generation)
            for child in self._children()
            if child.flow_run_id is not None or not child.is_over
        }


def _end_of(child: Child[Any]) -> datetime | None:
    """Return when a child was over; `None` if its run may go on."""
    return None if child.outcome in {"abandoned", "detached"} else child.ended_at
