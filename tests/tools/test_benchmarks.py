"""The benchmark's oracle, its CSV, and the tables of docs/.  Nothing here is timed."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import figures
import processes
import pytest
import tables
import tables_parallel
import torch

from moealign import bench
from moealign.bench.candidates import argsort_candidate
from moealign.testing import oracle_align, oracle_align_batched

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "benchmarks" / "results"
COLUMNS = "bench,case,routes,num_experts,top_k,block_size,impl,median_us,min_us,max_us,gpu,torch,date"
DONE = f"""{COLUMNS}
align,1x8-E256-B16,8,256,8,16,moealign-cuda,2.000,1.900,2.500,h200,2.11.0,2026-11-23
align,1x8-E256-B16,8,256,8,16,vllm-0.33.0,5.000,4.900,5.500,h200,2.11.0,2026-11-23
align,1x8-E256-B16,8,256,8,16,sglang-kernel-0.4.4,4.000,3.900,4.500,h200,2.11.0,2026-11-23
align,1x8-E256-B16,8,256,8,16,floor-chain,1.000,0.900,1.500,h200,2.11.0,2026-11-23
align,16384x8-E256-B128,131072,256,8,128,moealign-cuda,7.5,7.4,7.6,h200,2.11.0,2026-11-23
align,16384x8-E256-B128,131072,256,8,128,vllm-0.33.0,60,59,61,h200,2.11.0,2026-11-23
batched,nb8-M128-B16,1024,8,128,16,moealign-cuda,2.2,2.1,2.3,h200,2.11.0,2026-11-23
batched,nb8-M128-B16,1024,8,128,16,vllm-0.33.0,3.3,3.2,3.4,h200,2.11.0,2026-11-23
align-scale,131072x8-E1024-B128,1048576,1024,8,128,moealign-cuda,20,19,21,h200,2.11.0,2026-11-23
align-scale,131072x8-E1024-B128,1048576,1024,8,128,floor-bytes,4,4,4,h200,2.11.0,2026-11-23
align-random,2x2-E8-B16,4,8,2,16,moealign-cuda,1,1,1,h200,2.11.0,2026-11-23
align-random,2x2-E8-B16,4,8,2,16,vllm-0.33.0,2,2,2,h200,2.11.0,2026-11-23
align-random,9x2-E8-B16,18,8,2,16,moealign-cuda,1,1,1,h200,2.11.0,2026-11-23
align-random,9x2-E8-B16,18,8,2,16,vllm-0.33.0,8,8,8,h200,2.11.0,2026-11-23
eager-host,32x8-E256-B16 drop-in,256,256,8,16,moealign-cuda,11,10,12,h200,2.11.0,2026-11-23
eager-host,32x8-E256-B16 drop-in,256,256,8,16,vllm-0.33.0,25,24,26,h200,2.11.0,2026-11-23
"""
DONE_CPU = f"""{COLUMNS}
align,routes,4096,256,8,64,moealign-cpu,25,24,26,cpu,2.13.0,2026-11-23
align,routes,4096,256,8,64,torch-argsort,500,490,510,cpu,2.13.0,2026-11-23
align,experts,4096,256,8,64,moealign-cpu,99,98,100,cpu,2.13.0,2026-11-23
"""
PAGE = "docs/performance.md"
TEXT = """# title

<!-- performance:begin -->
<!-- performance:end -->

<!-- performance-scale:begin -->
<!-- performance-scale:end -->

between

<!-- performance-cpu:begin -->
stale
<!-- performance-cpu:end -->
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of nothing but pages with empty tables and two measurements."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "align_h200.csv").write_text(DONE)
    (results / "align_cpu.csv").write_text(DONE_CPU)
    (results.parent / "trials.csv").write_bytes((BENCHMARKS / "trials.csv").read_bytes())
    for page, tables_of in figures.PAGES.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        markers = (f"<!-- {marker}:begin -->\n<!-- {marker}:end -->\n" for marker, *_ in tables_of)
        (tmp_path / page).write_text("".join(markers))
    (tmp_path / PAGE).write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize("kind", ["uniform", "one-expert", "zipf", "half-minus-one"])
@pytest.mark.parametrize(("mapped", "ignore"), [(False, False), (True, False), (True, True)])
def test_the_benchmarks_oracle_is_the_librarys(kind: str, mapped: bool, ignore: bool) -> None:
    size = (37, 3, 11, 7)
    ids = bench.make_ids(kind, size, torch.Generator().manual_seed(3))
    expert_map = torch.tensor([-1, 3, 2, -1, 0, 5, 1, 4, -1, 6, 7], dtype=torch.int32) if mapped else None
    call = {"block_size": 7, "num_experts": 11, "expert_map": expert_map, "ignore_invalid_experts": ignore}
    expected = oracle_align(ids, **call)
    expected.pop("error_word")
    fast = bench.expected_layout(
        ids.numpy().reshape(-1),
        block_size=7,
        num_experts=11,
        length=len(expected["sorted_token_ids"]),
        expert_map=None if expert_map is None else expert_map.numpy(),
        ignore=ignore,
    )
    assert {name: fast[name].tolist() for name in expected} == expected


def test_the_benchmarks_oracle_of_batches_is_the_librarys() -> None:
    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32)
    case = bench.Case("batched", "", (5, 8, 5, 4), [counts], batched=True)
    expected = oracle_align_batched(counts, max_tokens_per_batch=8, block_size=4)
    expected.pop("error_word")
    assert {name: case.expected(0)[name].tolist() for name in expected} == expected


def test_rows_of_ids_hold_distinct_experts() -> None:
    for kind in ("uniform", "zipf"):
        ids = bench.make_ids(kind, (50, 8, 16, 4), torch.Generator().manual_seed(0))
        assert ids.dtype == torch.int32
        assert all(len(set(row)) == 8 for row in ids.tolist())


def peer_output(ids: list[int]) -> tuple[torch.Tensor, ...]:
    """What a peer might give for 3 experts in blocks of 2: right, but not stable, and with a tail of its own."""
    assert ids == [2, 0, 2, -1, 2]
    return torch.tensor([1, 5, 4, 0, 2, 5, 77]), torch.tensor([0, 2, 2, -3]), torch.tensor([6])


def test_a_peer_may_order_a_bin_as_it_likes_and_nothing_else() -> None:
    ids = torch.tensor([[2], [0], [2], [-1], [2]], dtype=torch.int32)
    expected = bench.Case("align", "", (5, 1, 3, 2), [ids]).expected(0)
    routes, experts, total = peer_output(ids.flatten().tolist())
    assert bench.bins_difference(routes, experts, total, expected, 2) is None
    twice, missing, moved = routes.clone(), routes.clone(), experts.clone()
    twice[2], missing[4], moved[0] = 0, 5, 1
    assert "once each" in bench.bins_difference(twice, experts, total, expected, 2)
    assert "once each" in bench.bins_difference(missing, experts, total, expected, 2)
    assert "expected expert 0, got 1" in bench.bins_difference(routes, moved, total, expected, 2)
    assert "multiple of 2" in bench.bins_difference(routes, experts, torch.tensor([5]), expected, 2)


def test_exact_difference_names_the_element() -> None:
    ids = torch.tensor([[1], [0]], dtype=torch.int32)
    expected = bench.Case("align", "", (2, 1, 2, 1), [ids]).expected(0)
    assert bench.exact_difference({"sorted_token_ids": torch.tensor([1, 0])}, expected) is None
    assert "sorted_token_ids[1]: expected 0, got 9" in bench.exact_difference(
        {"sorted_token_ids": torch.tensor([1, 9])}, expected
    )
    assert "expected 2 elements, got 3" in bench.exact_difference({"sorted_token_ids": torch.zeros(3)}, expected)


def made_up_timer(session: Any, candidates: list[Any]) -> dict[str, list[float]]:
    for candidate in candidates:
        for slot in range(session.slots):
            candidate.call(slot)
    return {candidate.impl: [1.0, 3.0, 2.0] for candidate in candidates}


def small_case() -> tuple[Any, Any]:
    session = bench.Session(torch.device("cpu"), "test", ["reference"], slots=2)
    size = (4, 2, 8, 4)
    return session, bench.Case("align", bench.case_name(size), size, session.inputs("uniform", size))


def test_what_is_wrong_is_reported_and_not_timed() -> None:
    session, case = small_case()
    wrong = bench.Candidate("wrong", lambda slot: None, lambda slot: "element 3")
    session.run(case, [wrong, bench.moealign_candidate("reference", case)], made_up_timer)
    assert [row["impl"] for row in session.rows] == ["moealign-reference"]
    assert session.failures == ["WRONG align 4x2-E8-B4 wrong: element 3"]


def test_timed_calls_that_wrote_nothing_are_reported() -> None:
    session, case = small_case()
    session.run(
        case,
        [bench.moealign_candidate("reference", case)],
        lambda _, candidates: {each.impl: [1.0] for each in candidates},
    )
    assert session.rows == []
    assert "after the timed calls: sorted_token_ids[0]: expected " in session.failures[0]
    assert "got -7" in session.failures[0]


def test_rows_have_the_columns(tmp_path: Path) -> None:
    session, case = small_case()
    session.run(case, [bench.moealign_candidate("reference", case), argsort_candidate(case)], made_up_timer)
    assert session.failures == []
    bench.write_csv(session.rows, tmp_path / "some" / "align_test.csv")
    lines = (tmp_path / "some" / "align_test.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    today = session.rows[0]["date"]
    assert lines[1] == f"align,4x2-E8-B4,8,8,2,4,moealign-reference,2.000,1.000,3.000,test,{torch.__version__},{today}"
    assert len(lines) == 3


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*_*.csv")), ids=lambda path: path.name)
def test_tracked_results_have_the_columns_and_one_row_a_measurement(path: Path) -> None:
    with path.open(newline="") as source:
        reader = csv.DictReader(source)
        rows = list(reader)
    assert reader.fieldnames == [*COLUMNS.split(","), *(["peak_mib"] if path.name.startswith("train_") else [])]
    keys = [tuple(row[name] for name in COLUMNS.split(",")[:7]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(0 <= float(row["min_us"]) <= float(row["median_us"]) <= float(row["max_us"]) for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = processes.run(BENCHMARKS / "align.py")
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "expected a GPU" in done.stdout


def test_gpu_slug() -> None:
    assert bench.gpu_slug("NVIDIA H200") == "h200"
    assert bench.gpu_slug("NVIDIA GeForce RTX 4090") == "rtx-4090"
    assert bench.gpu_slug("NVIDIA H100 80GB HBM3") == "h100"
    assert bench.gpu_slug("NVIDIA H100 PCIe") == "h100-pcie"
    assert bench.gpu_slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4"


def test_tables_of_results_that_were_made_up(root: Path) -> None:
    text = figures.with_tables(PAGE, TEXT, root / "benchmarks")
    assert "| 1 x 8, 256, 16 | 8 | 2.00 | 5.00 | 4.00 | 1.00 | 2.0x |" in text
    assert "| 16,384 x 8, 256, 128 | 131,072 | 7.50 | 60.0 | - | - | 8.0x |" in text
    assert "| 8 x 128, 16 | 2.20 | 3.30 | 1.5x |" in text
    assert "| 1,048,576 | 1,024 | 20.0 | - | - | - | 4.00 | - | 5.0x |" in text
    assert "2 random shapes of 1 to 262,144 routes: the faster peer takes 2.00 to 8.0 times as long, 4.00 in" in text
    assert "(256 routes): 11.0 us, vLLM's wrapper 25.0 us." in text
    assert "H200, torch 2.11.0, 2026-11-23; `benchmarks/results/align_h200.csv`" in text
    assert "| 512 x 8, 256, 64 | 4,096 | 25.0 | 500.0 | 20.0x |" in text
    assert "99.0" not in text
    assert "stale" not in text
    assert text.startswith("# title\n")
    assert "\nbetween\n" in text
    assert figures.with_tables(PAGE, text, root / "benchmarks") == text


def test_without_a_gpu_named_the_newest_measurements_are_taken(root: Path) -> None:
    results = root / "benchmarks" / "results"
    (results / "align_h100.csv").write_text(DONE.replace("h200", "h100").replace("11-23", "11-24"))
    name = "results/align_{gpu}"
    for gpu, file in ((None, "align_h100.csv"), ("h200", "align_h200.csv"), ("b200", "align_b200.csv")):
        assert figures.measured(root / "benchmarks", name, gpu) == results / file
    (results / "align_h200.csv").write_text(DONE.replace("11-23", "11-24"))
    assert figures.measured(root / "benchmarks", name, None) == results / "align_h200.csv"


def test_a_missing_or_double_marker_is_an_error(root: Path) -> None:
    for text in ("nothing", TEXT + TEXT):
        with pytest.raises(ValueError, match=r"expected <!-- performance:begin --> and then .* once each"):
            figures.with_tables(PAGE, text, root / "benchmarks")


def test_a_file_that_is_not_there_leaves_its_tables_alone(tmp_path: Path) -> None:
    for page in figures.PAGES:
        assert figures.with_tables(page, "no markers", tmp_path) == "no markers"


def test_the_script_writes_and_checks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    image = root / "docs" / "images" / "performance.png"
    arguments = ["--root", str(root)]
    assert figures.main([*arguments, "--check"]) == 1
    output = capsys.readouterr().out
    assert "README.md: its tables differ from" in output
    assert "docs/performance.md: its tables differ from" in output
    assert "docs/experts.md" not in output
    assert not image.exists()
    assert figures.main(arguments) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    assert figures.main([*arguments, "--check"]) == 0
    (root / "docs" / "performance.md").write_text("no markers")
    assert figures.main([*arguments, "--check"]) == 2
    assert figures.main(["--root", str(root / "none")]) == 2


@pytest.mark.parametrize("page", figures.PAGES)
def test_the_tables_of_a_page_are_those_of_the_tracked_files(page: str) -> None:
    text = (ROOT / page).read_text()
    assert figures.with_tables(page, text, BENCHMARKS) == text, "run make figures"


def test_every_marker_of_a_page_is_filled_by_the_script() -> None:
    for page, tables_of in figures.PAGES.items():
        found = re.findall(r"<!-- (\S+):begin -->", (ROOT / page).read_text())
        assert sorted(found) == sorted(marker for marker, *_ in tables_of), page


def test_without_a_measurement_the_table_of_engines_says_so() -> None:
    text = (ROOT / "docs" / "integrations.md").read_text()
    if list((BENCHMARKS / "results").glob("engines_*.csv")):
        assert "| not measured |" not in next(line for line in text.splitlines() if "`MOEALIGN_VLLM=layer`" in line)
    else:
        assert tables.engines_table([], "") in text


LAYERS = """bench,case,routes,num_experts,top_k,block_size,impl,median_us,min_us,max_us,gpu,torch,date
plugin-align,32x8-E128-B16,256,128,8,16,vllm-0.33.0,4,4,4,h200,2.11.0,2026-11-23
plugin-align,32x8-E128-B16 mapped,256,128,8,16,vllm-0.33.0,90,90,90,h200,2.11.0,2026-11-23
plugin-layer,T1-k8-E128-H2048-I768,8,128,8,16,vllm-0.33.0,30,30,30,h200,2.11.0,2026-11-23
plugin-layer,T1-k8-E128-H2048-I768,8,128,8,16,moealign,32,32,32,h200,2.11.0,2026-11-23
plugin-layer,T32-k8-E128-H2048-I768,256,128,8,16,vllm-0.33.0,200,200,200,h200,2.11.0,2026-11-23
plugin-layer,T32-k8-E128-H2048-I768,256,128,8,16,moealign,160,160,160,h200,2.11.0,2026-11-23
"""


def test_the_share_of_the_alignment_is_that_of_layers_that_align(tmp_path: Path) -> None:
    (tmp_path / "plugins.csv").write_text(LAYERS)
    sentence = tables.layer_sentence(figures.read(tmp_path / "plugins.csv"), "a.csv")
    assert "takes 2.0% of a fused layer of vLLM 0.33.0 at 32 to 32 tokens" in sentence, (
        "not one token: vLLM aligns none"
    )
    assert "runs 0.94 to 1.25 times as fast" in sentence


def test_sentences_about_a_model_and_about_the_alignment(tmp_path: Path) -> None:
    steps = {"grouped_mm": 300, "grouped_mm-graph": 40, "moealign": 200, "moealign-graph": 20, "batched_mm": 1}
    head = LAYERS.splitlines()[0]
    (tmp_path / "a.csv").write_text(
        "\n".join([head, *(f"transformers,decode T1,8,128,8,0,{k},{v},1,1,h200,2.11.0,x" for k, v in steps.items())])
    )
    assert "2.00 times the tokens per second of `grouped_mm` when decoding in a CUDA graph, 1.50 times in" in (
        tables.model_sentence(figures.read(tmp_path / "a.csv"), "a.csv")
    )
    (tmp_path / "b.csv").write_text(DONE)
    assert "2.0 times as fast at 8 routes (2.00 us) and 8.0 times as fast at 131,072 routes (7.50 us)" in (
        tables.align_sentence(figures.read(tmp_path / "b.csv"), "b.csv")
    )


VERSIONS = """name,python,torch,transformers,triton,numba,numpy,passed,failed,skipped,date
torch-2.10,3.11.7,2.10.0,5.24.0,3.6.0,0.68.1,2.4.6,900,1,12,2026-11-26
oldest,3.10.13,2.10.0,5.16.0,-,0.61.0,1.26.4,950,0,10,2026-11-27
"""


def test_the_table_of_versions_is_its_rows_and_the_dates_they_span(tmp_path: Path) -> None:
    (tmp_path / "versions.csv").write_text(VERSIONS)
    rows = figures.read(tmp_path / "versions.csv")
    output, _, table = tables.versions_table(rows, "a.csv").partition("\n\n")
    assert output == "`make test-versions`, 2026-11-26 to 2026-11-27; `a.csv`."
    header, _, *lines = (line.strip("| ").split(" | ") for line in table.splitlines())
    assert [header, *lines] == [line.split(",")[:-1] for line in VERSIONS.splitlines()]
    assert tables.versions_table(rows[:1], "a.csv").startswith("`make test-versions`, 2026-11-26; `a.csv`.")


# ---- experts, routers, plug-ins, trials -----------------------------------------------------------------------


def rows_of(text: str) -> list[dict[str, str]]:
    """Rows from lines of bench, case, routes, experts, top-k, and the median of each implementation."""
    rows = []
    for line in text.strip().splitlines():
        bench, case, *sizes = (cell.strip() for cell in line.split(",")[:5])
        for named in line.split(",")[5:]:
            impl, median = named.split("=")
            values = [bench, case, *sizes, "16", impl.strip(), median, median, median, "h200", "2.11.0", "2026-11-23"]
            rows.append(dict(zip(COLUMNS.split(","), values, strict=True)))
    return rows


FLOOR_RATES = f"{6 * 128 * 64 * 32 / 10 / 1e6:.2f} TB/s and {6 * 32768 * 64 * 32 / 10 / 1e6:.0f} TFLOP/s"


@pytest.mark.parametrize(
    ("maker", "rows", "lines"),
    [
        (
            tables.experts_table,
            """
            experts, T1-k8-E128-H64-I32, 8, 128, 8, moealign=10, vllm-0.33.0=11, transformers-grouped_mm=40, floor=9.9
            experts, T256-k8-E128-H64-I32, 2048, 128, 8, moealign=20, vllm-0.33.0=30, floor=10
            experts, T4096-k8-E8-H64-I32, 32768, 8, 8, moealign=20, vllm-0.33.0=30, vllm-0.33.0-tuned=19, floor=10
            """,
            [
                "| 128, 8, 64, 32 | 1 | 10.0 | 11.0 | - | 40.0 | 9.90 | 1.10x | 4.00x | 99% |",
                "| 8, 8, 64, 32 | 4,096 | 20.0 | 30.0 | 19.0 | - | 10.0 | 1.50x | - | 50% |",
                FLOOR_RATES,
            ],
        ),
        (
            tables.experts_cpu_table,
            "experts-cpu, T16-k8-E64-H512-I256 float32, 128, 64, 8, moealign=10, transformers-eager=20",
            ["| 64, 8, 512, 256 | float32 | 16 | 2.00x | - | - |"],
        ),
        (
            tables.routing_cpu_table,
            "routing-cpu, Qwen3-MoE float32, 4096, 128, 8, moealign-cpu=10, torch=25, moealign-cpu-2t=5, torch-2t=20",
            ["| Qwen3-MoE, 8 of 128 | 512 | 10.0 | 25.0 | 2.50x | 5.00 | 20.0 | 4.00x |"],
        ),
        (
            tables.transformers_table,
            """
            transformers, decode T1 H2048-I768 8 layers, 8, 128, 8, moealign=1000, grouped_mm=1500, moealign-graph=500
            transformers, prefill T4096 H2048-I768 8 layers, 32768, 128, 8, moealign=4096, moealign-routers=2048
            """,
            [
                "| decode, 1 token, eager | 1,000 | - | 667 | - | 1.50x |",
                "| decode, 1 token, CUDA graph | 2,000 | - | - | - | - |",
                "| prefill, 4,096 tokens, eager | 1,000,000 | 2,000,000 | - | - | - |",
            ],
        ),
        (
            tables.routing_table,
            """
            routing, 1x8-E256-B16 bfloat16, 8, 256, 8, moealign-cuda=2, moealign-cuda-align=1, vllm-0.33.0=6
            routing, 1024x8-E256-B16 bfloat16, 8192, 256, 8, moealign-cuda=2, moealign-triton=3, vllm-0.33.0=5
            routing-grouped, 1x8-E256-B16 float32, 8, 256, 8, moealign-cuda=4, vllm-0.33.0=8
            """,
            [
                "| 1 x 8, 256, 16 | 2.00 | 1.00 | - | - | 6.00 | 3.00x | 2.00x |",
                "| 1,024 x 8, 256, 16 | 2.00 | - | - | 3.00 | 5.00 | 2.50x | - |",
                "| 1 x 8, 256, 16 | 4.00 | - | - | - | 8.00 | 2.00x | - |",
            ],
        ),
        (
            tables.plugins_table,
            """
            plugin-align, 1x8-E128-B16, 8, 128, 8, vllm-0.33.0=4, moealign=1
            plugin-align, 2x8-E128-B16, 16, 128, 8, vllm-0.33.0=4, moealign=2
            plugin-align-host, 1x8-E128-B16, 8, 128, 8, vllm-0.33.0=30, moealign=20
            """,
            ["| alignment | 2.00x to 4.00x | 1.50x |", "| fused layer | - | - |"],
        ),
        (
            tables.engines_table,
            """
            engine-layer, T1-k8-E128-H2048-I768, 8, 128, 8, vllm-0.33.0=40, moealign=20
            engine-layer, T4-k8-E128-H2048-I768, 32, 128, 8, vllm-0.33.0=40, moealign=80
            """,
            [
                "whole layers of bfloat16, float16 and FP8 experts: `fused_moe` | layers in 1.00x of vLLM's speed, "
                "0.50 to 2.00 |"
            ],
        ),
        (
            tables.engine_layers_table,
            """
            engine-layer, T1-k8-E128-H2048-I768, 8, 128, 8, vllm-0.33.0=40, moealign=20
            engine-layer, T4-k8-E128-H2048-I768, 32, 128, 8, vllm-0.33.0=40, moealign=80
            engine-layer, T4-k2-E8-H4096-I14336, 8, 8, 2, vllm-0.33.0=30, moealign=30
            """,
            ["| 128, 8, 2,048, 768 | 2.00x | 0.50x |", "| 8, 2, 4,096, 14,336 | - | 1.00x |", "geometric mean 1.00x"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_times_and_ratios_are_those_of_the_rows(maker: Any, rows: str, lines: list[str]) -> None:
    table = maker(rows_of(rows), "some.csv")
    for line in lines:
        assert line in table


def test_trials_are_grouped_by_part() -> None:
    path = BENCHMARKS / "trials.csv"
    rows = figures.read(path)
    assert list(rows[0]) == ["part", "idea", "expected", "seen", "kept", "device", "date"]
    assert all(row["part"] and row["idea"] and row["seen"] and None not in row for row in rows)
    shown = {marker for tables_of in figures.PAGES.values() for marker, name, _ in tables_of if name == "trials"}
    assert shown == {f"trials-{row['part']}" for row in rows}
    two = [{**rows[0], "part": "cpu", "idea": "this"}, {**rows[0], "part": "cuda", "idea": "that"}]
    assert "| that |" in tables.trials_table(two, "", "cuda")
    assert "| this |" not in tables.trials_table(two, "", "cuda")


# ---- expert parallelism ----------------------------------------------------------------------------------------------


def test_the_model_of_many_ranks_takes_its_terms_from_the_file():
    rows = figures.read(ROOT / "benchmarks" / "results" / "parallel_h200.csv")
    slower = [
        {**row, "median_us": str(2 * float(row["median_us"]))} if row["bench"] == "collective" else row for row in rows
    ]
    terms, halved = (tables_parallel.model_terms(each, (256, 8, 7168, 1024)) for each in (rows, slower))
    assert halved.exchange_rate == terms.exchange_rate / 2
    assert halved.flop_rate == terms.flop_rate
    assert 1e5 < terms.reduce_rate < 1e6  # bytes a microsecond: what NVLink reaches
    assert tables_parallel.parallel_model(slower) != tables_parallel.parallel_model(rows)


def test_many_nodes_do_not_make_the_exchange_in_a_node_free():
    rows = figures.read(ROOT / "benchmarks" / "results" / "parallel_h200.csv")
    terms = tables_parallel.model_terms(rows, (256, 8, 7168, 1024))
    for line in tables_parallel.parallel_model(rows).splitlines():
        cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        if not cells[0].isdigit():
            continue
        ranks, tokens, _, replicated = map(int, cells[:4])
        in_a_node = 2 * ranks * tokens * 7168 * 2 * 7 / 8 / terms.reduce_rate
        assert replicated >= in_a_node, (ranks, tokens)


def test_goals_of_an_exchange_are_told_from_the_file():
    rows = figures.read(ROOT / "benchmarks" / "results" / "parallel_h100.csv")
    said = tables_parallel.goals(rows)
    assert "1.46x at 1 of 128, 8, 2048, 768" in said
    assert "missed; the faster exchange takes 1.56x" in said
    fast = [{**row, "median_us": "1.0"} if row["impl"].startswith("dispatched") else row for row in rows]
    better = tables_parallel.goals(fast)
    assert "missed" not in better
    assert "the fastest exchange meets it at 18 of 18 sizes." in better


def test_one_row_a_token_is_a_column_where_it_was_measured():
    rows = figures.read(ROOT / "benchmarks" / "results" / "parallel_h100.csv")
    for table, impl, measured in (
        (tables_parallel.graph_table, "dispatched-graph", "dispatched-graph-tokens"),
        (tables_parallel.eager_table, "dispatched-capacity", "dispatched-capacity-tokens"),
        (tables_parallel.exchange_table, "exchange-capacity-graph", "exchange-capacity-tokens-graph"),
    ):
        rows = [row for row in rows if row["impl"] != measured]
        assert "row a token" not in table(rows, "")
        known = [{**row, "impl": measured, "median_us": "12345.0"} for row in rows if row["impl"] == impl][1:]
        head, *lines = (line for line in table([*rows, *known], "").splitlines() if line.startswith("| "))
        column = head.split(" | ").index("row a token")
        cells = [line.split(" | ")[column] for line in lines if "---" not in line]
        assert sorted(cells) == ["-", *["12,345"] * len(known)][: len(cells)]


def test_the_parallel_benchmark_runs_on_two_processes(tmp_path):
    out = tmp_path / "parallel.csv"
    run = processes.run(BENCHMARKS / "parallel.py", "--small", "--out", out, "--limit", "200")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    impls = {row["impl"] for row in figures.read(out)}
    assert {"one-gpu", "replicated", "dispatched", "dispatched-capacity", "exchange-dispatched", "all-to-all"} <= impls
    assert {"dispatched-capacity-1.25", "dispatched-capacity-fp8", "dispatched-capacity-tokens"} <= impls
