"""``moealign`` and ``python -m moealign``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say that it needs the extra `report`."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"moealign: {error.name} is not installed; pip install 'moealign[report]' brings it", file=sys.stderr)
        sys.exit(2)
    from .cli import app

    app()


if __name__ == "__main__":
    main()
