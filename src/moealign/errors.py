"""What goes wrong, by name. Every message says what was expected, what came, and what to do."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "InvalidInput", "InvalidType", "MoealignError", "RankFailed", "TraceError"]


class MoealignError(Exception):
    """Base of every error that moealign raises on purpose."""


class InvalidInput(MoealignError, ValueError):
    """An argument has the right type and an impossible value, shape or device."""


class InvalidType(MoealignError, TypeError):
    """An argument has a type or dtype that no backend takes."""


class BackendUnavailable(MoealignError, ValueError):
    """The backend asked for by name cannot take this call; the message says why and what would help."""


class RankFailed(MoealignError, RuntimeError):
    """A collective failed or timed out: another rank is late, has stopped, or called with other arguments."""


class TraceError(MoealignError, ValueError):
    """A file is not a routing trace, or a damaged one."""
