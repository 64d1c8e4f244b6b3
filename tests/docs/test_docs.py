"""Every example of the README and of docs/ runs, every command parses, every link resolves; the site builds."""

from __future__ import annotations

import ast
import csv
import doctest
import functools
import html.parser
import http.server
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
from browser import browser, look
from helpers import ROOT

from moealign.cli import app
from moealign.errors import _PACKAGES, how_to_install

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
NEEDING = re.compile(r"<!-- needs: (\w+) -->\n(```python\n.*?```)", re.S)


def run_page(page: Path) -> doctest.TestResults:
    """The sessions of a page; a block under ``<!-- needs: MODULE -->`` only where there is that module."""
    text = NEEDING.sub(lambda block: block[2] if importlib.util.find_spec(block[1]) else "", page.read_text())
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    return doctest.DocTestRunner(optionflags=FLAGS).run(session)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        assert ">>> " in block, "a Python block shows a session, so that it can be run"
    assert run_page(page).failed == 0


def test_a_wrong_example_fails_and_one_that_needs_a_module_runs_where_it_is(tmp_path, capsys):
    page = tmp_path / "page.md"
    for name, outcome in (("json", (1, 2)), ("nowhere", (0, 1))):
        page.write_text(f"<!-- needs: {name} -->\n```python\n>>> 1 + 1\n3\n\n```\n```python\n>>> 3\n3\n\n```\n")
        assert run_page(page)[:2] == outcome


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_parse_and_their_files_exist(page):
    """The command line parses every `moealign` command, and every script that a command names is in the repository."""
    group = typer.main.get_command(app)
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
        for command, arguments in re.findall(r"^(?:[A-Z_]+=\S+ )*moealign ([\w-]+)([^#>\n]*)", block, re.M):
            group.commands[command].make_context(command, shlex.split(arguments))
        for script in re.findall(r"(?:benchmarks|docs|examples|tests)/[\w/]+\.(?:py|sh)", block):
            assert (ROOT / script).is_file(), script


def constants(path: Path) -> list[str]:
    """The string constants of a module, and the constant parts of its formatted strings."""
    return [
        node.value
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_the_messages_of_troubleshooting_are_those_of_the_package():
    """A message is an indented line; ``…`` stands for what varies."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^    (.*)", text, re.M) + re.findall(r"^\| `([^`]*)` \|", text, re.M)
    messages.remove("operation not permitted when stream is capturing")  # torch's
    assert len(messages) > 12
    source = "\0".join(part for path in (ROOT / "src").rglob("*.py") for part in constants(path))
    for message in messages:
        for extra in _PACKAGES:
            message = message.replace(how_to_install(extra), "…")
        for part in re.split(r": |…|vllm|VLLM_PLUGINS|MOEALIGN_VLLM|12\.4", message):  # values of this page's examples
            assert part.strip() in source, f"docs/troubleshooting.md quotes {part.strip()!r}"


# ---- links and the site ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Log no request."""


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
    for page in PAGES[1:]:
        target = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / target).exists()
        assert f'href="{target}"' in menu, f"{page.name} is not in the menu: add it to nav in mkdocs.yml"


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
    handler = functools.partial(SilentHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, browser(tmp_path) as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            for name in ("index", "layout", "developers/backends", "tutorial", "api"):
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


@pytest.fixture
def from_disk(site, tmp_path):
    """A browser that opens pages of the site without a server."""
    with browser(tmp_path) as driver:
        yield lambda name, width=1280: (look(driver, site / f"{name}.html", "light", width), driver)[1]


def test_the_search_works_from_disk(from_disk):
    wait = pytest.importorskip("selenium.webdriver.support.wait")
    for name in ("index", "developers/backends"):
        driver = from_disk(name)
        driver.execute_script("document.getElementById('__search').click()")
        driver.find_element("css selector", ".md-search__input").send_keys("sentinel")
        wait.WebDriverWait(driver, 20).until(lambda d: d.find_elements("css selector", ".md-search-result__item"))
        assert driver.get_log("browser") == []


def test_copied_code_is_a_script(from_disk):
    """The copy button takes what is displayed while the block has an attribute."""
    driver = from_disk("index")
    copied = driver.execute_script(
        "return [...document.querySelectorAll('.highlight code')].filter(e => e.querySelector('.gp')).map(e => {"
        "e.setAttribute('data-md-copying', ''); const text = e.innerText; e.removeAttribute('data-md-copying');"
        "return text})"
    )
    assert len(copied) == (ROOT / "docs" / "index.md").read_text().count("```python")
    for text in copied:
        assert ">>>" not in text
        ast.parse(text)
    style = "return getComputedStyle(document.querySelector('.highlight .gp')).userSelect"
    assert driver.execute_script(style) == "none"


def test_tables_and_drawings_are_legible_at_every_width(from_disk):
    cut = "return [...document.querySelectorAll('.md-typeset__scrollwrap')].filter(e => e.scrollWidth > e.clientWidth)"
    for name in ("performance", "results", "experts", "routing", "parallel", "integrations"):
        for width in (800, 1280):
            assert from_disk(name, width).execute_script(f"{cut}.length") == 0, f"{name} at {width}"
    smallest = (
        "return Promise.all([...document.querySelectorAll('a.drawing')].map(async a => {"
        "const image = a.querySelector('img'), size = image.naturalWidth;"
        "return [a.getAttribute('href'), image.getBoundingClientRect().width / size]}))"
    )
    for width in (390, 1280):
        drawings = dict(from_disk("layout", width).execute_script(smallest))
        scales = [scale for name, scale in drawings.items() if "layout-" in name]
        assert len(scales) == 4
        assert min(scales) * 8 * 4 / 3 > 9, f"the smallest text, of 8 points, is under 9 pixels at {width}"
    driver = from_disk("api")
    assert driver.execute_script("return document.querySelectorAll('.doc-contents table').length") == 0


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
        "report.write",
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


def test_drawings_and_figures_in_the_text_are_those_of_today(capsys):
    pytest.importorskip("matplotlib")
    from docs import draw

    assert draw.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_drawing_would_be_seen(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from docs import draw

    monkeypatch.setattr(draw, "DRAWINGS", {"layout-routes": draw.DRAWINGS["layout-maps"]})
    monkeypatch.setattr(draw, "microseconds", lambda _: "100")
    assert draw.main(["--check"]) == 1
    output = capsys.readouterr().out
    assert "layout-routes.svg: stale" in output
    assert ".md: its figures are not those of benchmarks/results" in output


def test_a_figure_is_its_row_of_the_table():
    from docs import draw

    text = 'takes [9.99](results.md "align_h200: 1x8-E256-B16, moealign-cuda") here'
    with (ROOT / "benchmarks" / "results" / "align_h200.csv").open(newline="") as source:
        (row,) = [r for r in csv.DictReader(source) if (r["case"], r["impl"]) == ("1x8-E256-B16", "moealign-cuda")]
    fresh = draw.with_figures(text)
    assert fresh == text.replace("9.99", f"{float(row['median_us']):.2f}")
    with pytest.raises(LookupError, match="expected one row of 1x8-E256-B16, nobody, got 0"):
        draw.with_figures(text.replace("moealign-cuda", "nobody"))


def test_the_readme_names_every_variable_that_the_package_reads():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    read = set(re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\()["'](MOEALIGN_\w+)["']""", source))
    assert "MOEALIGN_BACKEND" in read
    assert read <= set(re.findall(r"`(MOEALIGN_\w+)`", (ROOT / "README.md").read_text()))


def test_the_readme_s_test_command_is_what_ci_runs():
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
