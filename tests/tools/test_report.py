"""`moealign report`: the page in a real browser, in light and in dark, and the pictures."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from browser import browser, look
from typer.testing import CliRunner

from moealign import align, costs
from moealign import report as page
from moealign.cli import app
from moealign.errors import InvalidInput
from moealign.report import analysis, figures
from moealign.trace import Trace, example_trace, load_trace, save_trace

TRACE = load_trace(example_trace())
SIZES = (16, 64, 256)
TITLES = [
    "What alignment costs",
    "Where to set block sizes and placements",
    "Load per expert and layer",
    "Imbalance over tokens, in runs of 256",
    "Blocks of a layer: the first 4,096 tokens, 64 rows per block",
    "Padding per block size",
    "Blocks per block size",
    "What each block size costs",
    "What a better placement gains",
    "Cost of each block size relative to the cheapest, by tokens",
]
AXES = [
    "expert",
    "layer",
    "routes over the layer's mean",
    "token at which the run begins",
    "busiest expert / mean expert",
    "padding (% of all rows)",
    "block size (rows)",
    "block size (rows, log scale)",
    "mean of the layers",
    "range of the layers",
    "blocks of a layer (log scale)",
    "microseconds per layer",
    "ranks (log scale)",
    "busiest rank / mean rank",
    "tokens in a batch",
    "block, 64 per line",
    "first block of the line",
]


def run(*arguments: str):
    return CliRunner().invoke(app, ["report", *arguments])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    study = page.study(TRACE, SIZES, on_gpu=False, map_size=64)
    page.write(study, path, layer=2)
    return study, path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


# ---- in a browser ------------------------------------------------------------------------------------------------

CONTRAST = """
const shade = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = shade(getComputedStyle(document.body).backgroundColor);
const ratio = colour => { const s = shade(colour); return (Math.max(s, paper) + 0.05) / (Math.min(s, paper) + 0.05); };
const found = [];
for (const element of document.querySelectorAll("h1, h2, p, b, span, summary, td, th, label, output, svg text")) {
  if (!element.textContent.trim() || !element.getClientRects().length) continue;
  const style = getComputedStyle(element), drawn = element.closest("svg");
  const colour = drawn ? style.fill : style.color;
  // Numbers in the grid lie on its cells, not on the paper.
  if (drawn && /^\\d\\.\\d\\d$/.test(element.textContent.trim()) && element.closest("#tokens")) continue;
  found.push([ratio(colour), colour, element.textContent.trim().slice(0, 40)]);
}
return found.sort((a, b) => a[0] - b[0]);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_legible(report, chromium, scheme):
    look(chromium, report[1], scheme)
    ground = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    paper = {"light": page.LIGHT, "dark": page.DARK}[scheme].paper
    assert ground == f"rgb({int(paper[1:3], 16)}, {int(paper[3:5], 16)}, {int(paper[5:7], 16)})"
    found = chromium.execute_script(CONTRAST)
    assert len(found) > 150
    assert found[0][0] >= 4.5, found[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_bars_stand_out_from_the_paper(report, chromium, scheme):
    look(chromium, report[1], scheme)
    script = CONTRAST.split("const found")[0] + (
        "return [...Array(10).keys()].map(i => { const e = document.createElement('i'); e.style.color = `var(--c${i})`;"
        "document.body.append(e); const c = getComputedStyle(e).color; e.remove(); return ratio(c); })"
    )
    assert min(chromium.execute_script(script)) >= 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_whole_and_silent_and_asks_no_network(report, chromium, scheme):
    chromium.get_log("performance")
    look(chromium, report[1], scheme)
    asked = [json.loads(line["message"])["message"] for line in chromium.get_log("performance")]
    uri = report[1].resolve().as_uri()
    requests = [m["params"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    urls = [r["request"]["url"] for r in requests if r["documentURL"] == uri]  # the browser's own start page has others
    assert [url for url in urls if not url.startswith("data:")] == [uri]
    assert chromium.get_log("browser") == []
    assert [h.text for h in chromium.find_elements("css selector", "h2")] == TITLES
    seen = chromium.execute_script("return [...document.querySelectorAll('svg text')].map(t => t.textContent.trim())")
    assert not [label for label in AXES if label not in seen]
    pictures = chromium.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    drawn = [(width, height) for width, height in pictures if width]
    assert len(drawn) == len(TITLES) - 2, "every figure, and the map of one layer"
    assert all(width > 300 and height > 100 for width, height in drawn)


def test_no_address_but_names_of_xml(report):
    text = report[1].read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, addresses
    assert len(text) < 2**20


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_sticks_out_at_any_width(report, chromium, width):
    look(chromium, report[1], "light", width)
    widths = chromium.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]


SMALLEST = """
return [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width).map(svg => {
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return scale * Math.min(...[...svg.querySelectorAll("text")].map(t => parseFloat(getComputedStyle(t).fontSize)));
});
"""
HINTS = """
for (const details of document.querySelectorAll("details")) details.open = true;
const done = arguments[0], frame = requestAnimationFrame;
frame(() => frame(() => done([...document.querySelectorAll(".wide")].filter(wide => wide.clientWidth).map(wide => [
  wide.scrollWidth > wide.clientWidth,
  wide.closest("section, details").querySelector(".hint").getClientRects().length > 0,
]))));
"""


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_figures_have_legible_text_and_say_where_they_can_be_scrolled(report, chromium, width, tmp_path):
    compared = tmp_path / "compared.html"
    page.write_comparison(page.compare(report[0], report[0]), compared)
    for path in (report[1], compared):
        look(chromium, path, "light", width)
        sizes = chromium.execute_script(SMALLEST)
        assert len(sizes) >= 2
        assert 9 <= min(sizes) <= max(sizes) <= 16
        hints = chromium.execute_async_script(HINTS)
        assert [said for wide, said in hints] == [wide for wide, said in hints]
        assert any(wide for wide, said in hints) or width > 390
        widths = chromium.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]


def test_no_label_is_cut_off_or_lies_on_another(report, chromium):
    look(chromium, report[1], "light")
    wrong = chromium.execute_script("""
      const wrong = [];
      for (const svg of document.querySelectorAll("svg")) {
        const box = svg.getBoundingClientRect();
        if (!box.width) continue;
        const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
        for (const [i, [text, r]] of texts.entries()) {
          if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1)
            wrong.push(`${text} is cut off`);
          for (const [other, o] of texts.slice(i + 1)) {
            const across = Math.min(r.right, o.right) - Math.max(r.left, o.left);
            const down = Math.min(r.bottom, o.bottom) - Math.max(r.top, o.top);
            if (across > 2 && down > 4) wrong.push(`${text} lies on ${other}`);
          }
        }
      }
      return wrong;""")
    assert wrong == []


def test_a_layer_is_chosen_and_a_block_read(report, chromium):
    study, path = report
    look(chromium, path, "light")

    def shown():
        return [
            m.get_attribute("data-layer")
            for m in chromium.find_elements("css selector", "[data-layer]")
            if m.is_displayed()
        ]

    assert shown() == ["2"], "the layer that was asked for"
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.select import Select

    Select(chromium.find_element("id", "layer")).select_by_value("1")
    assert shown() == ["1"]
    layout = align(TRACE.topk_ids[1, : study.map_tokens], block_size=64, num_experts=64, block_rows=True)
    used = layout.num_tokens_post_padded.item() // 64
    readout = chromium.find_element("id", "readout")
    assert readout.text == f"{used} blocks"

    svg = chromium.find_element("css selector", "[data-layer='1'] svg")
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    data = json.loads(chromium.find_element("id", "data").get_attribute("textContent"))
    left, top, right, bottom = data["axes"]
    width, height = svg.size["width"], svg.size["height"]
    for block in (0, 63, 64 + 17, used - 1):
        x = left + (right - left) * (block % 64 + 0.5) / 64
        y = top + (bottom - top) * (block // 64 + 0.5) / data["lines"]
        move = ActionChains(chromium).move_to_element_with_offset(svg, int((x - 0.5) * width), int((y - 0.5) * height))
        move.perform()
        expert, rows = layout.expert_ids[block].item(), layout.block_rows[block].item()
        assert readout.text == f"block {block}: expert {expert}, {rows} of 64 rows"


def colours_in(driver, element) -> np.ndarray:
    import io

    from matplotlib import image

    return (image.imread(io.BytesIO(element.screenshot_as_png))[..., :3] * 255).round().astype(int)


@pytest.mark.parametrize(("scheme", "theme"), [("light", page.LIGHT), ("dark", page.DARK)])
def test_the_block_map_is_painted_as_the_layout_says(report, chromium, scheme, theme):
    study, path = report
    look(chromium, path, scheme)
    svg = chromium.find_element("css selector", "[data-layer='2'] svg")
    pixels = colours_in(chromium, svg)
    data = json.loads(chromium.find_element("id", "data").get_attribute("textContent"))
    left, top, right, bottom = data["axes"]
    layout = align(TRACE.topk_ids[2, : study.map_tokens], block_size=64, num_experts=64, block_rows=True)
    used = layout.num_tokens_post_padded.item() // 64
    full = [b for b in range(used) if layout.block_rows[b] == 64]
    for block in full[:: max(1, len(full) // 60)]:
        x = left + (right - left) * (block % 64 + 0.5) / 64
        y = top + (bottom - top) * (block // 64 + 0.5) / data["lines"]
        got = pixels[int(y * pixels.shape[0]), int(x * pixels.shape[1])]
        colour = theme.series[layout.expert_ids[block].item() % 10]
        assert abs(got - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).max() <= 3, block


def test_the_picture_for_both_schemes_is_painted_in_each(report, chromium, tmp_path):
    path = tmp_path / "report.svg"
    page.write(report[0], path, layer=1)
    grounds = {}
    for scheme in ("light", "dark"):
        look(chromium, path, scheme)
        grounds[scheme] = colours_in(chromium, chromium.find_element("css selector", "svg"))
    for scheme, theme in (("light", page.LIGHT), ("dark", page.DARK)):
        paper = [int(theme.paper[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(grounds[scheme] - paper).max(axis=2) <= 2).mean() > 0.3
    assert chromium.get_log("browser") == []


# ---- without one -------------------------------------------------------------------------------------------------


def test_block_maps_are_those_of_the_layout(report):
    study = report[0]
    for layer in range(TRACE.layers):
        part = TRACE.topk_ids[layer, : study.map_tokens]
        layout = align(part, block_size=64, num_experts=64, block_rows=True)
        used = layout.num_tokens_post_padded.item() // 64
        cells = zip(layout.expert_ids[:used].tolist(), layout.block_rows[:used].tolist(), strict=True)
        assert figures.map_cells(study, layer) == list(cells)
        assert used <= analysis.MAX_MAP_BLOCKS


def cells_of(text: str, title: str) -> list[list[str]]:
    """The table of the page under `title`."""
    body = re.search(rf"<summary>{title}</summary>.*?<tbody>(.*?)</tbody>", text, re.S)[1]
    return [re.findall(r"<td>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]


def draw_trace(seed: int) -> Trace:
    draw = torch.Generator().manual_seed(seed)
    layers, tokens, experts, top_k = (int(torch.randint(1, most, (), generator=draw)) for most in (4, 900, 40, 5))
    ids = (torch.rand(layers, tokens, top_k, generator=draw) ** 2 * (experts + 1)).long() - 1  # some are -1
    return Trace(ids, experts, "m", "s", "r")


OPTIONS = ("--block-size", "8,48,96", "--hidden", "512", "--intermediate", "4096")


@pytest.mark.parametrize(
    ("trace", "options"),
    [
        pytest.param(TRACE, (), id="shipped"),
        pytest.param(draw_trace(0), (), id="random 0"),
        pytest.param(draw_trace(1), OPTIONS, id="random 1"),
        pytest.param(draw_trace(2), OPTIONS, id="random 2"),
        pytest.param(Trace(torch.full((1, 5, 2), -1), 4, "m", "s", "r"), (), id="no route"),
        pytest.param(Trace(TRACE.topk_ids, 64, "m", "s", "r", {"calls": [4000] + [32] * 131}), (), id="calls"),
    ],
)
def test_inspect_and_report_agree(trace, options, tmp_path):
    path = tmp_path / "t.safetensors"
    save_trace(path, trace)
    inspected = CliRunner().invoke(app, ["inspect", str(path), *options], env={"COLUMNS": "250"}).output
    assert run(str(path), "-o", str(tmp_path / "a.html"), "--no-gpu", *options).exit_code == 0
    text = (tmp_path / "a.html").read_text()
    advice = re.findall(r"  (\w+), ([\d,]+ tokens?) per batch: blocks of (\d+) rows, (.*?)% padding", inspected)
    assert advice or not (trace.topk_ids >= 0).any()
    for kind, tokens, size, wasted in advice:
        assert f"<b>{size} rows</b><span>a block for {kind} ({tokens} per batch); {wasted} % is padding" in text
    assert text.count("rows</b><span>a block for") == len(advice)
    rows = [re.split(r" {2,}", line.strip()) for line in inspected.splitlines() if re.match(r" *(\d+|all)  ", line)]
    loads, paddings = rows[: trace.layers], rows[-1][1:]
    assert [[cell.replace(",", "") for cell in row[:6]] for row in loads] == [
        [cell.replace(",", "") for cell in row] for row in cells_of(text, "Routes per layer, as numbers")
    ]
    sizes = cells_of(text, "Block sizes, as numbers")
    assert paddings == [f"{row[1]}, {row[2].replace(' ', '')}" for row in sizes]


def test_tables_carry_the_numbers(report):
    study, path = report
    text = path.read_text()
    for row in study.by_tokens:
        assert f"<td>{row.tokens:,}</td><td>{row.block_size}</td><td>{min(row.costs):,.1f}</td>" in text
    for gain in study.gains:
        assert f"<td>{gain.ranks}</td><td>{gain.linear:.3f}</td>" in text
    assert [gain.ranks for gain in study.gains] == [2, 4, 8, 16, 32, 64]
    assert "4.18 TB/s memory, 5.50 TB/s cache, 790 TFLOP/s" in text
    assert "Not measured: no GPU that torch can use." in text


def test_what_was_measured_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "measured_machine", lambda: costs.Machine("a GPU", 1e12, 2e12, 3e14))
    monkeypatch.setattr(
        costs, "measure", lambda ids, count, sizes, experts: [111.1 * (i + 1) for i in range(len(sizes))]
    )
    monkeypatch.setattr(costs, "measure_alignment", lambda ids, count, size: 7.5)
    trace = dataclasses.replace(TRACE, topk_ids=TRACE.topk_ids[:1])
    study = page.study(trace, (16, 64), on_gpu=True)
    assert [(each.block_size, each.alignment, each.layer, each.measured) for each in study.advice] == [
        (16, 7.5, 111.1, True)
    ] * 2
    page.write(study, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "measured on this GPU" in text
    assert "1.00 TB/s memory, 2.00 TB/s cache, 300 TFLOP/s" in text
    assert "on a GPU; the trace was recorded on cpu." in text
    assert "<b>6.8 %</b><span>of a layer&#x27;s time is alignment in decode: 7.5 of 111.1 us, measured" in text
    assert "<td>111.1</td>" in text
    assert "<td>222.2</td>" in text
    monkeypatch.setattr(costs, "measure", lambda ids, count, sizes, experts: [None, 5.0])
    page.write(page.study(trace, (16, 64), on_gpu=True), tmp_path / "a.html")
    assert "<td>-</td></tr>" in (tmp_path / "a.html").read_text(), "a size that the kernel does not take"
    monkeypatch.setattr(costs, "measure", lambda ids, count, sizes, experts: [None, None])
    study = page.study(trace, (100, 256), on_gpu=True)
    page.write(study, tmp_path / "a.html")
    assert not any(each.measured for each in study.advice)
    assert study.not_measured == "no block size that the GPU kernel takes (16, 32, 64, 128)"
    monkeypatch.setattr(costs, "measure", lambda *a: 1 / 0)
    without = page.study(trace, (16,), on_gpu=True)
    assert without.not_measured == "ZeroDivisionError: division by zero"
    assert without.machine.name == "a GPU"
    monkeypatch.setattr(costs, "measured_machine", lambda: 1 / 0)
    assert page.study(trace, (16,), on_gpu=True).machine == costs.H200


def test_text_of_a_trace_is_never_markup(tmp_path):
    evil = "<script>alert(1)</script>&"
    study = page.study(Trace(TRACE.topk_ids[:, :9], 64, evil, evil, evil), (16,), on_gpu=False)
    page.write(study, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") == 4
    page.write(study, tmp_path / "a.svg")
    assert "<script>alert" not in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("ids", "experts"),
    [
        (torch.zeros(1, 1, 1, dtype=torch.uint8), 1),
        (torch.full((2, 5, 2), -1, dtype=torch.int8), 4),
        (torch.zeros(1, 300, 8, dtype=torch.int16), 896),
        (torch.arange(12 * 40 * 2).reshape(12, 40, 2) % 130, 130),
    ],
    ids=["one route", "no route", "one expert of 896", "twelve layers"],
)
def test_odd_traces_have_a_report_too(ids, experts, tmp_path, recwarn):
    study = page.study(Trace(ids, experts, "m", "s", "r"), (1, 7, 64), on_gpu=False)
    for suffix in (".html", ".svg"):
        path = tmp_path / f"a{suffix}"
        page.write(study, path)
        assert path.stat().st_size > 5000
        assert not re.findall(r">-?(?:nan|inf)\b", path.read_text(), re.I)
    assert not [str(w.message) for w in recwarn if "divide" in str(w.message) or "invalid value" in str(w.message)]


def test_the_command(tmp_path):
    path = tmp_path / "report.html"
    result = run(str(example_trace()), "-o", str(path), "--layer", "3", "--no-gpu", "--hidden", "1024")
    assert result.exit_code == 0, result.output
    assert "prefill, 8,192 tokens per batch: blocks of" in result.output
    assert "alignment takes" in result.output
    assert "Not measured: no GPU that torch can use." in result.output
    assert "vLLM and SGLang read the files that --engine-config DIR writes" in " ".join(result.output.split())
    text = path.read_text()
    assert '<option value="3" selected>' in text
    for words in (text, " ".join(result.output.split())):
        assert "Costs are modelled for experts of hidden size 1,024 and intermediate size 32 (as given)" in words
        assert "on H200" in words
        assert "does not say where batches begin, so runs of neighbouring tokens stand for them" in words


def test_a_dark_and_a_light_png(tmp_path):
    from matplotlib import image

    save_trace(tmp_path / "t.safetensors", Trace(TRACE.topk_ids[:2, :300], 64, "m", "s", "r"))
    for name, options, theme in (("a.png", (), page.LIGHT), ("b.png", ("--dark",), page.DARK)):
        result = run(str(tmp_path / "t.safetensors"), "-o", str(tmp_path / name), "--no-gpu", *options)
        assert result.exit_code == 0, result.output
        pixels = (image.imread(tmp_path / name)[..., :3] * 255).round().astype(int)
        assert pixels.shape[1] > 1200
        paper = [int(theme.paper[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels[2, 2] == paper).all()
        ink = [int(theme.ink[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - ink).max(axis=2) <= 8).sum() > 1000, "text is there, in the theme's ink"


WITHOUT_A_GPU = [
    (("--gpu",), "--gpu: expected a GPU that torch can use, found none"),
    (
        ("--engine-config", "x"),
        "engine configuration: expected the name of the GPU, which names the file, got none",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "a.pdf"), "--output: expected a path that ends in .html, .png, .svg, got a.pdf"),
        (("-o", "/no/such/a.html"), "--output: expected a path in a folder that exists, got /no/such/a.html"),
        ((str(example_trace()), str(example_trace())), "TRACE: expected one trace, or two to compare, got 3"),
        ((str(example_trace()), "--placement", "p.json"), "--placement: expected a single trace, got two"),
        (
            ("--engine-config", "x", "--block-size", "16,100", "--device-name", "G"),
            "engine configuration: expected block sizes among 16, 32, 64, 128, 256, got 100",
        ),
        (("--placement", "p.json", "--replicas", "3"), "replicas: expected 0 or a multiple of 8 more"),
        (("--layer", "9"), "--layer: expected a layer below 4, got 9"),
        (("--block-size", "16,x"), "--block-size: expected ints of at least 1, separated by commas, got '16,x'"),
        *([] if torch.cuda.is_available() else WITHOUT_A_GPU),
    ],
)
def test_refusals_of_the_command(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moealign.cli.report.pages.study", lambda *a, **k: pytest.fail("the study began"))
    result = run(str(example_trace()), *arguments)
    assert list(tmp_path.iterdir()) == []
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_refusals(report, tmp_path):
    with pytest.raises(InvalidInput, match=r"expected a path that ends in \.html, \.png, \.svg, got \.gif"):
        page.write(report[0], tmp_path / "a.gif")
    with pytest.raises(InvalidInput, match="layer: expected one below 4, got 4"):
        page.write(report[0], tmp_path / "a.html", layer=4)
    for sizes in ((), (0, 16)):
        with pytest.raises(InvalidInput, match="sizes: expected block sizes of at least 1"):
            page.study(TRACE, sizes, on_gpu=False)


def test_the_same_study_gives_the_same_bytes(report, tmp_path):
    first, second = report[1], tmp_path / "b.html"
    page.write(report[0], second, layer=2)
    assert first.read_bytes() == second.read_bytes()
