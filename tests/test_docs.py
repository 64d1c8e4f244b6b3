"""Every Python block of the README and of docs/ runs, and prints what it says."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


NEEDING = re.compile(r"<!-- needs: (\w+) -->\n(```python\n.*?```)", re.S)


def run_page(page: Path) -> doctest.TestResults:
    """The sessions of a page; a block under ``<!-- needs: MODULE -->`` only where there is that module."""
    text = NEEDING.sub(lambda block: block[2] if importlib.util.find_spec(block[1]) else "", page.read_text())
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    return doctest.DocTestRunner(optionflags=FLAGS).run(session)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_examples_run(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        assert ">>> " in block, "a Python block shows a session, so that it can be run"
    assert run_page(page).failed == 0


def test_a_block_that_needs_a_module_runs_where_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- needs: NAME -->\n```python\n>>> 1\n2\n\n```\n```python\n>>> 3\n3\n\n```\n")
    template = page.read_text()
    for name, outcome in (("json", (1, 2)), ("nowhere", (0, 1))):
        page.write_text(template.replace("NAME", name))
        assert run_page(page)[:2] == outcome


def test_a_wrong_example_would_be_seen(tmp_path, capsys):
    page = tmp_path / "wrong.md"
    page.write_text("```python\n>>> 1 + 1\n3\n\n```\n")
    assert run_page(page).failed == 1


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_readme_s_test_command_is_what_ci_runs():
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
