"""The benchmark's oracle, its CSV, and the README's tables.  Nothing here is timed."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moealign.testing import oracle_align, oracle_align_batched

ROOT = Path(__file__).resolve().parents[1]
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
eager-host,32x8-E256-B16 drop-in,256,256,8,16,moealign-cuda,11,10,12,h200,2.11.0,2026-11-23
eager-host,32x8-E256-B16 drop-in,256,256,8,16,vllm-0.33.0,25,24,26,h200,2.11.0,2026-11-23
"""
DONE_CPU = f"""{COLUMNS}
align,routes,4096,256,8,64,moealign-cpu,25,24,26,cpu,2.13.0,2026-11-23
align,routes,4096,256,8,64,torch-argsort,500,490,510,cpu,2.13.0,2026-11-23
align,experts,4096,256,8,64,moealign-cpu,99,98,100,cpu,2.13.0,2026-11-23
"""
README = """# title

<!-- performance:begin -->
<!-- performance:end -->

between

<!-- performance-cpu:begin -->
stale
<!-- performance-cpu:end -->
"""


def load(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


align, figures = load("align"), load("figures")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "align_h200.csv").write_text(DONE)
    (tmp_path / "align_cpu.csv").write_text(DONE_CPU)
    return tmp_path


@pytest.mark.parametrize("kind", ["uniform", "one-expert", "zipf", "half-minus-one"])
@pytest.mark.parametrize(("mapped", "ignore"), [(False, False), (True, False), (True, True)])
def test_the_benchmarks_oracle_is_the_librarys(kind: str, mapped: bool, ignore: bool) -> None:
    size = (37, 3, 11, 7)
    ids = align.make_ids(kind, size, torch.Generator().manual_seed(3))
    expert_map = torch.tensor([-1, 3, 2, -1, 0, 5, 1, 4, -1, 6, 7], dtype=torch.int32) if mapped else None
    call = {"block_size": 7, "num_experts": 11, "expert_map": expert_map, "ignore_invalid_experts": ignore}
    expected = oracle_align(ids, **call)
    expected.pop("error_word")
    found = align.expected_layout(
        ids.numpy().reshape(-1),
        block_size=7,
        num_experts=11,
        length=len(expected["sorted_token_ids"]),
        expert_map=None if expert_map is None else expert_map.numpy(),
        ignore=ignore,
    )
    assert {name: found[name].tolist() for name in expected} == expected


def test_the_benchmarks_oracle_of_batches_is_the_librarys() -> None:
    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32)
    work = align.Work("batched", "", (5, 8, 5, 4), [counts], batched=True)
    expected = oracle_align_batched(counts, max_tokens_per_batch=8, block_size=4)
    expected.pop("error_word")
    assert {name: work.expected(0)[name].tolist() for name in expected} == expected


def test_rows_of_ids_hold_distinct_experts() -> None:
    for kind in ("uniform", "zipf"):
        ids = align.make_ids(kind, (50, 8, 16, 4), torch.Generator().manual_seed(0))
        assert ids.dtype == torch.int32
        assert all(len(set(row)) == 8 for row in ids.tolist())


def peer_output(ids: list[int]) -> tuple[torch.Tensor, ...]:
    """What a peer might give for 3 experts in blocks of 2: right, but not stable, and with a tail of its own."""
    assert ids == [2, 0, 2, -1, 2]
    return torch.tensor([1, 5, 4, 0, 2, 5, 77]), torch.tensor([0, 2, 2, -3]), torch.tensor([6])


def test_a_peer_may_order_a_bin_as_it_likes_and_nothing_else() -> None:
    ids = torch.tensor([[2], [0], [2], [-1], [2]], dtype=torch.int32)
    want = align.Work("align", "", (5, 1, 3, 2), [ids]).expected(0)
    routes, experts, total = peer_output(ids.flatten().tolist())
    assert align.bins_difference(routes, experts, total, want, 2) is None
    twice, missing, moved = routes.clone(), routes.clone(), experts.clone()
    twice[2], missing[4], moved[0] = 0, 5, 1
    assert "once each" in align.bins_difference(twice, experts, total, want, 2)
    assert "once each" in align.bins_difference(missing, experts, total, want, 2)
    assert "expected expert 0, got 1" in align.bins_difference(routes, moved, total, want, 2)
    assert "multiple of 2" in align.bins_difference(routes, experts, torch.tensor([5]), want, 2)


def test_exact_difference_names_the_element() -> None:
    ids = torch.tensor([[1], [0]], dtype=torch.int32)
    want = align.Work("align", "", (2, 1, 2, 1), [ids]).expected(0)
    assert align.exact_difference({"sorted_token_ids": torch.tensor([1, 0])}, want) is None
    assert "sorted_token_ids[1]: expected 0, got 9" in align.exact_difference(
        {"sorted_token_ids": torch.tensor([1, 9])}, want
    )
    assert "expected 2 elements, got 3" in align.exact_difference({"sorted_token_ids": torch.zeros(3)}, want)


def made_up_timer(session: Any, entries: list[Any]) -> dict[str, list[float]]:
    for entry in entries:
        for slot in range(session.slots):
            entry.call(slot)
    return {entry.impl: [1.0, 3.0, 2.0] for entry in entries}


def small_work() -> tuple[Any, Any]:
    session = align.Session(torch.device("cpu"), "test", ["reference"], slots=2)
    size = (4, 2, 8, 4)
    return session, align.Work("align", align.name_of(size), size, session.inputs("uniform", size))


def test_what_is_wrong_is_reported_and_not_timed() -> None:
    session, work = small_work()
    wrong = align.Entry("wrong", lambda slot: None, lambda slot: "element 3")
    session.run(work, [wrong, align.ours("reference", work)], made_up_timer)
    assert [row["impl"] for row in session.rows] == ["moealign-reference"]
    assert session.wrong == ["WRONG align 4x2-E8-B4 wrong: element 3"]


def test_timed_calls_that_wrote_nothing_are_reported() -> None:
    session, work = small_work()
    session.run(work, [align.ours("reference", work)], lambda _, entries: {entry.impl: [1.0] for entry in entries})
    assert session.rows == []
    assert "after the timed calls: sorted_token_ids[0]: expected " in session.wrong[0]
    assert "got -7" in session.wrong[0]


def test_rows_have_the_columns(tmp_path: Path) -> None:
    session, work = small_work()
    session.run(work, [align.ours("reference", work), align.torch_argsort(work)], made_up_timer)
    assert session.wrong == []
    align.write_csv(session.rows, tmp_path / "some" / "align_test.csv")
    lines = (tmp_path / "some" / "align_test.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    today = session.rows[0]["date"]
    assert lines[1] == f"align,4x2-E8-B4,8,8,2,4,moealign-reference,2.000,1.000,3.000,test,{torch.__version__},{today}"
    assert len(lines) == 3


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_tracked_results_have_the_columns_and_one_row_a_measurement(path: Path) -> None:
    with path.open(newline="") as source:
        reader = csv.DictReader(source)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS.split(",")
    keys = [tuple(row[name] for name in COLUMNS.split(",")[:7]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(0 <= float(row["min_us"]) <= float(row["median_us"]) <= float(row["max_us"]) for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "align.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "expected a GPU" in done.stdout


def test_gpu_slug() -> None:
    assert align.gpu_slug("NVIDIA H200") == "h200"
    assert align.gpu_slug("NVIDIA GeForce RTX 4090") == "rtx-4090"


def test_tables_of_results_that_were_made_up(results: Path) -> None:
    text = figures.readme_with_tables(README, results)
    assert "| 1 x 8, 256, 16 | 8 | 2.00 | 5.00 | 4.00 | 1.00 | 2.0x |" in text
    assert "| 16,384 x 8, 256, 128 | 131,072 | 7.50 | 60.0 | - | - | 8.0x |" in text
    assert "| 8 x 128, 16 | 2.20 | 3.30 | 1.5x |" in text
    assert "(256 routes): 11.0 us, vLLM's wrapper 25.0 us." in text
    assert "H200, torch 2.11.0, 2026-11-23" in text
    assert "| 512 x 8, 256, 64 | 4,096 | 25.0 | 500.0 | 20.0x |" in text
    assert "99.0" not in text
    assert "stale" not in text
    assert text.startswith("# title\n")
    assert "\nbetween\n" in text
    assert figures.readme_with_tables(text, results) == text


def test_a_missing_or_double_marker_is_an_error(results: Path) -> None:
    for text in ("nothing", README + README):
        with pytest.raises(ValueError, match=r"expected <!-- performance:begin --> and then .* once each"):
            figures.readme_with_tables(text, results)


def test_the_script_writes_and_checks(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    readme, image = tmp_path / "README.md", tmp_path / "images" / "performance.png"
    readme.write_text(README)
    arguments = ["--results", str(results), "--readme", str(readme), "--image", str(image)]
    assert figures.main([*arguments, "--check"]) == 1
    assert "its tables are not those" in capsys.readouterr().out
    assert not image.exists()
    assert figures.main(arguments) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    assert figures.main([*arguments, "--check"]) == 0
    assert figures.main(["--results", str(tmp_path / "none"), "--readme", str(readme)]) == 2


def test_the_readmes_tables_are_those_of_the_tracked_results() -> None:
    if not any(RESULTS.glob("align_*.csv")):
        pytest.skip("no results are tracked")
    readme = (ROOT / "README.md").read_text()
    assert figures.readme_with_tables(readme, RESULTS) == readme, "run benchmarks/figures.py"


# ---- goals -----------------------------------------------------------------------------------------------------------


def with_ours(name: str, factor: float) -> list[dict[str, str]]:
    """Rows of a tracked file in which ours takes `factor` times as long; our own parts and floors stay."""
    rows = figures.read(RESULTS / f"{name}.csv")
    mine = {"moealign-cuda", "moealign-triton", "moealign-cpu", "moealign"}
    return [{**row, "median_us": str(factor * float(row["median_us"]))} if row["impl"] in mine else row for row in rows]


@pytest.mark.parametrize(
    ("table", "name", "goals"),
    [
        ("cuda", "align_h200", 7),
        ("cpu", "align_cpu", 1),
        ("routing_goals", "routing_h200", 6),
        ("experts_goals", "experts_h200", 4),
    ],
)
def test_a_goal_is_bold_where_it_was_missed(table, name, goals):
    """Ten times as slow misses every goal against others, ten times as fast none."""
    slow, fast = (getattr(figures.goals, table)(with_ours(name, factor)) for factor in (10, 0.1))
    missed, reached = slow.count("| **"), fast.count("| **")
    assert missed >= goals, slow
    assert missed - reached >= goals, fast


def test_what_was_tried_is_all_on_a_page():
    rows = figures.read(BENCHMARKS / "trials.csv")
    assert {row["part"] for row in rows} == set(figures.TRIALS)
    assert all(row["tried"] and row["expected"] and row["seen"] and row["kept"] and row["date"] for row in rows)
    assert figures.goals.trials("router")(rows).count("\n") == 1 + sum(row["part"] == "router" for row in rows)


# ---- expert parallelism ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", figures.PAGES)
def test_pages_have_the_tables_of_their_files(name):
    page = (ROOT / "docs" / name).read_text()
    assert figures.page_with_tables(name, page, RESULTS) == page, "run benchmarks/figures.py"
    assert figures.page_with_tables(name, "no markers", RESULTS / "nowhere") == "no markers"
    for marker, (source, _) in figures.PAGES[name].items():
        assert (RESULTS / f"{source}.csv").exists(), f"{marker}: a table that nothing fills"


def test_the_model_of_many_ranks_takes_its_terms_from_the_file():
    rows = figures.read(ROOT / "benchmarks" / "results" / "parallel_h200.csv")
    slower = [
        {**row, "median_us": str(2 * float(row["median_us"]))} if row["bench"] == "collective" else row for row in rows
    ]
    terms, halved = (figures.model_terms(each, (256, 8, 7168, 1024)) for each in (rows, slower))
    assert halved.exchange_rate == terms.exchange_rate / 2
    assert halved.flop_rate == terms.flop_rate
    assert 1e5 < terms.reduce_rate < 1e6  # bytes a microsecond: what NVLink reaches
    assert figures.parallel_model(slower) != figures.parallel_model(rows)


def test_many_nodes_do_not_make_the_exchange_in_a_node_free():
    rows = figures.read(ROOT / "benchmarks" / "results" / "parallel_h200.csv")
    terms = figures.model_terms(rows, (256, 8, 7168, 1024))
    for line in figures.parallel_model(rows).splitlines():
        cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        if not cells[0].isdigit():
            continue
        ranks, tokens, _, replicated = map(int, cells[:4])
        in_a_node = 2 * ranks * tokens * 7168 * 2 * 7 / 8 / terms.reduce_rate
        assert replicated >= in_a_node, (ranks, tokens)


def test_the_parallel_benchmark_runs_on_two_processes(tmp_path):
    out = tmp_path / "parallel.csv"
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "parallel.py"), "--small", "--out", str(out), "--limit", "200"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    impls = {row["impl"] for row in figures.read(out)}
    assert {"one-gpu", "replicated", "dispatched", "exchange-dispatched", "all-to-all"} <= impls
