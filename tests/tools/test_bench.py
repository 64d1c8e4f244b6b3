"""`moealign bench`: what it measures, writes and draws, and which peers it finds; the timers.  No time is asserted."""

from __future__ import annotations

import contextlib
import csv
import random
import sys
import types
from pathlib import Path

import processes
import pytest
import torch
from typer.testing import CliRunner

from moealign import bench, timing
from moealign.bench import benches, candidates, command, names, peers, tables
from moealign.cli import app
from moealign.testing import oracle_align

SMALL = [(1, 8, 256, 16), (32, 8, 256, 16), (4, 2, 8, 4)]


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(benches, "CPU_SIZES", SMALL)
    monkeypatch.setattr(benches, "QUICK", {8, 256})


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
        (("--figure", "a.gif"), "--figure: expected a path that ends in .png, .svg, got a.gif"),
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
    done = processes.run("-m", "moealign.bench", "--device", "cuda")
    assert done.returncode == 2
    assert done.stdout == "moealign.bench: expected a GPU that torch can use, found none; --device cpu needs none\n"
    result = run("--device", "cuda")
    assert result.exit_code == 2
    assert "expected a GPU that torch can use, found none" in result.output


def test_what_was_measured_is_kept_when_a_run_is_cut_short(few, tmp_path, monkeypatch):
    time_cpu = benches.time_cpu

    def interrupted_at_the_second_case(session, candidates):
        if session.rows:
            raise KeyboardInterrupt
        return time_cpu(session, candidates)

    monkeypatch.setattr(benches, "time_cpu", interrupted_at_the_second_case)
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path / "part.csv")]
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    with (tmp_path / "part.csv").open(newline="") as source:
        assert {row["case"] for row in csv.DictReader(source)} == {"1x8-E256-B16"}


def test_a_wrong_implementation_is_reported_and_ends_with_1(few, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "exact_difference", lambda outputs, expected: "element 3")
    result = run("--quick", "--device", "cpu", "-o", str(tmp_path / "a.csv"))
    assert result.exit_code == 1
    assert "WRONG align 1x8-E256-B16 moealign-cpu: element 3" in result.output


# ---- peers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An environment with the library of vllm 0.20.1 and without SGLang."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise SystemExit('a peer is never imported')")
    (tmp_path / "vllm" / "_moe_C.abi3.so").write_bytes(b"")
    about = tmp_path / "vllm-0.20.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.20.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setitem(
        peers.INSTALLED, "sglang-kernel", (("sglang-kernel",), "no_such_package_here", ("*.so",), "sgl_kernel")
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
    monkeypatch.setattr(peers, "load_library", loaded.append)
    try:
        impls, sglang_library = bench.installed_peers()
        assert impls == {"vllm-0.20.1"}
        assert sglang_library is None
        assert loaded == [str(installed / "_moe_C.abi3.so")]
        assert "sglang-kernel: left out, no_such_package_here is not installed here" in capsys.readouterr().out

        session = bench.Session(torch.device("cpu"), "test", ["reference"], peers=impls, slots=2)
        size = (4, 2, 8, 4)
        case = bench.Case("align", bench.case_name(size), size, session.inputs("uniform", size))
        (vllm,) = benches.peer_candidates(session, case)
        session.run(case, [bench.moealign_candidate("reference", case), vllm], call_each_slot)
        assert session.failures == []
        assert [row["impl"] for row in session.rows] == ["moealign-reference", "vllm-0.20.1"]
        assert tables.pivot(session.rows, "align")[0] == ["case", "routes", "reference", "vllm"]
    finally:
        library._destroy()


def call_each_slot(session, candidates):
    for candidate in candidates:
        for slot in range(session.slots):
            candidate.call(slot)
    return {candidate.impl: [1.0, 2.0] for candidate in candidates}


def test_a_library_that_does_not_load_is_left_out_with_its_reason(installed, capsys):
    assert bench.installed_peers()[0] == set()
    assert "vllm: left out, OSError: " in capsys.readouterr().out
    (installed / "_moe_C.abi3.so").unlink()
    assert bench.installed_peers()[0] == set()
    assert "vllm: left out, no _moe_C_stable_libtorch*.so in " in capsys.readouterr().out


def test_columns_are_ours_then_the_peers_then_the_floors():
    mixed = ["floor-empty", "torch-argsort", "vllm-0.20.1", "other", "sglang-kernel-0.5.0", "moealign-cuda"]
    ordered = ["moealign-cuda", "vllm-0.20.1", "sglang-kernel-0.5.0", "torch-argsort", "floor-empty", "other"]
    assert bench.in_order(mixed) == ordered
    assert [names.short_name(impl) for impl in ordered[:4]] == ["cuda", "vllm", "sglang", "argsort"]
    assert bench.line_of("vllm-0.20.1")[0] == "vLLM 0.20.1"
    assert bench.line_of("moealign-cpu-2t") is None


def test_the_repository_s_script_is_the_package_s_benchmark():
    script = Path(__file__).parents[2] / "benchmarks" / "align.py"
    helped = processes.run(script, "--help")
    for option in ("--bench", "--quick", "--backends", "--peers", "--out", "--device", "--budget"):
        assert option in helped.stdout, option


# ---- timers ------------------------------------------------------------------------------------------------------


class FakeDevice:
    """Stands in for torch.cuda: a clock that calls advance, and graphs that replay the calls captured in them."""

    def __init__(self, monkeypatch):
        self.now_ms, self.recording, device = 0.0, None, self

        class Graph:
            def replay(self):
                device.now_ms += self.ms

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now_ms

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        @contextlib.contextmanager
        def graph(into, stream):
            before = device.now_ms
            yield
            into.ms, device.now_ms = device.now_ms - before, before

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "stream": lambda stream: contextlib.nullcontext(),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "default_stream": lambda: stream,
            "synchronize": lambda: None,
            "_sleep": lambda cycles: setattr(device, "now_ms", device.now_ms + 5),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)

    def call_of(self, us, seen):
        def call(slot=0):
            seen.append(slot)
            self.now_ms += us / 1e3

        return call


def test_graphs_take_turns_over_all_slots_and_slow_ones_are_replayed_less(monkeypatch):
    device, seen = FakeDevice(monkeypatch), {"fast": [], "slow": []}
    calls = {"fast": device.call_of(2.0, seen["fast"]), "slow": device.call_of(1000.0, seen["slow"])}
    calls["broken"] = lambda slot: [][slot]
    failed = []
    times = timing.graphs_in_turns(
        calls,
        slots=3,
        calls_per_graph=4,
        warm_up=2,
        budget_us=30_000,
        on_failure=lambda impl, error: failed.append(impl),
    )
    assert failed == ["broken"]
    assert seen["fast"] == seen["slow"] == [0, 1, 0, 1, 2, 0], "two calls to warm up, then the graph's four"
    assert {impl: len(each) for impl, each in times.items()} == {"fast": 50, "slow": 7}
    assert times["fast"] == pytest.approx([2.0] * 50)
    assert times["slow"] == pytest.approx([1000.0] * 7)


def test_a_graph_is_replayed_within_its_budget(monkeypatch):
    device, seen = FakeDevice(monkeypatch), []
    call, replays = device.call_of(10.0, seen), []
    device_us = timing.device_us
    monkeypatch.setattr(timing, "device_us", lambda run: replays.append(1) or device_us(run))
    options = {"warm_up": 1, "min_replays": 3, "max_replays": 9}
    for budget_us, count in ((0.0, 3), (95.0, 5), (1e9, 9)):
        replays.clear()
        assert timing.graph_us([call] * 2, budget_us=budget_us, **options) == pytest.approx(10.0)
        assert len(replays) == count
    assert len(seen) == 3 * (1 + 2)


def test_the_host_timer_takes_turns_and_makes_every_call():
    seen, order = [], random.Random(0)
    calls = {impl: lambda value, impl=impl: seen.append((impl, value)) for impl in "ab"}
    arguments = {"a": [(1,), (2,)], "b": [(3,)]}
    times = timing.host_in_turns(calls, arguments, min_turns=2, before=lambda impl: seen.append(impl))
    assert seen == ["a", ("a", 1), ("a", 2), "b", ("b", 3)] * 2
    assert {impl: len(each) for impl, each in times.items()} == {"a": 2, "b": 2}
    times = timing.host_in_turns(calls, arguments, min_turns=1, max_turns=4, seconds=60, order=order)
    assert len(times["a"]) == len(times["b"]) == 4
    assert timing.host_us(lambda: None, wait=lambda: seen.append("waited")) > 0
    assert seen[-1] == "waited"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_part_is_right(tmp_path):
    parts = [option for name in bench.BENCHES for option in ("--bench", name)]
    assert command.main(["--quick", "--out", str(tmp_path / "a.csv"), *parts]) == 0
    with (tmp_path / "a.csv").open(newline="") as source:
        rows = list(csv.DictReader(source))
    assert {row["bench"] for row in rows} == set(bench.BENCHES)
    assert "moealign-cuda" in {row["impl"] for row in rows}
    pytest.importorskip("matplotlib")
    bench.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
