"""Which backend takes a call: the tensor's device chooses, each backend may refuse with a reason.

A backend asked for by name (an argument, or MOEALIGN_BACKEND) never falls back to another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType

import torch

from .backends import TABLE, load
from .errors import BackendUnavailable
from .layout import Problem, Routing

__all__ = ["Explanation", "backends", "choose", "choose_route", "explain_problem"]

#: The backend for calls that name none.  Read once, at import: looking at the environment costs a call a microsecond.
FROM_ENVIRONMENT = os.environ.get("MOEALIGN_BACKEND") or None


@dataclass(frozen=True)
class Explanation:
    """Who takes a call, and why each other backend does not.  ``str()`` of it is meant to be printed."""

    backend: str | None  #: the name of the backend that takes the call, None if nobody does
    reasons: dict[str, str | None]  #: for every backend the reason why it refuses, None if it could take the call
    note: str  #: what to expect of a first call (a compilation, a cache), may be empty
    requested: str | None = None  #: the backend asked for by name

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = []
        for name, reason in self.reasons.items():
            if name == self.backend:
                said = "chosen" + (" by name" if self.requested else "") + (f"; {self.note}" if self.note else "")
            elif reason is None:
                said = "could, " + (f"but {self.requested} was asked for" if self.requested else "but comes later")
            else:
                said = f"refuses: {reason}"
            lines.append(f"{name:<{width}}  {said}")
        return "\n".join(lines)


def backends() -> dict[str, str | None]:
    """Every backend by name, in the order in which a call tries them: None if it runs here, else the reason."""
    return {name: load(name).unavailable() for name in TABLE}


def check_name(backend: str | None) -> str | None:
    """The backend that a call asks for, by itself or by MOEALIGN_BACKEND; None where it asks for none."""
    name = backend or FROM_ENVIRONMENT
    if name is not None and (not isinstance(name, str) or name not in TABLE):
        source = "backend" if backend else "MOEALIGN_BACKEND"
        raise BackendUnavailable(f"{source}: expected one of {', '.join(TABLE)}, got {name!r}")
    return name


def _reason(module: ModuleType, problem: Problem) -> str | None:
    """Why `module` does not take `problem`, None if it does."""
    reason: str | None = module.unavailable() or module.refuses(problem)
    return reason


def choose(problem: Problem, backend: str | None = None) -> ModuleType:
    """The module that takes `problem`: the one named, or the first in the table that does not refuse."""
    name = check_name(backend)
    if name is None:
        return next(module for module in map(load, TABLE) if _reason(module, problem) is None)
    module = load(name)
    reason = _reason(module, problem)
    if reason is not None:
        raise BackendUnavailable(f"backend: expected one that can take this call, got {name!r}: {reason}")
    return module


def choose_route(routing: Routing, backend: str | None = None) -> ModuleType:
    """The module that scores and chooses for `routing`: as :func:`choose`, among those that have a router."""
    name = check_name(backend)
    routes = routing.tokens * routing.top_k
    problem = Problem("align", routing.device, torch.int32, routes, routing.top_k, routing.num_experts, 1)
    for each in TABLE if name is None else (name,):
        module = load(each)
        reason = _reason(module, problem) or (None if hasattr(module, "route") else "it has no router")
        if reason is None and hasattr(module, "refuses_route"):
            reason = module.refuses_route(routing)
        if reason is None:
            return module
    raise BackendUnavailable(f"backend: expected one that can take this call, got {name!r}: {reason}")


def explain_problem(problem: Problem, backend: str | None = None) -> Explanation:
    """What :func:`choose` would do with `problem`, told instead of done."""
    name = check_name(backend)
    reasons = {each: _reason(load(each), problem) for each in TABLE}
    candidates = [each for each in TABLE if reasons[each] is None and name in (None, each)]
    chosen = candidates[0] if candidates else None
    return Explanation(chosen, reasons, load(chosen).note(problem) if chosen else "", name)
