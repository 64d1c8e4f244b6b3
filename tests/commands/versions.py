#!/usr/bin/env python3
"""The tests under other versions of what moealign builds on, each in an environment of its own.

    python tests/commands/versions.py                              # every row, into benchmarks/results/versions.csv
    python tests/commands/versions.py --only torch-2.11            # one row; the others of the file stay
    python tests/commands/versions.py --only torch-2.11 --no-write # to look, not to keep

Environments are made in ``.versions/NAME``, one at a time, and removed after their tests unless ``--keep`` is given.
An environment that is there already is used as it is and stays.  A row whose Python is not on this machine is skipped
with a word.  The exit status is 1 if a test failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "benchmarks" / "results" / "versions.csv"
RECORDED = ("torch", "transformers", "triton", "numba", "numpy")
COLUMNS = ("name", "python", *RECORDED, "passed", "failed", "skipped", "date")

#: What the tests need, in the newest release unless a row pins it.
NEEDED = (
    "numpy",
    "numba",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
    "hypothesis",
    "pytest",
    "pytest-xdist",
    "accelerate",
)
CORE = (
    "tests/layout/test_contract.py",
    "tests/layout/test_ops.py",
    "tests/package/test_modes.py",
    "tests/layout/test_refusals.py",
    "tests/layout/test_views.py",
    "tests/router/test_routing.py",
    "tests/router/test_route_options.py",
    "tests/router/test_balance.py",
    "tests/experts/test_experts.py",
    "tests/experts/test_activations.py",
    "tests/experts/test_quantized.py",
    "tests/integrations/test_transformers.py",
    "tests/integrations/test_replay.py",
    "tests/backends/test_cpu.py",
)
MODELS = (
    "tests/integrations/test_transformers.py",
    "tests/integrations/test_replay.py",
    "tests/parallel/test_parallel.py::test_transformers_own_expert_parallel_plan",
)
KERNELS = (
    "tests/backends/test_triton.py",
    "tests/experts/test_experts_triton.py",
    "tests/experts/test_quantized_triton.py",
    "tests/router/test_routing_triton.py",
    "tests/parallel/test_exchange_triton.py",
)
COMMANDS = (
    "tests/tools/test_cli.py",
    "tests/tools/test_bench.py",
    "tests/tools/test_report.py",
    "tests/experts/test_tune.py",
)
DEVELOPMENT = "torch==2.13.*"
TORCHES = ("2.10", "2.11", "2.12", "2.14", "2.15")  # beside the development one


class Row(NamedTuple):
    """One environment: what pip installs, what it installs beside that whatever torch asks for, and what runs there."""

    name: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    beside: tuple[str, ...] = ()


#: The lower bounds of pyproject.toml; click 8.1 is what typer 0.15 came with.
OLDEST = (
    "torch==2.10.*",
    "numba==0.61.*",
    "numpy==1.26.*",
    "transformers==5.16.*",
    "typer==0.15.*",
    "click==8.1.*",
    "rich==13.*",
    "matplotlib==3.9.*",
)
ROWS = {
    row.name: row
    for row in (
        *(Row(f"torch-{v}", (f"torch=={v}.*", "transformers==5.24.*"), (*CORE, *KERNELS)) for v in TORCHES),
        *(Row(f"transformers-{v}", (DEVELOPMENT, f"transformers=={v}.*"), MODELS) for v in ("5.16", "5.20", "5.24")),
        Row("triton-newest", (DEVELOPMENT,), KERNELS, beside=("triton",)),
        *(Row(f"python-{v}", (DEVELOPMENT, "transformers==5.24.*"), (*CORE, *KERNELS), v) for v in ("3.12", "3.13")),
        Row("oldest", OLDEST, (*CORE, *KERNELS, *COMMANDS), "3.10"),
    )
}


def interpreter(version: str) -> str | None:
    """A Python of `version` that can make an environment: this one, one on PATH, or pyenv's; None without one."""
    on_path = (shutil.which(f"python{version}", path=folder) for folder in os.get_exec_path())
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for path in (sys.executable, *on_path, *pyenv):
        if path is not None:
            done = subprocess.run([path, "-c", code], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip() == version:
                return str(path)
    return None


def make(row: Row, python: str, home: Path) -> None:
    """Make the environment of `row` in `home`, or leave nothing there.

    Raises:
        subprocess.CalledProcessError: pip found no such versions, or could not install them.
    """
    pinned = {package.split("=")[0] for package in row.packages}
    install = [
        home / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-cache-dir",
    ]
    packages = [*row.packages, *(each for each in NEEDED if each not in pinned)]
    environment = {**os.environ, "PIP_CONSTRAINT": ""}
    try:
        subprocess.run([python, "-m", "venv", home], check=True)
        subprocess.run([*install, *packages], check=True, env=environment)
        if row.beside:
            subprocess.run([*install, "--no-deps", "--upgrade", *row.beside], check=True, env=environment)
        (home / ".ready").touch()
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def installed(python: Path) -> dict[str, str]:
    """Versions of Python and of `RECORDED` there; "-" for what is not."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **{n: found.get(n, '-') for n in sys.argv[1:]}}))"
    )
    done = subprocess.run([python, "-c", code, *RECORDED], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def run(python: Path, tests: Iterable[str], workers: int = min(os.cpu_count() or 1, 8)) -> dict[str, int]:
    """Run `tests` with `python`; how many passed, failed and were skipped.  A run that dies counts as one failure."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        command += ["-n", str(workers), "--dist", "worksteal"]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        died = status != 0 or not report.exists()
        total = failed = skipped = 0
        if report.exists():
            for suite in ElementTree.parse(report).iter("testsuite"):
                total += int(suite.get("tests", 0))
                failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
                skipped += int(suite.get("skipped", 0))
    passed = max(total - failed - skipped, 0)
    return {"passed": passed, "failed": max(failed, int(died)), "skipped": skipped}


def measure(row: Row, folder: Path, keep: bool) -> dict[str, str] | None:
    """The line of `row`; None if its Python is not here.

    Raises:
        subprocess.CalledProcessError: the environment could not be made.
        FileExistsError: an environment is there that was never finished.
    """
    home = folder / row.name
    mine = not home.exists()
    if mine:
        found = interpreter(row.python)
        if found is None:
            return None
        make(row, found, home)
    elif not (home / ".ready").exists():
        raise FileExistsError(f"{home}: expected an environment with a file .ready, got an unfinished one; remove it")
    python = home / "bin" / "python"
    try:
        counts = {name: str(count) for name, count in run(python, row.tests).items()}
        return {"name": row.name, **installed(python), **counts, "date": datetime.date.today().isoformat()}
    finally:
        if mine and not keep:
            shutil.rmtree(home)


def merge(path: Path, line: dict[str, str]) -> None:
    """Write `line` into the file in place of the one of that name; lines stand in the order of `ROWS`."""
    held = {}
    if path.exists():
        with path.open(newline="") as source:
            held = {each["name"]: each for each in csv.DictReader(source)}
    held[line["name"]] = line
    with path.open("w", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(held[name] for name in ROWS if name in held)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", action="append", choices=list(ROWS), help="one row; may be repeated (default: all)")
    parser.add_argument("--root", type=Path, default=ROOT / ".versions", help="where environments are kept")
    parser.add_argument("--keep", action="store_true", help="leave the environments that this run makes")
    parser.add_argument("--no-write", action="store_true", help=f"leave {OUTPUT.relative_to(ROOT)} as it is")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the file of results")
    args = parser.parse_args(arguments)

    failures = 0
    for row in [ROWS[name] for name in args.only or ROWS]:
        print(f"{row.name}: Python {row.python}, {', '.join((*row.packages, *row.beside))}", flush=True)
        try:
            line = measure(row, args.root.resolve(), args.keep)
        except (subprocess.CalledProcessError, FileExistsError) as error:
            print(f"{row.name}: {error}", flush=True)
            failures += 1
            continue
        if line is None:
            print(f"{row.name}: skipped, this machine has no Python {row.python}", flush=True)
            continue
        failures += int(line["failed"])
        print(f"{row.name}: {line['passed']} passed, {line['failed']} failed, {line['skipped']} skipped", flush=True)
        if not args.no_write:
            merge(args.output, line)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
