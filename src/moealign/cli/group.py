"""How commands begin and end: a refusal is one line on stderr and status 2, never a traceback."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import diagnosis
from ..errors import InvalidInput, MoealignError
from ..startup import INTERRUPTED
from ..terminal import complain, width

__all__ = ["Command", "Group"]

REFUSED, FAILED = 2, 1
BOXES_FROM = 80  # columns: in fewer, help in boxes cuts the names of options


class _Help:
    """Help that is legible at any width."""

    rich_markup_mode: Any

    def format_help(self, ctx: Any, formatter: Any) -> None:
        columns = width()
        if columns < BOXES_FROM:
            self.rich_markup_mode, formatter.width = None, max(columns, 50)
        super().format_help(ctx, formatter)  # type: ignore[misc]

    def get_short_help_str(self, limit: int = 45) -> str:
        return super().get_short_help_str(1000)  # type: ignore[misc,no-any-return]  # click would cut it


class Group(_Help, TyperGroup):
    """Turns every foreseeable exception of a command into one line and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        for each in args:  # no path holds one, and releases of click differ in what they make of it
            if "\0" in each:
                raise InvalidInput(f"expected arguments without a null byte, got {each!r}")
        return super().parse_args(ctx, args)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
        try:
            status = super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
        except (KeyboardInterrupt, typer.Abort):
            status = INTERRUPTED
        except MoealignError as error:
            complain(error)
            status = REFUSED
        except MemoryError as error:
            complain(f"out of memory: {error}" if str(error) else "out of memory")
            status = FAILED
        except OSError as error:
            complain(error)
            status = FAILED
        except Exception as error:
            if not hasattr(error, "format_message"):  # of click, which typer bundles since 0.20
                raise
            complain(_usage(error))
            status = REFUSED
        sys.exit(status)


def _usage(error: Any) -> str:
    """An error of click's parser, with the command whose help says more."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "moealign"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; see {command} --help"


class Command(_Help, TyperCommand):
    """Refuses to run where an environment variable has a value that means nothing; `info` lists them instead."""

    def invoke(self, ctx: Any) -> Any:
        if self.name != "info" and (wrong := diagnosis.problems()):
            more = f" (and {len(wrong) - 1} more; see moealign info)" if len(wrong) > 1 else ""
            complain(wrong[0] + more)
            raise typer.Exit(REFUSED)
        return super().invoke(ctx)
