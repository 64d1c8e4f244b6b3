"""Plain text for a terminal of any width, and how a command ends.  Needs no extra.

Figures are never cut: a table that is too wide continues below with its first columns repeated.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import shutil
import signal
import statistics
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from .startup import INTERRUPTED

__all__ = ["bars", "complain", "escape", "exit_with", "paragraph", "table", "width"]

MIN_WIDTH, PIPE_WIDTH = 40, 120
MIN_BARS = 8  # with less room, bars say nothing


def width() -> int:
    """Columns to fill: ``COLUMNS`` if set, else the terminal's, else 120; at least 40."""
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named):
        columns = int(named)
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    return max(columns, MIN_WIDTH)


def escape(text: object) -> str:
    """`text` on one line: characters that would move the cursor or end the line are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def complain(message: object) -> None:
    """`message` in one line on stderr."""
    print(f"moealign: {escape(message)}", file=sys.stderr, flush=True)


def paragraph(text: str, columns: int | None = None, indent: int = 0) -> str:
    """`text` in lines of at most `columns`, those after the first indented; a longer word keeps a line of its own."""
    lines = textwrap.wrap(
        text, columns or width(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    left: int = 1,
    repeat: int = 1,
    columns: int | None = None,
) -> str:
    """A table of text.

    Args:
        header: names of the columns.
        rows: cells, as many as in `header`.
        title: a line above the table.
        left: the first columns that are aligned to the left; the rest are figures, aligned to the right.
        repeat: the first columns that are repeated where the table continues below.
        columns: width to stay within; by default the terminal's.
    """
    room = columns or width()
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    parts: list[list[int]] = []
    for i in range(repeat, len(header)):
        wanted = [*(parts[-1] if parts else range(repeat)), i]
        if not parts or sum(widths[j] + 2 for j in wanted) - 2 > room:
            parts.append([*range(repeat), i])
        else:
            parts[-1].append(i)
    blocks = []
    for part in parts:
        lines = []
        for line in [header, ["-" * size for size in widths], *rows]:
            cells = [line[i].ljust(widths[i]) if i < left else line[i].rjust(widths[i]) for i in part]
            lines.append("  ".join(cells).rstrip())
        blocks.append("\n".join(lines))
    return "\n".join(filter(None, [title, "\n\n".join(blocks)]))


def bars(values: Sequence[float], columns: int) -> str:
    """One character for each value, its height from 0 to the largest; with more values than `columns`, for each mean
    of :func:`neighbours` values."""
    size = neighbours(len(values), columns)
    means = [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]
    top = max(means) or 1
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    levels = "▁▂▃▄▅▆▇█" if encoding.lower().startswith("utf") else ".:-=+*#@"
    return "".join(levels[min(7, int(8 * mean / top))] for mean in means)


def neighbours(count: int, columns: int) -> int:
    """Values that share one of at most `columns` bars."""
    return -(-count // columns)


# ---- the end of a command ----------------------------------------------------------------------------------------


class Output:
    """Standard output whose failures are kept for the end: a full disk or a closed pipe must not cost the work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self.error is None:
            try:
                action(*arguments)
            except OSError as error:
                self.error = error

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _interrupt() -> None:
    """Ctrl-C for the main thread, also while that sleeps where signals can be sent to threads."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _interrupt_again(unraisable: Any) -> None:
    """Repeat a Ctrl-C that Python had to ignore, as it came in a finalizer or in a callback from C, such as numba's."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.05, _interrupt)  # once that has returned
    again.daemon = True
    again.start()


def exit_with(run: Callable[[], object]) -> NoReturn:
    """Call `run` and exit with its status: 130 after Ctrl-C, 1 if standard output could not be written.

    Characters that a stream cannot encode are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    output = Output(sys.stdout)
    sys.stdout = output  # type: ignore[assignment]
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = _interrupt_again
    status: object = 0
    try:
        status = run()
    except SystemExit as ending:
        status = ending.code
    except KeyboardInterrupt:
        status = INTERRUPTED
    output.flush()
    if output.error is not None:
        with contextlib.suppress(OSError):  # what is still buffered goes nowhere when the interpreter flushes it
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if output.error.errno != errno.EPIPE:
            print(f"moealign: standard output: cannot be written ({output.error.strerror})", file=sys.stderr)
        status = status or 1
    if status == INTERRUPTED:  # Python would kill itself if Ctrl-C came in code that was compiled from a string
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    sys.exit(status)  # type: ignore[arg-type]
