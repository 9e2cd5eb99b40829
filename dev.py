#!/usr/bin/env python3
"""Everything a newcomer or CI runs, from a bare Python: it makes its own environment.

    python3 dev.py demo           a tree of real processes is cancelled, on a real server
    python3 dev.py test           the full test suite
    python3 dev.py test --fast    what needs no server, in well under two minutes
    python3 dev.py matrix         every way a parent ends, on SQLite and PostgreSQL: 15 minutes
    python3 dev.py check          lint and types

Anything after `test` or `matrix` goes on to pytest. The environment is `.venv` in this folder;
delete it to start afresh.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
MINIMUM = (3, 10)


def main(arguments: list[str]) -> int:
    if sys.version_info < MINIMUM:
        say(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")
        return 2
    command, *rest = arguments or ["--help"]
    if command == "demo":
        prepare("demo")
        return run([str(PYTHON), "examples/demo/demo.py", *rest])
    if command == "test":
        prepare("test")
        return run_tests(pytest_options(rest))
    if command == "matrix":
        prepare("test")
        return run_tests(["-m", "matrix", "-v", *rest])
    if command == "check":
        prepare("lint")
        return check()
    say(__doc__ or "")
    return 0 if command in {"-h", "--help"} else 2


def run_tests(options: list[str]) -> int:
    """Run pytest in a temporary folder that is removed afterwards: it would keep its own."""
    with tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as folder:
        return run([str(PYTHON), "-m", "pytest", "--basetemp", f"{folder}/pytest", *options])


def pytest_options(rest: list[str]) -> list[str]:
    """Two workers, each with a server of its own: most of the time the tests wait for processes."""
    workers = ["-n", "2", "--dist", "loadfile"]
    if "--fast" in rest:
        rest = [option for option in rest if option != "--fast"]
        return ["-m", "not server and not long", *workers, *rest]
    return ["-m", "not matrix", *workers, *rest]


def check() -> int:
    tools = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["codespell_lib"])
    tools += (["mypy"], ["pyright", "--pythonpath", str(PYTHON)])
    results = []
    for tool in tools:
        say(f"-- {' '.join(tool)}")
        results.append(run([str(PYTHON), "-m", *tool]))
    return max(results)


def run(command: list[str]) -> int:
    """Run in the foreground; Ctrl-C reaches the command, which cleans up, and then us."""
    process = subprocess.Popen(command, cwd=HERE)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


# -- the environment ------------------------------------------------------------------------------


def prepare(group: str) -> None:
    """Install the package and one dependency group into `.venv`, once for each state of both."""
    stamp = VENV / f".installed-{group}"
    state = hashlib.sha256((HERE / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == state:
        return
    if not PYTHON.exists():
        with progress("making an environment in .venv"):
            create_environment()
    with progress(f"installing the package and what '{group}' needs"):
        pip("install", "--upgrade", "pip>=25.1")
        pip("install", "--editable", ".", "--group", group)
    stamp.write_text(state)


def create_environment() -> None:
    """Make a virtual environment, also where Python came without `ensurepip` (Debian)."""
    made = quietly([sys.executable, "-m", "venv", str(VENV)])
    if made != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        must([sys.executable, "-m", "venv", "--without-pip", str(VENV)])
        must([sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "pip"])


def pip(*arguments: str) -> None:
    must([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments])


def quietly(command: list[str], log: Path | None = None) -> int:
    with (log or Path(os.devnull)).open("wb") as output:
        return subprocess.call(command, cwd=HERE, stdout=output, stderr=subprocess.STDOUT)


def must(command: list[str]) -> None:
    """Run a command without its chatter; end with its last lines if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        if quietly(command, log) != 0:
            say("\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]))
            raise SystemExit(f"failed: {' '.join(command)}")


# -- talking --------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Say what goes on and for how long: in place on a terminal, now and then elsewhere."""
    began, over = time.monotonic(), threading.Event()
    live = sys.stdout.isatty()
    say_again = "\r" if live else "\n"

    def tick() -> None:
        while not over.wait(1 if live else 15):
            waited = time.monotonic() - began
            print(f"{say_again}{what} ... {waited:.0f} s", end="", flush=True)

    print(f"{what} ...", end="", flush=True)
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()
        print(f"{say_again}{what}: {time.monotonic() - began:.0f} s    ", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
