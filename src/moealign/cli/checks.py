"""What commands check before they begin, and the options that several of them share."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..terminal import complain
from ..trace import Trace, example_trace, load_trace

__all__ = ["BLOCK_SIZES", "BlockSizes", "Hidden", "Intermediate", "Json", "TracePath"]

BLOCK_SIZES = "16,32,64,128,256"
MAX_BLOCK_SIZE = 65_536  # far above what any kernel takes; larger ones only exhaust memory
MAX_WIDTH = 1_048_576  # of an expert
MAX_NUMBERS = 64  # in a list on the command line
MAX_BYTES = 2**30  # of what is computed from a trace

TracePath = Annotated[
    Path,
    typer.Argument(
        metavar="TRACE", show_default=False, help="A .safetensors routing trace (default: the one that ships)."
    ),
]
BlockSizes = Annotated[str, typer.Option(help="Block sizes to compare, separated by commas.")]
Hidden = Annotated[
    int | None, typer.Option(min=1, max=MAX_WIDTH, help="Hidden size, for the costs (default: the trace's).")
]
Intermediate = Annotated[
    int | None, typer.Option(min=1, max=MAX_WIDTH, help="Columns of down_proj, for the costs (default: the trace's).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead; docs/cli.md lists the keys.")]

SHIPPED = example_trace()


def fail(message: object) -> NoReturn:
    """Refuse: one line on stderr, status 2."""
    complain(message)
    raise typer.Exit(2)


def ints(option: str, text: str, maximum: int) -> list[int]:
    """The distinct numbers in `text`, ascending, each from 1 to `maximum`."""
    shown = repr(text if len(text) <= 60 else f"{text[:60]}...")
    try:
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 1:
            raise ValueError
    except ValueError:
        fail(f"{option}: expected ints of at least 1, separated by commas, got {shown}")
    if max(numbers) > maximum or len(set(numbers)) > MAX_NUMBERS:
        fail(f"{option}: expected up to {MAX_NUMBERS} ints of at most {maximum:,}, got {shown}")
    return sorted(set(numbers))


def load(path: Path) -> Trace:
    """The trace at `path`, small enough that what is computed from it fits in memory."""
    trace = load_trace(path)
    # Loads of each expert, in each layer, for each run of 256 tokens at worst; int64.
    needed = 8 * trace.num_experts * trace.layers * max(1, trace.tokens // 256)
    if needed > MAX_BYTES:
        most = max(1, MAX_BYTES * trace.num_experts // needed)
        fail(
            f"{path}: expected at most {most:,} experts for {trace.layers:,} layers and {trace.tokens:,} tokens, so "
            f"that their loads fit in {MAX_BYTES >> 30} GiB, got {trace.num_experts:,}"
        )
    return trace


def layer_of(trace: Trace, layer: int) -> None:
    if layer >= trace.layers:
        fail(f"--layer: expected a layer below {trace.layers}, got {layer}")


def output(option: str, path: Path, suffixes: Collection[str] = ()) -> Path:
    """`path`, after making sure that a file can be written there; it is left as it was.

    Args:
        option: name for the message.
        path: of a file that may exist.
        suffixes: endings to choose from, in lower case; any if empty.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        fail(f"{option}: expected a path that ends in {', '.join(suffixes)}, got {path}")
    if not os.path.isdir(path.parent):
        fail(f"{option}: expected a path in a folder that exists, got {path}")
    if os.path.isdir(path):
        fail(f"{option}: expected a file, got the folder {path}")
    try:
        _try_to_write(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a symbolic link to itself, before Python 3.13
        fail(f"{option}: expected a path that can be written, got {path} ({getattr(error, 'strerror', None) or error})")
    return path


def files_in(option: str, folder: Path, files: Sequence[Path]) -> None:
    """Make sure that `files`, below `folder`, can be written.  Folders that are missing will be made; all is left as it
    was."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        fail(f"{option}: expected a folder, got the file {folder}")
    for path in files:
        made: list[Path] = []
        try:
            for each in reversed(path.parents):
                if not os.path.exists(each):
                    each.mkdir()
                    made.append(each)
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _try_to_write(path)
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            fail(f"{option}: expected a folder that can be written, got {folder} ({reason}: {path.name})")
        finally:
            for each in reversed(made):
                with contextlib.suppress(OSError):  # another process may use it by now
                    each.rmdir()


def _try_to_write(path: Path) -> None:
    """Raise OSError unless a file can be written at `path`: permissions say too little about read-only mounts."""
    if not os.path.exists(path):
        target = path.resolve()  # of a symbolic link that leads nowhere yet
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        target.unlink()
    elif stat.S_ISREG(os.stat(path).st_mode):
        os.close(os.open(path, os.O_WRONLY))
    elif not os.access(path, os.W_OK):  # opening a pipe would wait for its reader
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def distinct(paths: Sequence[tuple[str, Path]]) -> None:
    """Refuse two outputs at one path."""
    seen: dict[Path, str] = {}
    for option, path in paths:
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            fail(f"{option}: expected another path than {other}'s, got {path}")


def progress() -> Any:
    """A progress bar on stderr, only where a person watches."""
    from rich.console import Console
    from rich.progress import Progress

    stderr = Console(stderr=True)
    bar = Progress(console=stderr, transient=True, disable=not stderr.is_terminal)
    return contextlib.nullcontext(bar) if bar.disable else bar  # which rich before 14 ends with an empty line
