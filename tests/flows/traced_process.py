"""A child in a process of its own, traced: `python traced_process.py FOLDER`."""

import asyncio
import sys

from traced import crunch

from supervised import supervised_flow, supervisor


@supervised_flow(flow_run_name="dawn")
async def dawn(folder: str) -> str:
    """Its module configures no SDK; the one that it imports does, in both processes."""
    return await supervisor.spawn(crunch, {"folder": folder}, name="crunch", isolation="process")


if __name__ == "__main__":
    assert asyncio.run(dawn(sys.argv[1])) == "numbers"
