"""MkDocs hooks: what the site shows otherwise than the repository does.

* A link such as ``../benchmarks/results/align_h200.csv`` works in the repository.  For the site, the file is copied to
  ``repository/`` and the link is rewritten, so that readers can follow every figure to its table.
* Every tracked measurement is a table on the page of results.
* Every drawing is a link to itself, so that a phone can enlarge it.
* A Python session is highlighted as one: its prompts and output, which site.css marks, are not copied.
* The search tells words with digits apart.  Its library, lunr 2.3, names a node of its graph of words by letters and by
  numbers of other nodes, with nothing between them; two nodes of one name become one, and queries that reach it fail.
"""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.plugins.moealign")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
DRAWING = re.compile(r"^!\[[^\]]*\]\((images/[^)\s]+)\)$", re.M)
SESSION = re.compile(r"^```python\n(?=>>> )", re.M)
NODE_NAME = "e=e+s+o.id"
UPWARDS = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    linked = {
        path
        for page in files.documentation_pages()
        for target, _ in UPWARDS.findall(page.content_string)
        if (path := _outside(page.src_uri, target))
    }
    for path in sorted(linked | {path.relative_to(ROOT).as_posix() for path in RESULTS.glob("*_*.csv")}):
        files.append(File.generated(config, _published(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    if source == "results.md":
        markdown = f"{markdown.rsplit(chr(10) * 2, 1)[0]}\n\n{tables()}"

    def rewritten(link: re.Match[str]) -> str:
        path = _outside(source, link[1])
        up = "../" * (len(PurePosixPath(source).parts) - 1)
        return f"]({up}{_published(path)})" if path else link[0]

    markdown = DRAWING.sub(r"[\g<0>](\1){.drawing title='Open the drawing alone'}", markdown)
    return UPWARDS.sub(rewritten, SESSION.sub("```pycon\n", markdown))


def on_post_build(config: Any) -> None:
    for worker in Path(config["site_dir"]).glob("assets/javascripts/workers/search.*.js"):
        code = worker.read_text()
        if NODE_NAME not in code:
            log.warning("%s: expected %r, got another lunr; see docs/hooks.py", worker.name, NODE_NAME)
        worker.write_text(code.replace(NODE_NAME, 'e=e+s+o.id+","'))


def _outside(source: str, target: str) -> str | None:
    """The repository path that `target` names on page `source`, if it is a file that MkDocs does not publish itself."""
    path = (DOCS / source).parent.joinpath(target).resolve()
    own = path.is_relative_to(DOCS) and path.suffix != ".py"
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and path.is_file() and not own else None


def _published(path: str) -> str:
    """Where the site holds a repository file; Markdown files are shown as plain text."""
    return f"repository/{path}" + (".txt" if path.endswith(".md") else "")


def tables() -> str:
    """Every row of every CSV of times; their file names have the form ``WHAT_DEVICE.csv``."""
    parts = []
    for path in sorted(RESULTS.glob("*_*.csv")):
        with path.open(newline="") as source:
            rows = list(csv.DictReader(source))
        first = rows[0]
        parts.append(f"## {path.name}\n")
        parts.append(
            f"{len(rows)} rows; {first['gpu']}, torch {first['torch']}, {first['date']}; "
            f"[the file]({_published(str(path.relative_to(ROOT)))})\n"
        )
        for bench in dict.fromkeys(row["bench"] for row in rows):
            parts += [f"### {path.stem}: {bench}\n", _table([row for row in rows if row["bench"] == bench])]
    return "\n".join(parts)


def _table(rows: list[dict[str, str]]) -> str:
    columns = ["case", "routes", "num_experts", "top_k", "block_size", "impl", "median_us", "min_us", "max_us"]
    head = ["case", "routes", "experts", "top-k", "block", "implementation", "median", "min", "max"]
    rule = ["---" if name in ("case", "impl") else "---:" for name in columns]
    lines = [head, rule, *([row[name] for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
