"""A flow that a worker runs from a bundle: all that it needs of this module travels with it."""

import os
import time
from pathlib import Path

import prefect.runtime
from prefect import flow


@flow(persist_result=True)
def bundled(folder: str) -> int:
    (Path(folder) / f"{prefect.runtime.flow_run.id}.pid").write_text(str(os.getpid()))
    while not (Path(folder) / "finish").exists():
        time.sleep(0.05)
    return 42
