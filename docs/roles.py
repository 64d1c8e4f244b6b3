"""Docstrings are written to be read in a terminal; for the site their few reStructuredText marks become Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """``:func:`x` `` -> ``x``, a literal block's ``::`` -> ``:``, and a ruled table as it stands."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """The docstring `text` as Markdown."""
    text = re.sub(r":(?:func|class|data|mod):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.M)
    return re.sub(r"(?ms)^(=+ [= ]+\n.*?\n=+ [= ]+)$(?!.*^=+ [= ]+$)", r"```text\n\1\n```", text)
