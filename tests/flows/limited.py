"""Parents in processes of their own: `python limited.py SCENARIO FOLDER [DEPLOYMENT ...]`."""

import sys
import time

from tree import asked, mark

from supervised import supervised_flow, supervisor


@supervised_flow
def waits_for_the_server(folder, first, second):
    """Cancel one child while the server has asked for time with the launch of another."""
    running = supervisor.spawn(first)
    while running.flow_run_id is None:
        time.sleep(0.02)
    late = supervisor.spawn(second)
    while not asked(folder, "refused"):
        time.sleep(0.02)
    running.cancel()
    while late.flow_run_id is None:
        time.sleep(0.02)
    late.cancel()


@supervised_flow(deadline_seconds=15)
def has_fifteen_seconds(folder):
    supervisor.spawn("root/test", {"folder": folder, "children": []})
    mark(folder)
    time.sleep(60)


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    {flow.fn.__name__: flow for flow in (waits_for_the_server, has_fifteen_seconds)}[scenario](
        *arguments
    )
