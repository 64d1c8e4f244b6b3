"""Every code block of the README and of docs/ runs or is parsed by what it calls; the site builds, strictly."""

from __future__ import annotations

import csv
import doctest
import functools
import html.parser
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
import typer
from browser import browser, look
from helpers import ROOT

from moealign.cli import app

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


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
def test_blocks_are_of_languages_that_are_checked(page):
    languages = {language for language, _ in BLOCK.findall(page.read_text())}
    assert languages <= {"python", "sh", "text"}, "sessions run, commands are parsed, text is what is no code"


# ---- commands ----------------------------------------------------------------------------------------------------


ELSEWHERE = {
    "apt-get",
    "cd",
    "export",
    "git",
    "mkdocs",
    "pre-commit",
    "sglang",
    "serve.py",
    "unset",
    "vllm",
}  # commands that others bring


def wrong_with(line: str) -> str | None:
    """Why a shell line of a page cannot work here, or None."""
    words = line.split("#")[0].split()
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    if not words:
        return None
    command, *rest = words
    if command == "moealign":
        return parse(rest)
    if command == "pip":
        extras = re.findall(
            r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies")[1], re.M
        )
        named = [extra for word in rest for part in re.findall(r"\[([\w,]+)\]", word) for extra in part.split(",")]
        return next((f"no extra {extra}" for extra in named if extra not in extras), None)
    if command == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        return next((f"no target {name} in the Makefile" for name in rest if name not in targets), None)
    if command in ("python", "python3", "bash"):
        if rest[0] == "-m":
            known = rest[1].split(".")[0] in ELSEWHERE or importlib.util.find_spec(rest[1])
            return None if known else f"no module {rest[1]}"
        return None if rest[0] in ELSEWHERE or (ROOT / rest[0]).is_file() else f"no file {rest[0]}"
    return None if command in ELSEWHERE or (ROOT / command).is_file() else f"nothing here says what {command} is"


def parse(words: list[str]) -> str | None:
    """Parse a moealign command as the command line would, without running it."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    name, *arguments = words
    if name not in group.commands:
        return f"moealign has no command {name}"
    try:
        group.commands[name].make_context(name, list(arguments))
    except Exception as error:
        return f"moealign {' '.join(words)}: {error.format_message() if hasattr(error, 'format_message') else error}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_exist_with_their_options(page):
    lines = [
        line for language, block in BLOCK.findall(page.read_text()) if language == "sh" for line in block.splitlines()
    ]
    assert [(line, found) for line in lines if (found := wrong_with(line))] == []


@pytest.mark.parametrize(
    "line",
    [
        "moealign nothing",
        "moealign report TRACE --no-such-option",
        "moealign report",
        "moealign bench --budget soon",
        "pip install '.[none]'",
        "make nothing",
        "python docs/none.py",
        "launch it",
    ],
)
def test_a_wrong_command_would_be_seen(line):
    assert wrong_with(line) is not None


# ---- links and the site ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Requests are not news."""


class Links(html.parser.HTMLParser):
    """What a page of the site points at, and what can be pointed at in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]
        self.ids.update(value for name in ("id", "name") if (value := found.get(name)))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    found = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=found)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_and_every_page_is_in_its_menu(site):
    menu = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
        assert f'href="{page.stem}.html"' in menu, f"{page.name} is not in the menu: add it to nav in mkdocs.yml"


def test_every_link_of_the_site_leads_somewhere_in_it(site):
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        for target in page.targets:
            where, _, anchor = target.partition("#")
            if re.match(r"(https?:|data:|mailto:)", target):
                if not target.startswith(("https://squidfunk.github.io/", "data:")):
                    wrong.append(f"{path.name}: {target}: leads out of the site")
                continue
            goal = (path.parent / where).resolve() if where and not where.startswith("/") else path
            if goal.is_dir():
                goal /= "index.html"
            if not goal.exists():
                wrong.append(f"{path.name}: {target}: no such file")
            elif anchor and goal in pages and anchor not in pages[goal].ids and not anchor.startswith("__"):
                wrong.append(f"{path.name}: {target}: no such place")
    assert len(pages) > 8
    assert wrong == []


def test_the_site_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", path.read_text()):
            assert not re.search(r'(?:src|href)="https?://', tag), f"{path.name}: {tag}"


def test_the_site_is_legible_and_silent_in_a_browser(site, tmp_path):
    wait = pytest.importorskip("selenium.webdriver.support.wait")
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, browser(tmp_path) as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            for name in ("index", "layout", "backends", "tutorial", "api"):
                for scheme, light in (("light", True), ("dark", False)):
                    look(driver, f"http://127.0.0.1:{server.server_port}/{name}.html", scheme)
                    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
                    ground = f"return {shade}.reduce((a, b) => a + b) > 600"
                    wait.WebDriverWait(driver, 10).until(
                        lambda d, light=light, ground=ground: d.execute_script(ground) == light, f"{name} in {scheme}"
                    )
                broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
                assert driver.execute_script(broken) == []
                fits = "return document.documentElement.scrollWidth <= innerWidth"
                assert driver.execute_script(fits), f"{name} is wider than its window"
                said = [line["message"] for line in driver.get_log("browser") if "favicon" not in line["message"]]
                assert said == [], name
        finally:
            server.shutdown()


def test_every_tracked_measurement_is_on_the_site(site):
    text = (site / "results.html").read_text()
    for path in (ROOT / "benchmarks" / "results").glob("*_*.csv"):
        with path.open(newline="") as source:
            rows = list(csv.DictReader(source))
        assert (site / "repository" / "benchmarks" / "results" / path.name).read_bytes() == path.read_bytes()
        assert path.name in (ROOT / "docs" / "results.md").read_text(), f"docs/results.md does not name {path.name}"
        for row in rows[:: max(1, len(rows) // 40)]:
            cells = [row[name] for name in ("impl", "median_us", "min_us", "max_us")]
            assert "\n".join(f'<td style="text-align: right;">{cell}</td>' for cell in cells[1:]) in text, row


def test_the_api_has_every_public_name_with_its_docstring(site):
    import moealign

    page = Links((site / "api.html").read_text())
    for name in moealign.__all__:
        home = getattr(moealign, name).__module__ if name[0] != "_" else ""
        assert not home or {f"moealign.{name}", f"{home}.{name}"} & page.ids, name
    assert "moealign.align.moe_align_block_size" not in page.ids, "the function align, not the module of that name"
    for name in (
        "errors.InvalidInput",
        "placement.balanced",
        "costs.cost",
        "page.write",
        "bench.measure",
        "trace.load_trace",
    ):
        assert f"moealign.{name}" in page.ids, name
    text = re.sub(r"<pre>.*?</pre>", "", (site / "api.html").read_text(), flags=re.S)
    for mark in (":func:", ":class:", ":data:", "====="):
        assert mark not in text, mark


def test_roles_of_docstrings_become_markdown():
    pytest.importorskip("griffe")
    from docs import roles

    assert (
        roles.to_markdown("see :func:`align` and :class:`~a.B`::\n\n    code") == "see `align` and `a.B`:\n\n    code"
    )
    ruled = "before\n\n==  ===\nab  cde\n==  ===\n\nafter :data:`x`"
    assert roles.to_markdown(ruled) == "before\n\n```text\n==  ===\nab  cde\n==  ===\n```\n\nafter `x`"


# ---- figures -----------------------------------------------------------------------------------------------------


def test_drawings_and_the_figures_of_the_first_page_are_those_of_today(capsys):
    pytest.importorskip("matplotlib")
    from docs import draw

    assert draw.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_drawing_would_be_seen(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from docs import draw

    monkeypatch.setattr(draw, "DRAWINGS", {"layout-routes": draw.DRAWINGS["layout-maps"]})
    monkeypatch.setattr(draw, "gain", lambda: "100x")
    assert draw.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "layout-routes.svg: not what docs/draw.py draws" in said
    assert "docs/index.md: its figures are not those of benchmarks/results" in said


def test_a_figure_is_its_row_of_the_table():
    from docs import draw

    text = 'takes [9.99](results.md "align_h200: 1x8-E256-B16, moealign-cuda") here'
    with (ROOT / "benchmarks" / "results" / "align_h200.csv").open(newline="") as source:
        (row,) = [r for r in csv.DictReader(source) if (r["case"], r["impl"]) == ("1x8-E256-B16", "moealign-cuda")]
    fresh = draw.with_figures(text)
    assert fresh == text.replace("9.99", f"{float(row['median_us']):.2f}")
    with pytest.raises(LookupError, match="expected one row of 1x8-E256-B16, nobody, got 0"):
        draw.with_figures(text.replace("moealign-cuda", "nobody"))
    assert len(draw.FIGURE.findall((ROOT / "docs" / "backends.md").read_text())) >= 10


#: What looks like a measurement: a time, a ratio, a rate, a share.
MEASURED = re.compile(r"\d(?:x\b| us\b| ms\b| %| seconds?\b)|[TG]B/s|TFLOP")
#: Lines with such a number that is none, and what it is.
NO_MEASUREMENT = {
    "or the operations at the rate of a large product": "what a floor is",
    "are assumptions": "the terms of a model that nobody measured",
    "of brute force on small cases": "the bound of a test",
}


@functools.cache
def figures_of_rows() -> re.Pattern[str]:
    pytest.importorskip("matplotlib")
    from docs import draw

    return draw.FIGURE


def untraceable(text: str) -> list[tuple[int, str]]:
    """(line, text) of measurements outside the tables that benchmarks/figures.py makes and links to a row of a CSV."""
    for what in (
        r"(?s)<!-- (\S+):begin -->.*?<!-- \1:end -->",
        r"(?s)```.*?```",
        figures_of_rows().pattern,
        r"`[^`\n]*`",
    ):
        text = re.sub(what, lambda found: "\n" * found[0].count("\n"), text)
    lines = enumerate(text.splitlines(), 1)
    return [
        (n, line) for n, line in lines if MEASURED.search(line) and not any(each in line for each in NO_MEASUREMENT)
    ]


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda path: path.name
)
def test_every_measurement_comes_from_a_tracked_table(path):
    assert untraceable(path.read_text()) == []


def test_a_measurement_of_nowhere_would_be_seen():
    text = (
        'a\n<!-- t:begin -->\n| 3.3x |\n<!-- t:end -->\n[1.10](results.md "align_h200: 1x8, ours"), `2 us`, 4 experts\n'
    )
    assert untraceable(text) == []
    assert untraceable(text + "takes 3.4 us\n") == [(6, "takes 3.4 us")]
    assert untraceable(text + "is 12x faster\n") == [(6, "is 12x faster")]


def test_the_first_page_answers_in_ten_lines():
    text = (ROOT / "docs" / "index.md").read_text().split("![")[0]
    for question in ("Does it help me?", "How much?", "How do I switch it on?"):
        assert question in text
    prose = [line for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines()[1:] if line.strip()]
    assert len(prose) <= 10


def test_the_readme_is_short():
    written = re.sub(r"(?s)<!-- (\S+):begin -->.*?<!-- \1:end -->", "", (ROOT / "README.md").read_text())
    assert len(written.splitlines()) < 160


OTHERS_VARIABLES = {"NUMBA_CACHE_DIR", "PYTHONPATH", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "XDG_CACHE_HOME"}


def variables_of(source: str) -> set[str]:
    """Names of environment variables that `source` reads."""
    return set(re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\()["'](\w+)["']""", source))


def test_the_readme_names_every_variable_that_the_package_reads():
    read = set().union(*(variables_of(path.read_text("utf-8")) for path in (ROOT / "src").rglob("*.py")))
    assert "MOEALIGN_BACKEND" in read
    named = set(re.findall(r"`(MOEALIGN_\w+)`", (ROOT / "README.md").read_text()))
    assert read - OTHERS_VARIABLES <= named


@pytest.mark.parametrize("read", ["os.environ['HERE']", 'environ.get("HERE")', 'os.getenv("HERE")'])
def test_a_variable_that_is_read_would_be_seen(read):
    assert variables_of(f"path = {read}") == {"HERE"}


def test_the_readme_s_test_command_is_what_ci_runs():
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
