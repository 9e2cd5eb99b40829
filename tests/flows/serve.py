"""Serve the test flows from one runner: `python serve.py`."""

import prefect
import tree

if __name__ == "__main__":
    prefect.serve(*(flow.to_deployment("test") for flow in tree.SERVED), limit=64)
