"""Hooks into other people's engines.  Nothing happens on import: each has install() and uninstall()."""

from __future__ import annotations

import importlib.metadata
import os

__all__ = ["describe"]

#: Engine, its plug-in group, the variable that switches moealign on, the releases that it was tested with.
_ENGINES = (
    ("vllm", "vllm.general_plugins", "MOEALIGN_VLLM", "0.33."),
    ("sglang", "sglang.srt.plugins", "MOEALIGN_SGLANG", "0.5."),
)


def describe() -> dict[str, str]:
    """For each engine one line: is it installed, would moealign's plug-in be on in its processes, and if not, why."""
    found = {}
    for engine, group, switch, tested in _ENGINES:
        try:
            version = importlib.metadata.version(engine)
        except importlib.metadata.PackageNotFoundError:
            found[engine] = "not installed"
            continue
        said = f"{version}: "
        if not any(point.value.startswith("moealign.") for point in importlib.metadata.entry_points(group=group)):
            said += f"off, moealign is not installed with its entry point in {group}: pip install moealign"
        elif os.environ.get(switch) != "1":
            said += f"off, {switch}=1 switches it on"
        else:
            said += "on in every process that has this environment"
        found[engine] = said if version.startswith(tested) else f"{said}; tested with {tested}x"
    return found
