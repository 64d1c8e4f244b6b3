"""The errors.  Every message says what was expected, what was passed, and what to do."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "InvalidInput", "InvalidType", "MoealignError", "RankFailed", "TraceError"]


class MoealignError(Exception):
    """Base of every error that moealign raises deliberately."""


class InvalidInput(MoealignError, ValueError):
    """An argument of the right type has an invalid value, shape or device."""


class InvalidType(MoealignError, TypeError):
    """An argument has a type or dtype that no backend supports."""


class BackendUnavailable(MoealignError, ValueError):
    """The requested backend cannot run this call; the message says why, and what would help."""


class RankFailed(MoealignError, RuntimeError):
    """A collective failed or timed out: another rank is late, has stopped, or passed different arguments."""


class TraceError(MoealignError, ValueError):
    """A file is missing, damaged or not a routing trace."""
