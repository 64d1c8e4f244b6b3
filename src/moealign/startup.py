"""What the command line needs before the slow imports: torch alone takes seconds.

`moealign/__init__.py` imports this module first.  It does nothing unless this process is ``moealign``,
``python -m moealign`` or ``python -m moealign.bench``.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["INTERRUPTED", "is_command", "prepare"]

MODULES = ("moealign", "moealign.bench")
INTERRUPTED = 130  # exit status after Ctrl-C, as shells count it


def is_command(arguments: list[str], original: list[str]) -> bool:
    """Whether ``sys.argv`` and ``sys.orig_argv`` are those of our command line, while the package is being imported."""
    if arguments[:1] == ["-m"]:  # runpy replaces it by the path once the package is imported
        for i, argument in enumerate(original):
            if argument == "-m":
                return original[i + 1 : i + 2] in [[module] for module in MODULES]
            if argument in [f"-m{module}" for module in MODULES]:
                return True
    name = os.path.basename(arguments[0]) if arguments else ""
    return name.removesuffix(".exe") == "moealign"


def prepare() -> None:
    """End quietly on Ctrl-C while modules are imported, and open a null device for each closed standard stream.

    A file opened later would otherwise get the number of a closed stream, and receive what is printed.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


if is_command(sys.argv, getattr(sys, "orig_argv", [])):
    prepare()
