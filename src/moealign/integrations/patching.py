"""Replacing a function wherever it was imported by name, and putting it back."""

from __future__ import annotations

import logging
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import MoealignError

__all__ = ["Patch", "Replacement", "replacement"]

log = logging.getLogger("moealign")


@dataclass
class Patch:
    """What an integration has replaced, and what its replacements saw."""

    package: str  #: whose modules are looked through, "vllm" for instance
    pairs: list[tuple[Any, Any]] = field(default_factory=list)  #: (theirs, ours)
    taken: Counter[str] = field(default_factory=Counter)  #: calls that moealign answered, by function
    refused: Counter[str] = field(default_factory=Counter)  #: calls passed on, by function and reason
    places: list[str] = field(default_factory=list)  #: "module.name" of every binding that was replaced

    def replace(self, theirs: Any, ours: Any) -> None:
        """Bind `ours` wherever a module of the package has bound `theirs`, under whatever name."""
        self.pairs.append((theirs, ours))
        self.places += list(_rebind(self.package, theirs, ours))

    def restore(self) -> None:
        """Bind the originals again, also where ours was imported since."""
        for theirs, ours in reversed(self.pairs):
            for _ in _rebind(self.package, ours, theirs):
                pass
        self.pairs.clear()
        self.places.clear()


def _rebind(package: str, old: Any, new: Any) -> Iterator[str]:
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or (name != package and not name.startswith(f"{package}.")):
            continue
        for attribute, value in list(vars(module).items()):
            if value is old:
                setattr(module, attribute, new)
                yield f"{name}.{attribute}"


class Replacement:
    """A callable that asks moealign first and the original where moealign refuses."""

    def __init__(self, patch: Patch, name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
        self.patch, self.name, self.ours, self.theirs = patch, name, ours, theirs
        self.__name__, self.__doc__, self.__wrapped__ = name, theirs.__doc__, theirs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self.ours(*args, **kwargs)
        except MoealignError as refusal:
            reason = f"{self.name}: {refusal}"
            if reason not in self.patch.refused:
                log.info("moealign passes a call on to %s: %s", self.patch.package, reason)
            self.patch.refused[reason] += 1
            return self.theirs(*args, **kwargs)
        self.patch.taken[self.name] += 1
        return result


def replacement(patch: Patch, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function, as torch.compile and inspect like it, around a :class:`Replacement`."""
    around = Replacement(patch, theirs.__name__, ours, theirs)

    def call(*args: Any, **kwargs: Any) -> Any:
        return around(*args, **kwargs)

    call.__name__, call.__qualname__, call.__doc__ = theirs.__name__, theirs.__qualname__, theirs.__doc__
    call.__wrapped__ = theirs  # type: ignore[attr-defined]
    return call
