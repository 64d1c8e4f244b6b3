"""The command line: a file per command, `group.py` for how every command ends, `checks.py` for what each refuses."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import bench, check, completion, demo, info, inspect, report, tune
from .group import Command, Group

__all__ = ["app"]

app = typer.Typer(
    cls=Group,
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Block-aligned layouts for Mixture-of-Experts kernels.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moealign {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Block-aligned layouts for Mixture-of-Experts kernels."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for _command in (
    demo.demo, inspect.inspect, report.report, bench.bench, check.check, tune.tune, info.info, completion.completion,
):  # fmt: skip
    app.command(_command.__name__, cls=Command)(_command)
