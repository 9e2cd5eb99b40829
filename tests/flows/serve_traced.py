"""Serve the traced flows from one runner under a name: `python serve_traced.py NAME`."""

import sys

import prefect
import traced

if __name__ == "__main__":
    prefect.serve(*(flow.to_deployment(sys.argv[1]) for flow in traced.SERVED), limit=64)
