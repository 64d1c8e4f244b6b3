"""Which backend takes a call: the first that runs on the tensor's device and does not refuse.

A backend requested by name (an argument, or MOEALIGN_BACKEND) never falls back to another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType

from ..backend import TABLE, load
from ..errors import BackendUnavailable
from ..problem import AlignProblem, RouteProblem

__all__ = ["Explanation", "backends", "check_name", "explain_problem", "select_backend", "select_fusing"]

#: The backend for calls that name none.  Read once, at import: reading the environment costs a microsecond a call.
FROM_ENVIRONMENT = os.environ.get("MOEALIGN_BACKEND") or None


@dataclass(frozen=True)
class Explanation:
    """Which backend takes a call, and why the others do not.  Print it."""

    backend: str | None  #: the name of the backend that takes the call, None if none does
    reasons: dict[str, str | None]  #: why each backend refuses; None if it could take the call
    note: str  #: what to expect of a first call (a compilation, a cache); may be empty
    requested: str | None = None  #: the backend requested by name

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = []
        for name, reason in self.reasons.items():
            if name == self.backend:
                verdict = "chosen" + (" by name" if self.requested else "") + (f"; {self.note}" if self.note else "")
            elif reason is None:
                verdict = (
                    f"available, but {self.requested} was requested" if self.requested else "available, lower priority"
                )
            else:
                verdict = f"refuses: {reason}"
            lines.append(f"{name:<{width}}  {verdict}")
        return "\n".join(lines)


def backends() -> dict[str, str | None]:
    """Every backend by name, in the order in which a call tries them: None if it runs here, else the reason."""
    return {name: load(name).unavailable() for name in TABLE}


def check_name(backend: str | None) -> str | None:
    """The backend that a call requests, by argument or by MOEALIGN_BACKEND; None if it requests none."""
    name = backend or FROM_ENVIRONMENT
    if name is not None and (not isinstance(name, str) or name not in TABLE):
        source = "backend" if backend else "MOEALIGN_BACKEND"
        raise BackendUnavailable(f"{source}: expected one of {', '.join(TABLE)}, got {name!r}")
    return name


def _reason(backend: ModuleType, problem: AlignProblem | RouteProblem) -> str | None:
    """Why `backend` does not take `problem`; None if it does."""
    reason: str | None = backend.unavailable() or backend.refuses(problem)
    return reason


def select_backend(problem: AlignProblem | RouteProblem, backend: str | None = None) -> ModuleType:
    """The package of the backend that takes `problem`: the one named, or the first in the table that accepts it."""
    name = check_name(backend)
    if name is None:
        return next(each for each in map(load, TABLE) if _reason(each, problem) is None)
    selected = load(name)
    reason = _reason(selected, problem)
    if reason is not None:
        raise BackendUnavailable(f"backend: expected one that can take this call, got {name!r}: {reason}")
    return selected


def select_fusing(problem: RouteProblem, backend: str | None = None) -> ModuleType | None:
    """The backend that takes `problem` with its options; None if it has none for them, so that they are composed."""
    name = check_name(backend)
    for each in map(load, TABLE if name is None else (name,)):
        if _reason(each, problem) is None:
            return each if each.FUSES_OPTIONS else None
    return None


def explain_problem(problem: AlignProblem, backend: str | None = None) -> Explanation:
    """What :func:`select_backend` would do with `problem`, and why."""
    name = check_name(backend)
    reasons = {each: _reason(load(each), problem) for each in TABLE}
    candidates = [each for each in TABLE if reasons[each] is None and name in (None, each)]
    selected = candidates[0] if candidates else None
    return Explanation(selected, reasons, load(selected).note(problem) if selected else "", name)
