"""Where serving engines look for plug-ins, whether ours is on, and how names are rebound.

A drop-in is a module beside this file with ``install()``, which returns what it replaced, ``uninstall()``, which puts
everything back, ``plugin()``, the entry point that installs only if its environment variable is 1, and ``calls()``.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["ENGINES", "Engine", "swap_everywhere", "switched_on", "told"]


class Engine(NamedTuple):
    """Where one engine looks for plug-ins, and what switches ours on."""

    package: str  # on the package index
    group: str  # of entry points
    variable: str  # 1 switches our entry point on
    allowed: str  # the engine's own variable: names of the plug-ins it may load, all where it is not set


ENGINES = {
    "vllm": Engine("vllm", "vllm.general_plugins", "MOEALIGN_VLLM", "VLLM_PLUGINS"),
    "sglang": Engine("sglang", "sglang.srt.plugins", "MOEALIGN_SGLANG", "SGLANG_PLUGINS"),
}
ENTRY_POINT = "moealign"  #: our name in both groups

#: Calls by (engine, function, who took it: "moealign" or the engine), since this process started.
counted: Counter[tuple[str, str, str]] = Counter()


def switched_on(name: str) -> bool:
    """Whether the environment variable of engine `name` says 1."""
    return os.environ.get(ENGINES[name].variable) == "1"


def told(name: str) -> str:
    """Whether processes of engine `name` started from this environment use moealign, in a line.  Imports no engine."""
    engine = ENGINES[name]
    try:
        found = f"{engine.package} {importlib.metadata.version(engine.package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"off: {engine.package} is not installed"
    if not any(point.name == ENTRY_POINT for point in importlib.metadata.entry_points(group=engine.group)):
        return f"off: {found}, but no entry point of moealign in {engine.group}; install moealign, a path is not enough"
    allowed = os.environ.get(engine.allowed)
    if allowed is not None and ENTRY_POINT not in (part.strip() for part in allowed.split(",")):
        return f"off: {found}, but {engine.allowed}={allowed!r} does not name {ENTRY_POINT}"
    if not switched_on(name):
        return f"off: {found}; {engine.variable}=1 switches it on"
    return f"on: {found}, {engine.variable}=1"


def swap_everywhere(old: Callable[..., Any], new: Callable[..., Any]) -> list[str]:
    """Rebind every name of a loaded module that is bound to `old`, by identity, to `new`; ``module.name`` of each."""
    places = []
    for module_name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)
                    places.append(f"{module_name}.{name}")
    return sorted(places)
