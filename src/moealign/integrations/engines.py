"""What the drop-ins for serving engines share: plug-in lookup, rebinding of names, counts and the trace recorder.

A drop-in is a module beside this file: ``install()`` replaces the engine's functions and returns their names,
``uninstall()`` restores them, ``calls()``, ``layers()`` and ``metrics()`` return the counts so far, and ``plugin()`` is
the entry point, which installs what the drop-in's environment variable says: 1, the alignment; layer, whole layers too.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import TraceError

__all__ = [
    "ENGINES",
    "MODES",
    "Engine",
    "count_layer",
    "enabled",
    "follow_log",
    "layers",
    "leave",
    "metrics",
    "mode",
    "rebind",
    "start_trace",
    "status",
    "told",
    "whole_layers",
    "write_trace",
]

logger = logging.getLogger(__name__)


class Engine(NamedTuple):
    """Where one engine looks for plug-ins, and the variables that control ours."""

    package: str  # on the package index
    group: str  # of entry points
    variable: str  # one of MODES enables our entry point
    allowed: str  # the engine's own variable: names of the plug-ins it may load; unset allows all
    title: str  # in messages
    layers: tuple[str, ...]  # releases whose whole layers we can run


ENGINES = {
    "vllm": Engine("vllm", "vllm.general_plugins", "MOEALIGN_VLLM", "VLLM_PLUGINS", "vLLM", ("0.31", "0.32", "0.33")),
    "sglang": Engine("sglang", "sglang.srt.plugins", "MOEALIGN_SGLANG", "SGLANG_PLUGINS", "SGLang", ("0.5.23",)),
}
ENTRY_POINT = "moealign"  #: our name in both groups
MODES = ("1", "layer")  #: values of an engine's variable that switch its drop-in on

#: Calls in this process by (engine, function, who computed the result: "moealign" or the engine).
call_counts: Counter[tuple[str, str, str]] = Counter()
#: Calls left to the engine by (engine, function, reason).
left_counts: Counter[tuple[str, str, str]] = Counter()
#: Layers built in this process by (engine, reason why the engine runs it; "" for ours).
layer_counts: Counter[tuple[str, str]] = Counter()

#: The recorder of this process (:mod:`~moealign.integrations.recording`), None unless ``MOEALIGN_TRACE`` is set.
recorder: Any = None


def mode(name: str) -> str | None:
    """The value of the environment variable of engine `name` if it is one of `MODES`, else None."""
    value = os.environ.get(ENGINES[name].variable)
    return value if value in MODES else None


def enabled(name: str) -> bool:
    """Whether the environment variable of engine `name` is 1 or layer."""
    return mode(name) is not None


def whole_layers(name: str) -> str | None:
    """Why we cannot run whole layers of the installed release of engine `name`; None if we can.

    A release's layers are run only if its source was read: a layer has more conditions than its arguments show.
    """
    engine = ENGINES[name]
    try:
        release = importlib.metadata.version(engine.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{engine.package} is not installed"
    if any(re.match(rf"{re.escape(known)}(?!\d)", release) for known in engine.layers):
        return None
    return f"expected {engine.package} {', '.join(engine.layers)} for whole layers, got {release}"


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
    if mode(name) == "1":
        return f"on: {release}, {engine.variable}=1"
    reason = whole_layers(name)
    scope = "whole layers" if reason is None else f"the alignment alone: {reason}"
    return f"on: {release}, {engine.variable}=layer, {scope}"


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


# ---- counts ------------------------------------------------------------------------------------------------------


def leave(name: str, function: str, reason: str) -> None:
    """Count a call of `function` that engine `name` computes itself, and log the first one of each reason."""
    kind = reason.partition(", got ")[0]  # without the sizes of this call
    call_counts[name, function, name] += 1
    left_counts[name, function, kind] += 1
    if left_counts[name, function, kind] == 1:
        title = ENGINES[name].title
        logger.warning("moealign leaves a call of %s to %s (logged once): %s", function, title, reason)


def count_layer(name: str, layer: str, reason: str | None) -> None:
    """Count a layer that was built in engine `name`: ours, or the engine's for `reason`; log the first one of each."""
    key = (name, reason or "")
    layer_counts[key] += 1
    if layer_counts[key] > 1:
        return
    if reason is None:
        logger.info("moealign runs whole layers of %s, %s the first (logged once)", ENGINES[name].title, layer)
    else:
        logger.warning("moealign leaves %s to %s (logged once): %s", layer, ENGINES[name].title, reason)


def layers(name: str) -> dict[str, Any]:
    """``{"moealign": layers of engine `name` that we run, name: {reason: layers left to the engine}}``."""
    found = sorted((reason, count) for (engine, reason), count in layer_counts.items() if engine == name)
    theirs = {reason: count for reason, count in found if reason}
    return {"moealign": layer_counts[name, ""], name: theirs}


def _label(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def metrics(name: str) -> str:
    """The counts of engine `name` in this process, in the text format that Prometheus reads (version 0.0.4)."""
    layer_lines = [
        f'moealign_layers{{engine="{name}",by="{name if reason else "moealign"}",reason="{_label(reason)}"}} {count}'
        for (engine, reason), count in sorted(layer_counts.items())
        if engine == name
    ]
    call_lines = [
        f'moealign_calls_total{{engine="{name}",function="{function}",by="{who}"}} {count}'
        for (engine, function, who), count in sorted(call_counts.items())
        if engine == name
    ]
    left_lines = [
        f'moealign_left_total{{engine="{name}",function="{function}",reason="{_label(reason)}"}} {count}'
        for (engine, function, reason), count in sorted(left_counts.items())
        if engine == name
    ]
    text = ""
    for metric, kind, meaning, lines in (
        ("moealign_layers", "gauge", "MoE layers built, by who runs them", layer_lines),
        (
            "moealign_calls_total",
            "counter",
            "Calls in Python, by who computed them; replays of CUDA graphs are none",
            call_lines,
        ),
        ("moealign_left_total", "counter", "Calls left to the engine, by reason", left_lines),
    ):
        text += "".join(f"{line}\n" for line in (f"# HELP {metric} {meaning}.", f"# TYPE {metric} {kind}", *lines))
    return text


def follow_log(name: str) -> None:
    """Let our messages go where those of engine `name` go, unless the process has configured our logger.

    vLLM configures a logger of its own instead of the root, whose messages below a warning nobody sees.
    """
    ours = logging.getLogger("moealign")
    if not ours.handlers and ours.level == logging.NOTSET:
        ours.parent = logging.getLogger(name)


# ---- names -------------------------------------------------------------------------------------------------------


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
