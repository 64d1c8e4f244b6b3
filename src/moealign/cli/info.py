"""`moealign info`."""

from __future__ import annotations

import typer

from .. import diagnosis
from .checks import Json

__all__ = ["info"]


def info(as_json: Json = False) -> None:
    """Print versions, devices, backends (and why one is unavailable), engines, environment variables and problems."""
    raise typer.Exit(diagnosis.show(as_json))
