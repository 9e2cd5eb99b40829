"""The benchmarks keep step with what they measure, though they run by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DRAWS = {"compare"}  # with a library that the tests do without


def test_they_can_be_loaded():
    names = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - DRAWS)
    assert names
    code = "import " + ", ".join(names)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
