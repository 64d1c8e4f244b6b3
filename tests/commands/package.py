#!/usr/bin/env python3
"""Checks what a release would upload: the metadata and the contents of a wheel and of its sdist.

python tests/commands/package.py dist     # a folder with one of each; exit status 1 if something is wrong
"""

from __future__ import annotations

import argparse
import email
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from email.message import Message
from pathlib import Path

FIELDS = (
    "Name",
    "Version",
    "Summary",
    "Author",
    "Keywords",
    "License-Expression",
    "Requires-Python",
    "Description-Content-Type",
)
EXTRAS = {"all", "cpu", "cuda", "report", "transformers"}
IN_WHEEL = ("moealign/py.typed", ".cu", ".cuh", ".safetensors", "entry_points.txt", "licenses/LICENSE")
IN_SDIST = (
    "/README.md",
    "/LICENSE",
    "/CHANGELOG.md",
    "/pyproject.toml",
    "/hatch_build.py",
    "/tests/conftest.py",
    "/docs/index.md",
)
RELATIVE = re.compile(r"\]\((?!https?:|#|mailto:)[^)]*\)")


def metadata_problems(metadata: Message) -> list[str]:
    """What an index or a user would miss in the metadata of a wheel."""
    problems = [f"metadata: expected {name}, got none" for name in FIELDS if not metadata.get(name)]
    if missing := EXTRAS - set(metadata.get_all("Provides-Extra", [])):
        problems.append(f"metadata: expected the extras {', '.join(sorted(missing))}, got none of them")
    if links := RELATIVE.findall(str(metadata.get_payload())):
        problems.append(f"description: expected absolute links, got {links[0][2:-1]} and {len(links) - 1} others")
    return problems


def content_problems(what: str, names: Iterable[str], needed: Sequence[str]) -> list[str]:
    """Which endings of `needed` no file has."""
    held = tuple(names)
    return [
        f"{what}: expected a file *{ending}, got none"
        for ending in needed
        if not any(name.endswith(ending) for name in held)
    ]


def warnings(metadata: Message) -> list[str]:
    """What is allowed before the first release only."""
    return [] if metadata.get_all("Project-URL") else ["metadata: no Project-URL; set [project.urls] before a release"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where the wheel and the sdist are")
    folder: Path = parser.parse_args(arguments).folder
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        print(f"{folder}: expected one wheel and one sdist, got {len(wheels)} and {len(sdists)}")
        return 1
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = wheel.namelist()
        path = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(wheel.read(path).decode())
    problems = [*metadata_problems(metadata), *content_problems("wheel", names, IN_WHEEL)]
    if not wheels[0].name.endswith("-py3-none-any.whl"):
        problems.append(f"wheel: expected pure Python, got {wheels[0].name}")
    if outside := [name for name in names if not name.startswith("moealign")]:
        problems.append(f"wheel: expected the package alone, got {outside[0]}")
    with tarfile.open(sdists[0]) as sdist:
        problems += content_problems("sdist", sdist.getnames(), IN_SDIST)
    for line in problems:
        print(line)
    for line in warnings(metadata):
        print(f"warning: {line}")
    print(f"{wheels[0].name}: {len(names)} files; {sdists[0].name}: {len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
