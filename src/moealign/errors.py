"""The errors.  Every message says what was expected, what was passed, and what to do."""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "InvalidInput",
    "InvalidType",
    "MoealignError",
    "RankFailed",
    "TraceError",
    "how_to_install",
]


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


#: What each extra of pyproject.toml installs, as arguments of pip.
_PACKAGES = {
    "cpu": "numba",
    "cuda": "'cuda-core[cu13]'",
    "report": "matplotlib rich safetensors typer",
    "transformers": "transformers",
}


def how_to_install(extra: str, *, upgrade: bool = False) -> str:
    """The command that installs the packages of `extra`, for messages.

    It names the packages, not ``moealign[extra]``, so that it works in a clone and without a release on an index.
    """
    return f"pip install {'--upgrade ' if upgrade else ''}{_PACKAGES[extra]} (moealign's extra '{extra}')"
