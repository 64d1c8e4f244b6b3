"""`moealign bench`: what it measures, writes and draws, and which peers it finds.  No time is asserted."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moealign import bench
from moealign.cli import app
from moealign.testing import oracle_align

SMALL = [(1, 8, 256, 16), (32, 8, 256, 16), (4, 2, 8, 4)]


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(bench, "CPU_SIZES", SMALL)
    monkeypatch.setattr(bench, "QUICK", {8, 256})


def test_a_table_a_csv_and_a_figure(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--quick", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "9 rows in moealign_bench_cpu.csv" in result.output
    with (tmp_path / "moealign_bench_cpu.csv").open(newline="") as source:
        reader = csv.DictReader(source)
        rows = list(reader)
    assert reader.fieldnames == bench.COLUMNS
    assert {row["case"] for row in rows} == {"1x8-E256-B16", "32x8-E256-B16", "4x2-E8-B4"}
    assert {row["impl"] for row in rows} == {"moealign-cpu", "moealign-reference", "torch-argsort"}
    assert all(0 < float(row["min_us"]) <= float(row["median_us"]) <= float(row["max_us"]) for row in rows)
    for row in rows:
        assert f"{float(row['median_us']):.2f}" in result.output
    assert (tmp_path / "moealign_bench_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_paths_and_backends_that_were_asked_for(few, tmp_path):
    table, figure = tmp_path / "a.csv", tmp_path / "b.svg"
    result = run("--quick", "--device", "cpu", "--backend", "reference", "-o", str(table), "--figure", str(figure))
    assert result.exit_code == 0, result.output
    assert "moealign-cpu," not in table.read_text()
    svg = figure.read_text()
    assert "<svg" in svg
    assert "date" not in svg.split("<defs>")[0].lower(), "the same rows give the same file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "--device: expected cuda or cpu, got 'tpu'"),
        (("--bench", "alien"), "--bench: expected one of align, batched"),
        (("--backend", "cpu,gpu"), "--backend: expected one of cuda, triton, cpu, reference, got gpu"),
        (("--peers", "/no/such"), "--peers: expected a folder, got /no/such"),
        (("--figure", "a.gif"), "--figure: expected a path that ends in .png or .svg, got a.gif"),
        (("-o", "/no/such/a.csv"), "--output: expected a path in a folder that exists, got /no/such/a.csv"),
    ],
)
def test_refusals_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_how_to_go_on():
    done = subprocess.run([sys.executable, "-m", "moealign.bench", "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "moealign.bench: expected a GPU that torch can use, found none; --device cpu needs none\n"
    result = run("--device", "cuda")
    assert result.exit_code == 2
    assert "expected a GPU that torch can use, found none" in result.output


def test_what_was_measured_is_kept_when_a_run_is_cut_short(few, tmp_path, monkeypatch):
    real = bench.time_cpu

    def second_time_interrupted(session, entries):
        if session.rows:
            raise KeyboardInterrupt
        return real(session, entries)

    monkeypatch.setattr(bench, "time_cpu", second_time_interrupted)
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path / "part.csv")]
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments)
    with (tmp_path / "part.csv").open(newline="") as source:
        assert {row["case"] for row in csv.DictReader(source)} == {"1x8-E256-B16"}


def test_a_wrong_implementation_is_reported_and_ends_with_1(few, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "exact_difference", lambda got, want: "element 3")
    result = run("--quick", "--device", "cpu", "-o", str(tmp_path / "a.csv"))
    assert result.exit_code == 1
    assert "WRONG align 1x8-E256-B16 moealign-cpu: element 3" in result.output


# ---- peers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An environment with a package vllm 0.20.1 whose library is there, and no SGLang."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise SystemExit('a peer is never imported')")
    (tmp_path / "vllm" / "_moe_C.abi3.so").write_bytes(b"")
    about = tmp_path / "vllm-0.20.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.20.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setitem(
        bench.INSTALLED, "sglang-kernel", (("sglang-kernel",), "no_such_package_here", ("*.so",), "sgl_kernel")
    )
    return tmp_path / "vllm"


def test_an_installed_peer_of_another_release_takes_part(installed, monkeypatch, capsys):
    library = torch.library.Library("_moe_C", "DEF")
    library.define(
        "moe_align_block_size(Tensor ids, int experts, int block, Tensor(a!) sorted, Tensor(b!) names, "
        "Tensor(c!) total, Tensor? map) -> ()"
    )

    def align(ids, experts, block, sorted_ids, names, total, expert_map):
        assert expert_map is None
        for tensor, name in (
            (sorted_ids, "sorted_token_ids"),
            (names, "expert_ids"),
            (total, "num_tokens_post_padded"),
        ):
            values = oracle_align(ids, block_size=block, num_experts=experts)[name]
            tensor.copy_(torch.tensor(values, dtype=torch.int32))

    library.impl("moe_align_block_size", align, "CPU")
    loaded = []
    monkeypatch.setattr(bench, "load_library", loaded.append)
    try:
        names, sglang_library = bench.installed_peers()
        assert names == {"vllm-0.20.1"}
        assert sglang_library is None
        assert loaded == [str(installed / "_moe_C.abi3.so")]
        assert "sglang-kernel: left out, no_such_package_here is not installed here" in capsys.readouterr().out

        session = bench.Session(torch.device("cpu"), "test", ["reference"], peers=names, slots=2)
        size = (4, 2, 8, 4)
        work = bench.Work("align", bench.name_of(size), size, session.inputs("uniform", size))
        (entry,) = bench.peers_of(session, work)
        session.run(work, [bench.ours("reference", work), entry], lambda s, e: _called(s, e))
        assert session.wrong == []
        assert [row["impl"] for row in session.rows] == ["moealign-reference", "vllm-0.20.1"]
        assert bench.pivot(session.rows, "align")[0] == ["case", "routes", "reference", "vllm", "x peer"]
    finally:
        library._destroy()


def _called(session, entries):
    for entry in entries:
        for slot in range(session.slots):
            entry.call(slot)
    return {entry.impl: [1.0, 2.0] for entry in entries}


def test_a_library_that_does_not_load_is_left_out_with_its_reason(installed, capsys):
    names, _ = bench.installed_peers()
    assert names == set()
    assert "vllm: left out, OSError: " in capsys.readouterr().out
    (installed / "_moe_C.abi3.so").unlink()
    assert bench.installed_peers()[0] == set()
    assert "vllm: left out, no _moe_C_stable_libtorch*.so in " in capsys.readouterr().out


def test_columns_are_ours_then_the_peers_then_the_floors():
    mixed = ["floor-empty", "torch-argsort", "vllm-0.20.1", "other", "sglang-kernel-0.5.0", "moealign-cuda"]
    ordered = ["moealign-cuda", "vllm-0.20.1", "sglang-kernel-0.5.0", "torch-argsort", "floor-empty", "other"]
    assert bench.in_order(mixed) == ordered
    assert bench.line_of("vllm-0.20.1")[0] == "vLLM 0.20.1"
    assert bench.line_of("moealign-cpu-2t") is None


def test_the_repository_s_script_is_the_package_s_benchmark():
    script = Path(__file__).parents[2] / "benchmarks" / "align.py"
    assert len(script.read_text().splitlines()) < 50
    helped = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    for option in ("--bench", "--quick", "--backends", "--peers", "--out", "--device", "--budget"):
        assert option in helped.stdout, option


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_part_is_right(tmp_path):
    parts = [option for name in bench.BENCHES for option in ("--bench", name)]
    assert bench.main(["--quick", "--out", str(tmp_path / "a.csv"), *parts]) == 0
    with (tmp_path / "a.csv").open(newline="") as source:
        rows = list(csv.DictReader(source))
    assert {row["bench"] for row in rows} == set(bench.BENCHES)
    assert "moealign-cuda" in {row["impl"] for row in rows}
    pytest.importorskip("matplotlib")
    bench.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
