"""What mkdocs does besides: files of the repository that pages link to, and every tracked measurement as a page.

A link such as ``../benchmarks/results/align_h200.csv`` is right in the repository.  In the site the file is taken along
and the link leads to it, so that every figure can be followed to the table that it comes from.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for path in sorted({path for page in files.documentation_pages() for path in _outside(page)}):
        files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    for path in sorted(RESULTS.glob("*_*.csv")):
        name = _place(str(path.relative_to(ROOT)))
        if name not in files.src_uris:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "results.md":
        markdown = f"{markdown.rsplit(chr(10) * 2, 1)[0]}\n\n{tables()}"
    return OUTSIDE.sub(lambda link: f"]({_place(link[1])})" if (ROOT / link[1]).is_file() else link[0], markdown)


def _outside(page: File) -> list[str]:
    """Files of the repository outside docs/ that a page links to."""
    return [path for path, _ in OUTSIDE.findall(page.content_string) if (ROOT / path).is_file()]


def _place(path: str) -> str:
    """Where such a file lies in the site; Markdown is shown as it is written."""
    return f"repository/{path}" + (".txt" if path.endswith(".md") else "")


def tables() -> str:
    """Every row of every tracked CSV of times; their names are of what is timed and where."""
    parts = []
    for path in sorted(RESULTS.glob("*_*.csv")):
        with path.open(newline="") as source:
            rows = list(csv.DictReader(source))
        first = rows[0]
        parts.append(f"## {path.name}\n")
        parts.append(
            f"{len(rows)} rows; {first['gpu']}, torch {first['torch']}, {first['date']}; "
            f"[the file]({_place(str(path.relative_to(ROOT)))})\n"
        )
        for bench in dict.fromkeys(row["bench"] for row in rows):
            parts += [f"### {path.stem}: {bench}\n", _table([row for row in rows if row["bench"] == bench])]
    return "\n".join(parts)


def _table(rows: list[dict[str, str]]) -> str:
    columns = ["case", "routes", "num_experts", "top_k", "block_size", "impl", "median_us", "min_us", "max_us"]
    head = ["case", "routes", "experts", "top-k", "block", "implementation", "median", "least", "most"]
    rule = ["---" if name in ("case", "impl") else "---:" for name in columns]
    lines = [head, rule, *([row[name] for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
