"""Serve the test flows from one runner: `python serve.py [NAME]`."""

import sys

import prefect
import tree

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "test"
    prefect.serve(*(flow.to_deployment(name) for flow in tree.SERVED), limit=64)
