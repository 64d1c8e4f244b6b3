"""The README as a package index shows it: there, links relative to the repository lead nowhere.

``[tool.hatch.metadata.hooks.custom]`` in pyproject.toml gives the addresses: ``pages`` for links, ``files`` for images,
with ``{version}`` for the release.  Without an address, a link becomes its text and an image is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


class Readme(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        source = Path(self.root, "README.md").read_text(encoding="utf-8")
        pages, files = (
            self.config.get(name, "").replace("{version}", metadata["version"]) for name in ("pages", "files")
        )
        metadata["readme"] = {"content-type": "text/markdown", "text": on_an_index(source, pages, files)}


def on_an_index(text: str, pages: str = "", files: str = "") -> str:
    """`text` with relative links and images made absolute, or without them if `pages` or `files` is empty."""

    def absolute(link: re.Match[str]) -> str:
        mark, name, target = link.groups()
        if mark:
            return f"![{name}]({files}{target})" if files else ""
        return f"[{name}]({pages}{target})" if pages else name

    return RELATIVE.sub(absolute, text)
