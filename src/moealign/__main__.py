"""``moealign`` and ``python -m moealign``."""

from __future__ import annotations

import sys

from .errors import how_to_install
from .terminal import exit_with

__all__ = ["main"]


def _run() -> object:
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        return _without_extras(sys.argv[1:], error.name)
    from .cli import app

    return app(prog_name="moealign")


def _without_extras(arguments: list[str], missing: str | None) -> int:
    """``info`` and ``--version`` alone need no extra, for they are what a broken installation is asked first."""
    from . import __version__, diagnosis

    if arguments == ["--version"]:
        print(f"moealign {__version__}")
        return 0
    if arguments in (["info"], ["info", "--json"]):
        return diagnosis.show(as_json="--json" in arguments)
    print(
        f"moealign: {missing} is not installed: {how_to_install('report')}. Only `moealign info` works without it",
        file=sys.stderr,
    )
    return 2


def main() -> None:
    """Run the command line, or say that it needs the extra `report`."""
    exit_with(_run)


if __name__ == "__main__":
    main()
