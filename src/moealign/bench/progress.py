"""What the benchmark prints while it runs."""

from __future__ import annotations


def log(line: str) -> None:
    print(line, flush=True)


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
