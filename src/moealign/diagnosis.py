"""What this installation is: versions, devices, backends, engines and environment variables.  Needs no extra."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .alignment import explain
from .backend.cache import cache_folder
from .calls.dispatch import backends
from .errors import InvalidInput, MoealignError
from .experts.tiles import parse_tuning
from .integrations.engines import ENGINES, MODES, status
from .integrations.recording import LIMITS, limit_of
from .terminal import escape, paragraph

__all__ = ["VARIABLES", "device_of", "facts", "problems", "show", "tuning_problem", "warnings"]

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "triton",
    "cuda-core",
    "transformers",
    "safetensors",
    "matplotlib",
    "rich",
    "typer",
)


def device_of(backend: str) -> torch.device:
    """The device on which the command line runs `backend`."""
    return torch.device("cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")


# ---- environment variables ---------------------------------------------------------------------------------------


def _backend(value: str) -> str | None:
    names = backends()
    if value not in names:
        return f"expected one of {', '.join(names)}, got {value!r}"
    return names[value] and f"expected a backend that is available here, got {value!r}: {names[value]}"


def _threads(value: str) -> str | None:
    try:
        valid = int(value) >= 1
    except ValueError:
        valid = False
    return None if valid else f"expected a whole number from 1 on, got {value!r}"


def _trace(value: str) -> str | None:
    path = Path(value).absolute()
    if path.is_dir():
        return f"expected a file to write, got the folder {value!r}"
    return None if path.parent.is_dir() else f"expected a path in a folder that exists, got {value!r}"


def _limit(name: str, value: str) -> str | None:
    try:
        limit_of(name, value)
    except InvalidInput as error:
        return str(error).removeprefix(f"{name}: ")
    return None


def _cache(value: str) -> str | None:
    exists = os.path.lexists(value)
    return f"expected a folder, got the file {value!r}" if exists and not os.path.isdir(value) else None


def tuning_problem(value: str) -> str | None:
    """What is wrong with the tuning file at `value`; None if nothing, or if there is no file yet."""
    path = Path(value)
    if path.is_dir():
        return f"expected a tuning file, got the folder {value!r}"
    try:
        parse_tuning(path.read_bytes())
    except FileNotFoundError:
        return None  # `moealign tune` writes it
    except (OSError, ValueError) as error:
        return f"expected a tuning file, got {value!r}: {type(error.__cause__ or error).__name__}"
    return None


def _switch(value: str) -> str | None:
    return None if value in ("0", *MODES) else f"expected 1, layer or 0, got {value!r}"


#: Every variable that the package reads, and what is wrong with a value of it, None if nothing.
VARIABLES: dict[str, Callable[[str], str | None]] = {
    "MOEALIGN_BACKEND": _backend,
    "MOEALIGN_NUM_THREADS": _threads,
    "MOEALIGN_CACHE_DIR": _cache,
    "MOEALIGN_TUNING": tuning_problem,
    "MOEALIGN_TRACE": _trace,
    **{name: functools.partial(_limit, name) for name in LIMITS},
    **{engine.variable: _switch for engine in ENGINES.values()},
}


def problems() -> list[str]:
    """What is wrong with the environment variables, one line each.  An empty variable counts as not set."""
    lines = []
    for name, check in VARIABLES.items():
        value = os.environ.get(name)
        if value and (wrong := check(value)):
            lines.append(f"{name}: {wrong}")
    return lines


def warnings() -> list[str]:
    """What makes commands slower but stops none, one line each."""
    value = os.environ.get("MOEALIGN_CACHE_DIR")
    if (value and _cache(value)) or cache_folder() is not None:  # a file is a problem
        return []
    got = repr(value) if value else "another one in its default place"
    return [f"MOEALIGN_CACHE_DIR: expected a folder that only you can write, got {got}; every process compiles kernels"]


# ---- everything --------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    return devices


def _backend_facts() -> dict[str, dict[str, Any]]:
    answers = {}
    for name, reason in backends().items():
        detail = reason or ""
        if reason is None:
            ids = torch.zeros(1, 8, dtype=torch.int32, device=device_of(name))
            try:
                detail = explain(ids, block_size=16, num_experts=64, backend=name).note
            except MoealignError as error:
                detail = str(error)
        answers[name] = {"available": reason is None, "detail": detail}
    return answers


def facts() -> dict[str, Any]:
    """Everything that ``moealign info`` prints, as JSON values; docs/cli.md lists the keys."""
    unknown = sorted(name for name in os.environ if name.startswith("MOEALIGN_") and name not in VARIABLES)
    return {
        "moealign": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "backends": _backend_facts(),
        "engines": {name: status(name) for name in ENGINES},
        "environment": {name: os.environ.get(name) or None for name in VARIABLES},
        "unknown_variables": unknown,
        "problems": problems(),
        "warnings": warnings(),
    }


def _section(title: str, lines: dict[str, str]) -> None:
    print(title)
    indent = max(map(len, lines)) + 4
    for name, text in lines.items():
        print(paragraph(f"  {name:<{indent - 4}}  {escape(text)}", indent=indent))
    print()


def _list(lines: list[str]) -> None:
    for line in lines:
        print(paragraph(f"  {escape(line)}", indent=4))


def show(as_json: bool = False) -> int:
    """Print the facts; returns the exit status, 1 if there is a problem."""
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return 1 if found["problems"] else 0
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"  # in words: platform() is one long one
    own = {"moealign": found["moealign"], "Python": found["python"], "platform": system}
    _section("Versions", own | {name: version or "not installed" for name, version in found["packages"].items()})
    _section("Devices", found["devices"])
    states = {}
    for name, backend in found["backends"].items():
        state = "available" if backend["available"] else "unavailable"
        states[name] = f"{state}: {backend['detail']}" if backend["detail"] else state
    _section("Backends, in the order in which a call tries them", states)
    _section("Engines, in processes started from here", found["engines"])
    variables = {name: value or "not set" for name, value in found["environment"].items()}
    variables |= dict.fromkeys(found["unknown_variables"], "unknown: moealign does not read it")
    _section("Environment", variables)
    if found["warnings"]:
        print("Warnings: every command runs")
        _list(found["warnings"])
        print()
    if not found["problems"]:
        print("No problems.")
        return 0
    print("Problems: every other command refuses to run until they are solved")
    _list(found["problems"])
    return 1
