"""What `moealign report` writes besides the page: JSON, files for serving engines, placements, comparisons."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moealign import costs, placement, report
from moealign.cli import app
from moealign.errors import InvalidInput
from moealign.parallel import ExpertPlacement
from moealign.recorder import capture
from moealign.report import engines, summary
from moealign.report import page as pages
from moealign.trace import Trace, example_trace, load_trace, save_trace

PATH = str(example_trace())
TRACE = load_trace(PATH)
SIZES = (16, 64, 256)


def run(*arguments: str):
    return CliRunner().invoke(app, ["report", *arguments, "--no-gpu"])


def test_the_numbers_as_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(PATH, "--json", "--block-size", "16,64,256")
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.output)
    assert list(tmp_path.iterdir()) == [], "a page only where --output asks for one"
    study = report.study(TRACE, SIZES, on_gpu=False)
    assert numbers == json.loads(json.dumps(report.as_json(study)))
    assert numbers["sizes"] == {"hidden": 128, "intermediate": 32, "bytes": 2, "source": "from the trace"}
    assert [each["kind"] for each in numbers["batches"]] == ["decode", "prefill"]
    assert numbers["batches"][0]["share"] == pytest.approx(study.advice[0].alignment / study.advice[0].layer)
    assert not numbers["batches"][0]["measured"]
    assert numbers["trace"]["device"] == "cpu"
    assert len(numbers["by_tokens"]) == len(study.by_tokens)


def test_a_trace_without_routes_has_no_recommendation(tmp_path, recwarn):
    study = report.study(Trace(torch.full((2, 500, 2), -1), 16, "m", "s", ""), SIZES, on_gpu=False)
    assert study.best_size is None
    assert report.lines(study) == ["The trace has no routes, so there is nothing to recommend."]
    assert report.as_json(study)["batches"] == []
    for suffix in report.FORMATS:
        report.write(study, tmp_path / f"a{suffix}")
    assert "<b>0 routes</b>" in (tmp_path / "a.html").read_text()
    assert [str(each.message) for each in recwarn] == []
    with pytest.raises(InvalidInput, match="expected a trace with routes, got one without"):
        report.write_configuration(study, tmp_path, "a GPU")


def test_batches_are_the_calls_of_the_model(tmp_path):
    trace = dataclasses.replace(TRACE, details={**TRACE.details, "calls": [4000] + [32] * 131, "device": "NVIDIA H200"})
    study = report.study(trace, SIZES, on_gpu=False)
    assert [(each.kind, each.tokens, each.observed) for each in study.advice] == [
        ("decode", 32, True),
        ("prefill", 4000, True),
    ]
    text = "\n".join(report.lines(study))
    assert "Batches are the 132 calls of the model in the trace, of 32 to 4,000 tokens." in text
    assert "the trace was recorded on NVIDIA H200" in text
    assert study.imbalance.shape == (4, 132)
    first = costs.loads_of(TRACE.topk_ids[:, :4000], 64)
    assert (study.batches[:, 0] == first).all()
    assert (study.loads == costs.loads_of(TRACE.topk_ids, 64)).all()
    report.write(study, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "Imbalance over 132 calls" in page
    assert "tokens of a call, " in page


GAPS = {"calls_left_out": {"incomplete step": 1, "limit": 14}, "note": "Replays of <graphs> are missing."}
TOLD = "Alignments that the trace lacks: 1 incomplete step, 14 limit. Replays of <graphs> are missing."


def test_what_the_recorder_could_not_see_is_said(tmp_path):
    path, whole = tmp_path / "t.safetensors", tmp_path / "whole.safetensors"
    layer = dataclasses.replace(TRACE, topk_ids=TRACE.topk_ids[:1])
    save_trace(whole, layer)
    save_trace(path, dataclasses.replace(layer, details={**TRACE.details, **GAPS}))
    words = {"inspect": CliRunner().invoke(app, ["inspect", str(path)]).output}
    for name, arguments in {"one": (str(path),), "two": (str(whole), str(path))}.items():
        for suffix in (".html", ".svg"):
            page = tmp_path / f"{name}{suffix}"
            words[name] = run(*arguments, "-o", str(page)).output
            words[page.name] = re.sub(r"</text>\s*<text[^>]*>", " ", page.read_text()).replace("&lt;", "<")
            words[page.name] = words[page.name].replace("&gt;", ">")
    for name, text in words.items():
        assert " ".join(text.split()).count(TOLD) == 1, name
    assert "lacks" not in CliRunner().invoke(app, ["inspect", str(whole)]).output
    odd = dataclasses.replace(TRACE, details={"calls_left_out": [1], "note": 3})
    assert summary.gaps_text(odd) == ""


class Experts(torch.nn.Module):
    num_experts = 4

    def __init__(self, intermediate: int, transposed: bool) -> None:
        super().__init__()
        shape = (4, intermediate, 16) if transposed else (4, 16, intermediate)
        self.down_proj = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        return hidden_states


class Model(torch.nn.Module):
    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, torch.zeros(len(x), 2, dtype=torch.int64))
        return x


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ([Experts(24, False), Experts(24, True)], (16, 24)),
        ([Experts(24, False), Experts(8, False)], (16, None)),
        ([Experts(16, False)], (16, 16)),
    ],
)
def test_capture_records_the_sizes_and_the_device(layers, sizes, tmp_path):
    with capture(Model(*layers)) as seen:
        seen._model(torch.zeros(3, 16))
    trace = seen.trace()
    assert (trace.hidden, trace.intermediate, trace.device) == (*sizes, "cpu")
    save_trace(tmp_path / "t.safetensors", trace)
    assert load_trace(tmp_path / "t.safetensors").details == trace.details


# ---- engines -----------------------------------------------------------------------------------------------------


def test_the_configuration_of_engines(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"triton": "3.4.0+git1"}[name])
    folder = tmp_path / "tiles"
    result = run(
        PATH, "-o", str(tmp_path / "a.html"), "--engine-config", str(folder), "--device-name", "NVIDIA H200 NVL"
    )
    assert result.exit_code == 0, result.output
    vllm = folder / "E=64,N=32,device_name=NVIDIA_H200.json"
    sglang = folder / "configs" / "triton_3_4_0" / "E=64,N=32,device_name=NVIDIA_H200_NVL.json"
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted([vllm, sglang])
    assert vllm.read_text() == sglang.read_text()
    tiles = {int(tokens): tile for tokens, tile in json.loads(vllm.read_text()).items()}
    advised = {row.tokens: row.block_size for row in report.study(TRACE, engines.BLOCK_SIZES, on_gpu=False).by_tokens}
    assert {tokens: tile["BLOCK_SIZE_M"] for tokens, tile in tiles.items()} == advised
    for tile in tiles.values():
        assert list(tile) == ["BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"]
        stage = 2 * tile["BLOCK_SIZE_K"] * (tile["BLOCK_SIZE_M"] + tile["BLOCK_SIZE_N"])
        assert stage * tile["num_stages"] <= 99 * 1024, "fits the shared memory of small GPUs"
        assert all(value & (value - 1) == 0 for name, value in tile.items() if name.startswith("BLOCK"))


def test_a_configuration_needs_the_sizes_of_the_trace(tmp_path, monkeypatch):
    study = report.study(dataclasses.replace(TRACE, details={}), (16,), on_gpu=False)
    assert study.experts_source == "assumed"
    with pytest.raises(InvalidInput, match="expected the sizes of an expert, which name the file, got a trace without"):
        report.write_configuration(study, tmp_path, "a GPU")
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "t.safetensors"
    save_trace(path, study.trace)
    monkeypatch.setattr("moealign.cli.report.pages.study", lambda *a, **k: pytest.fail("the study began"))
    result = run(str(path), "--json", "--engine-config", str(tmp_path / "tiles"), "--device-name", "G")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "got a trace without; pass --hidden and --intermediate" in result.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_device_names():
    assert engines.device_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3"
    assert engines.device_name("NVIDIA H200 NVL") == "NVIDIA_H200"
    assert engines.device_name("A/B  C") == "A_B_C"


# ---- placements --------------------------------------------------------------------------------------------------


def test_a_placement_goes_through_a_file(tmp_path):
    path = tmp_path / "placement.json"
    result = run(PATH, "-o", str(tmp_path / "a.html"), "--placement", str(path), "--ranks", "6")
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert list(content) == ["physical_to_logical_map"], "SGLang takes no other key"
    maps = np.array(content["physical_to_logical_map"])
    assert maps.shape == (4, 66), "two copies fill six ranks"
    loads = costs.loads_of(TRACE.topk_ids, 64)
    for layer in range(4):
        held = ExpertPlacement.load(path, ranks=6, layer=layer)
        assert (held.table == placement.balanced(loads[layer], 6, 2)).all()
        for rank in range(6):
            for expert in range(64):
                slot = held.expert_map(rank)[expert].item()
                assert slot < 0 or maps[layer, rank * 11 + slot] == expert
        held.save(tmp_path / "one.json")
        assert (ExpertPlacement.load(tmp_path / "one.json", ranks=6).table == held.table).all()
    with pytest.raises(InvalidInput, match="layer: expected a layer below 4, got 4"):
        ExpertPlacement.load(path, ranks=6, layer=4)


@pytest.mark.parametrize(
    ("content", "ranks", "message"),
    [
        ("{", 2, "expected JSON with the key physical_to_logical_map, got JSONDecodeError"),
        ("[" * 100_000, 2, "expected JSON with the key physical_to_logical_map, got RecursionError"),
        ("[]", 2, "expected JSON with the key physical_to_logical_map, got TypeError"),
        ("{}", 2, "expected JSON with the key physical_to_logical_map, got KeyError"),
        ('{"physical_to_logical_map": [[0, 1], [0]]}', 2, "expected JSON with the key physical_to_logical_map"),
        ('{"physical_to_logical_map": [0, 1]}', 2, r"expected physical_to_logical_map to hold ids \[layers, physical"),
        (
            '{"physical_to_logical_map": [[0, -1]]}',
            2,
            r"expected physical_to_logical_map to hold ids \[layers, physical",
        ),
        (
            '{"physical_to_logical_map": [[0.5, 1]]}',
            2,
            r"expected physical_to_logical_map to hold ids \[layers, physical",
        ),
        ('{"physical_to_logical_map": [[0, 1, 2]]}', 2, "ranks: expected a divisor of 3 physical experts, got 2"),
        ('{"physical_to_logical_map": [[0, 9]]}', 2, "expected ids below 2, the number of slots, got 9"),
        ('{"physical_to_logical_map": [[0, 1], [0, 0]]}', 2, "expected every expert in layer 1, expert 1 is nowhere"),
    ],
)
def test_files_that_hold_no_placement(tmp_path, content, ranks, message):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        placement.load(path, ranks)


def test_placements_that_engines_do_not_take(tmp_path):
    with pytest.raises(InvalidInput, match="expected an expert in every slot, got empty slots"):
        placement.save(tmp_path / "p.json", placement.linear(3, 2)[None])
    with pytest.raises(InvalidInput, match=r"expected \[layers, ranks, slots\], got shape \[2, 2\]"):
        placement.save(tmp_path / "p.json", placement.linear(4, 2))
    assert [placement.spare_slots(64, ranks) for ranks in (8, 6, 5)] == [0, 2, 1]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidInput, match="expected at most 2048 experts to place, got 4096"):
        costs.place(Trace(TRACE.topk_ids, 4096, "m", "s", "r"), 8)
    assert costs.placement_gain(TRACE.topk_ids, 4096, [2]) == []


# ---- two traces --------------------------------------------------------------------------------------------------


def test_two_traces(tmp_path):
    other = tmp_path / "other.safetensors"
    ids = (TRACE.topk_ids.long() * 3 // 4).clamp(max=63)  # 16 experts become idle
    save_trace(other, Trace(ids, 64, "<other>", "s", "r", {"hidden": 64, "intermediate": 16}))
    for suffix in report.FORMATS:
        result = run(PATH, str(other), "-o", str(tmp_path / f"c{suffix}"))
        assert result.exit_code == 0, result.output
    assert "idle experts:\n  A  0 of 256\n  B  64 of 256" in result.output
    page = (tmp_path / "c.html").read_text()
    assert "&lt;other&gt;" in page
    assert "<other>" not in page
    assert page.count("<svg") == 2
    numbers = json.loads(run(PATH, str(other), "--json").output)
    loads = [costs.loads_of(each, 64)[0] for each in (TRACE.topk_ids, ids)]
    assert numbers["overlap"][0] == pytest.approx(np.minimum(*(each / each.sum() for each in loads)).sum())
    assert numbers["placement"]["own"] <= numbers["placement"]["of_A"]


def test_traces_of_other_shapes_are_compared_as_far_as_they_go(tmp_path):
    study = report.study(TRACE, SIZES, on_gpu=False)
    small = report.study(Trace(TRACE.topk_ids[:2, :9] % 8, 8, "m", "s", "r"), SIZES, on_gpu=False)
    comparison = report.compare(study, small)
    assert comparison.notes() == [
        "The traces have different numbers of layers or experts, so their experts are not compared."
    ]
    for suffix in report.FORMATS:
        report.write_comparison(comparison, tmp_path / f"c{suffix}")
    assert report.comparison_json(comparison)["overlap"] is None
    nothing = report.study(Trace(torch.full_like(TRACE.topk_ids[:, :9], -1), 64, "m", "s", "r"), SIZES, on_gpu=False)
    for pair, said in (
        ((study, nothing), "B has no routes"),
        ((nothing, study), "A has no routes"),
        ((nothing, nothing), "A and B have no routes"),
    ):
        comparison = report.compare(*pair)
        assert comparison.notes() == [f"{said}: nothing to compare."]
        assert (comparison.overlap, comparison.carried) == (None, None)
    report.write_comparison(comparison, tmp_path / "nothing.html")
    with pytest.raises(InvalidInput, match=r"expected a path that ends in \.html, \.png, \.svg, got \.gif"):
        report.write_comparison(comparison, tmp_path / "c.gif")


def test_on_a_phone_scroll_areas_say_so(tmp_path):
    report.write(report.study(TRACE, SIZES, on_gpu=False), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    areas = len(re.findall(r'<div class="wide"(?! tabindex="0" data-layer)', page)) + 1  # one hint for all maps
    assert page.count("Swipe sideways") == areas
    assert "or tap it" in page
    assert '"pointerdown"' in page


@pytest.mark.parametrize("ending", ["html", "png", "svg"])
def test_names_in_any_script_are_drawn_without_a_warning(ending, tmp_path, recwarn):
    """matplotlib would warn of each character, and read formulas between dollar signs."""
    trace = str(tmp_path / "t.safetensors")
    save_trace(trace, Trace(torch.tensor([[[0, 1], [2, 3]]]), 4, "通义千问 \x1b[31m", "from $2 to $\\frac", "1"))
    for traces in ([trace], [trace, trace]):
        result = run(*traces, "-o", str(tmp_path / f"r.{ending}"))
        assert (result.exit_code, result.stderr) == (0, "")
        if ending != "png":
            text = (tmp_path / f"r.{ending}").read_text("utf-8")
            assert "通义千问" in text
            assert "from $2 to $\\frac" in text
    assert [str(each.message) for each in recwarn] == []


def test_a_page_draws_a_bounded_number_of_layers(tmp_path, monkeypatch):
    assert pages._mapped(3, 1) == [0, 1, 2]
    assert len(pages._mapped(100_000, 7)) <= pages.MAX_MAPS + 1
    monkeypatch.setattr(pages, "MAX_MAPS", 2)
    trace = Trace(torch.randint(0, 4, (9, 3, 2)), 4, "m", "s", "r")
    save_trace(tmp_path / "t.safetensors", trace)
    done = run(str(tmp_path / "t.safetensors"), "-o", str(tmp_path / "r.html"), "--layer", "4")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "r.html").read_text()
    assert re.findall(r'data-layer="(\d+)"( hidden)?', text) == [("0", " hidden"), ("4", ""), ("5", " hidden")]
    assert "The page has 3 of 9 layers." in text
    assert set(json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["maps"]) == {"0", "4", "5"}
