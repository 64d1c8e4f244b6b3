"""Docstrings are written for the terminal; the site converts their few reStructuredText marks to Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """Apply :func:`to_markdown` to every docstring."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """Turn roles into code, ``::`` before a literal block into ``:``, and ruled tables into text blocks."""
    text = re.sub(r":(?:func|class|data|mod):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.M)
    return re.sub(r"(?ms)^(=+ [= ]+\n.*?\n=+ [= ]+)$(?!.*^=+ [= ]+$)", r"```text\n\1\n```", text)
