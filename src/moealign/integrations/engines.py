"""What the drop-ins for serving engines share: plug-in lookup, rebinding of names, call counts and the trace recorder.

A drop-in is a module beside this file with four functions: ``install()`` replaces the engine's functions and returns
their names, ``uninstall()`` restores them, ``calls()`` returns the calls so far, and ``plugin()`` is the entry point,
which installs only if the drop-in's environment variable is 1.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import TraceError

__all__ = ["ENGINES", "Engine", "enabled", "rebind", "start_trace", "status", "told", "write_trace"]


class Engine(NamedTuple):
    """Where one engine looks for plug-ins, and the variables that control ours."""

    package: str  # on the package index
    group: str  # of entry points
    variable: str  # 1 enables our entry point
    allowed: str  # the engine's own variable: names of the plug-ins it may load; unset allows all


ENGINES = {
    "vllm": Engine("vllm", "vllm.general_plugins", "MOEALIGN_VLLM", "VLLM_PLUGINS"),
    "sglang": Engine("sglang", "sglang.srt.plugins", "MOEALIGN_SGLANG", "SGLANG_PLUGINS"),
}
ENTRY_POINT = "moealign"  #: our name in both groups

#: Calls in this process by (engine, function, who computed the result: "moealign" or the engine).
call_counts: Counter[tuple[str, str, str]] = Counter()

#: The recorder of this process (:mod:`~moealign.integrations.recording`), None unless ``MOEALIGN_TRACE`` is set.
recorder: Any = None


def enabled(name: str) -> bool:
    """Whether the environment variable of engine `name` is 1."""
    return os.environ.get(ENGINES[name].variable) == "1"


def status(name: str) -> str:
    """One line: whether processes of engine `name` started from this environment use moealign.  Imports no engine."""
    engine = ENGINES[name]
    try:
        release = f"{engine.package} {importlib.metadata.version(engine.package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"off: {engine.package} is not installed"
    if not any(point.name == ENTRY_POINT for point in importlib.metadata.entry_points(group=engine.group)):
        return (
            f"off: {release}, but no entry point of moealign in {engine.group}; install moealign, a path is not enough"
        )
    allowed = os.environ.get(engine.allowed)
    if allowed is not None and ENTRY_POINT not in (part.strip() for part in allowed.split(",")):
        return f"off: {release}, but {engine.allowed}={allowed!r} does not name {ENTRY_POINT}"
    if not enabled(name):
        return f"off: {release}; {engine.variable}=1 switches it on"
    return f"on: {release}, {engine.variable}=1"


told = status  # the earlier name


def start_trace(name: str) -> None:
    """Record the calls of engine `name` from now on, if ``MOEALIGN_TRACE`` names a file and none are recorded yet.

    Raises:
        InvalidInput: ``MOEALIGN_TRACE_MB`` or ``MOEALIGN_TRACE_LAYERS`` has an invalid value.
    """
    global recorder
    if os.environ.get("MOEALIGN_TRACE") and recorder is None:
        from .recording import recorder_from_environment

        recorder = recorder_from_environment(ENGINES[name].package)


def write_trace() -> Path:
    """Write what ``MOEALIGN_TRACE`` has recorded in this process so far, and return the file.  Recording goes on.

    The file is also written at exit, and whenever the recording has doubled from 1 MiB on.

    Raises:
        TraceError: nothing is recorded, or the file cannot be written.
    """
    if recorder is None:
        raise TraceError(
            "expected a drop-in that records, got none in this process; set MOEALIGN_TRACE before it is installed"
        )
    path: Path = recorder.write()
    return path


def rebind(old: Callable[..., Any], new: Callable[..., Any]) -> list[str]:
    """Bind to `new` every name of a loaded module that is `old`, by identity; returns ``module.name`` of each."""
    names = []
    for module_name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)
                    names.append(f"{module_name}.{name}")
    return sorted(names)
