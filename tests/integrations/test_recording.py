"""MOEALIGN_TRACE on stand-in engines: what is recorded, how layers and steps are told apart, limits, threads, fork."""

from __future__ import annotations

import os
import sys
import textwrap
import types

import processes
import pytest
import torch
from helpers import ROOT, draw, in_threads

from moealign.errors import InvalidInput, MoealignError, TraceError
from moealign.integrations import engines, recording, sglang, vllm
from moealign.integrations.recording import CALL_BYTES, Recorder
from moealign.integrations.steps import Call, assemble
from moealign.trace import load_trace

EXPERTS, TOP_K = 16, 2


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """A recorder in place of the process's own."""
    recorder = Recorder("vllm", tmp_path / "trace.safetensors")
    monkeypatch.setattr(engines, "recorder", recorder)
    yield recorder
    recorder._unwritten = False  # nothing to write at exit


class Layer(torch.nn.Module):
    """An engine's MoE layer, which aligns its ids a few frames below."""

    def __init__(self, number, engine):
        super().__init__()
        if engine == "vllm":
            self.layer_name = f"model.layers.{number}.mlp.experts"
        elif engine == "sglang":
            self.layer_id = number
        self.align = sglang._align if engine == "sglang" else vllm._align

    def forward(self, ids, **named):
        return (lambda: self.align(ids, 4, EXPERTS, **named))()


def run(layers, tokens, seed=0, **named):
    """One step of a model; returns its ids [layers, tokens, top_k]."""
    ids = draw(0, EXPERTS, (len(layers), tokens, TOP_K), seed)
    for layer, each in zip(layers, ids, strict=True):
        layer(each, **named)
    return ids


def call(ids, layer=None, thread=0, experts=EXPERTS):
    return Call(thread, layer, ids.to(torch.int16), experts, False)


# ---- what is recorded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        ("vllm", [f"model.layers.{i}.mlp.experts" for i in range(3)]),
        ("sglang", ["layer 0", "layer 1", "layer 2"]),
    ],
)
def test_named_layers_and_steps(recorder, engine, names):
    layers = [Layer(number, engine) for number in range(3)]
    steps = [run(layers, tokens, seed) for seed, tokens in enumerate((5, 1, 1, 4))]
    path = engines.write_trace()
    assert path == recorder.file()
    assert f".pid{os.getpid()}" in path.name
    trace = load_trace(path)
    assert torch.equal(trace.topk_ids.int(), torch.cat(steps, 1))
    assert trace.calls == (5, 1, 1, 4)
    assert (trace.num_experts, trace.details["layers"], trace.details["layers_from"]) == (EXPERTS, names, "names")
    assert trace.details["calls_left_out"] == {}
    assert "CUDA graphs" in trace.details["note"]
    assert list(path.parent.iterdir()) == [path], "no partial file stays"


@pytest.mark.parametrize(
    ("attributes", "sizes"),
    [
        ([{"hidden_size": 64, "intermediate_size_per_partition": 24}] * 2, (64, 24)),
        ([{"moe_config": types.SimpleNamespace(hidden_dim=64, intermediate_size_per_partition=24)}] * 2, (64, 24)),
        ([{"hidden_size": 64, "intermediate_size_per_partition": size} for size in (24, 8)], (64, None)),
        ([{"hidden_size": 64, "intermediate_size_per_partition": 24}, {}], (None, None)),
        ([{"hidden_size": 64, "intermediate_size_per_partition": None}] * 2, (None, None)),
        ([{"hidden_size": 0, "intermediate_size_per_partition": 24}] * 2, (None, None)),
    ],
)
def test_sizes_of_experts_are_those_that_all_layers_have(recorder, attributes, sizes):
    layers = [Layer(number, "vllm") for number in range(2)]
    for layer, values in zip(layers, attributes, strict=True):
        vars(layer).update(values)
    run(layers, 3)
    trace = load_trace(engines.write_trace())
    assert (trace.hidden, trace.intermediate, trace.device) == (*sizes, "")


def test_maps_are_counted_and_dropped_ids_are_minus_one(recorder):
    layer = Layer(0, "vllm")
    expert_map = torch.arange(EXPERTS, dtype=torch.int32)
    layer(torch.tensor([[1, -1], [99, 3]]), expert_map=expert_map)
    trace = load_trace(engines.write_trace())
    assert trace.topk_ids.tolist() == [[[1, -1], [-1, 3]]]
    assert trace.details["calls_with_expert_map"] == 1


def test_calls_that_we_refuse_are_recorded_if_a_trace_can_hold_their_ids(recorder):
    ids = draw(0, EXPERTS, (3, TOP_K))
    with pytest.raises(InvalidInput, match="block_size"):
        vllm._align(ids, -1, EXPERTS)
    with pytest.raises(MoealignError):
        vllm._align(ids.float(), 4, EXPERTS)
    trace = load_trace(engines.write_trace())
    assert trace.calls == (3,)
    assert trace.details["calls_left_out"] == {"unsupported ids": 1}


def test_wide_ids_need_int32(recorder):
    recorder.add(torch.tensor([[40_000, 1]]), 50_000, False)
    assert load_trace(recorder.write()).topk_ids.tolist() == [[[40_000, 1]]]


def test_runs_on_dummy_input_are_left_out(recorder):
    layers = [Layer(number, "vllm") for number in range(2)]

    def _dummy_run():
        run(layers, 64)

    _dummy_run()
    ids = run(layers, 3)
    trace = load_trace(engines.write_trace())
    assert torch.equal(trace.topk_ids.int(), ids)
    assert trace.details["calls_left_out"] == {"start-up": 2}


def test_nothing_is_read_during_capture(recorder, monkeypatch):
    """On a stand-in for a CUDA tensor that allows nothing but its shape, dtype and device."""

    class OnGpu:
        is_cuda, dtype, device = True, torch.int32, torch.device("cuda")

        def dim(self):
            return 2

        def __getattr__(self, name):
            raise AssertionError(f"{name} was read during capture")

    monkeypatch.setattr(recording, "Tensor", OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    recorder.add(OnGpu(), EXPERTS, False)
    assert not recorder._failed
    monkeypatch.undo()
    with pytest.raises(TraceError, match=r"at least one complete step of the model, got 1 graph capture\. Replays"):
        recorder.write()


def test_compiled_calls_are_not_traced_into(recorder):
    compiled = torch.compile(lambda ids: vllm._align(ids, 4, EXPERTS)[0], backend="eager")
    ids = draw(0, EXPERTS, (4, TOP_K))
    assert compiled(ids).tolist() == vllm._align(ids, 4, EXPERTS)[0].tolist()
    assert not recorder._failed


def test_a_failure_ends_the_recording_and_not_the_engine(recorder, monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("out of pinned memory")

    monkeypatch.setattr(recording, "_to_host", broken)
    for _ in range(2):
        Layer(0, "vllm")(draw(0, EXPERTS, (2, TOP_K)))
    messages = [record.message for record in caplog.records if "stops recording" in record.message]
    assert messages == ["moealign stops recording: RuntimeError: out of pinned memory"]


# ---- layers and steps --------------------------------------------------------------------------------------------


def in_order(counts, layers):
    """Calls of one thread without names: for each count, one step."""
    ids = [draw(0, EXPERTS, (layers, count, TOP_K), seed) for seed, count in enumerate(counts)]
    return [call(layer) for step in ids for layer in step], torch.cat(ids, 1)


@pytest.mark.parametrize("given", [3, None])
def test_layers_by_order(given):
    calls, ids = in_order([9, 2, 2, 2, 5], 3)
    recorded = assemble([*calls, call(ids[0, :1])], given)  # the step that is still running
    assert torch.equal(recorded.topk_ids.int(), ids)
    assert recorded.tokens == (9, 2, 2, 2, 5)
    assert recorded.layers_from == ("MOEALIGN_TRACE_LAYERS" if given else "period")
    assert (recorded.layers, recorded.left_out) == (("layer 0", "layer 1", "layer 2"), 1)


def test_one_run_of_equal_calls_has_no_known_layers():
    calls, ids = in_order([2, 2], 3)
    recorded = assemble(calls)
    assert (recorded.topk_ids.shape, recorded.layers_from) == ((1, 12, TOP_K), "unknown")
    assert torch.equal(assemble(calls, 3).topk_ids.int(), ids)


def test_a_step_that_was_interrupted_is_left_out():
    calls, ids = in_order([4, 6, 4], 3)
    del calls[4]
    recorded = assemble(calls, 3)
    assert torch.equal(recorded.topk_ids.int(), torch.cat([ids[:, :4], ids[:, 10:]], 1))
    assert (recorded.tokens, recorded.left_out) == ((4, 4), 2)


def test_a_layer_that_splits_its_tokens():
    first, second = draw(0, EXPERTS, (2, 6, TOP_K)), draw(0, EXPERTS, (2, 2, TOP_K), 1)
    calls = [call(part, name) for ids, name in zip(first, "ab", strict=True) for part in (ids[:4], ids[4:])]
    calls += [call(ids, name) for ids, name in zip(second, "ab", strict=True)]
    recorded = assemble(calls)
    assert torch.equal(recorded.topk_ids.int(), torch.cat([first, second], 1))
    assert (recorded.tokens, recorded.layers, recorded.left_out) == ((6, 2), ("a", "b"), 0)


def test_a_draft_layer_with_other_tokens_is_left_out():
    ids = draw(0, EXPERTS, (2, 6, TOP_K))
    calls = [call(ids[0], "a"), call(ids[1], "b"), call(ids[0, :2], "draft"), call(ids[0, :2], "draft")]
    recorded = assemble(calls * 2)
    assert torch.equal(recorded.topk_ids.int(), torch.cat([ids, ids], 1))
    assert (recorded.layers, recorded.left_out) == (("a", "b"), 4)


def test_layers_of_another_kind_are_left_out():
    ids = draw(0, EXPERTS, (2, 6, TOP_K))
    recorded = assemble([call(ids[0], "a"), call(ids[1, :, :1], "b"), call(ids[1, :2], "c", experts=EXPERTS + 1)])
    assert (recorded.layers, recorded.topk_ids.shape, recorded.left_out) == (("a",), (1, 6, TOP_K), 2)


def test_threads_run_steps_of_their_own(recorder):
    """As vLLM's two half-batches do: calls of the threads alternate in any order."""
    layers = [Layer(number, "vllm") for number in range(4)]
    steps = {}

    def work(number):
        for step in range(20):
            seed = 100 * number + step
            steps[seed] = run(layers, 1 + number, seed)

    in_threads(work, 4)
    trace = load_trace(engines.write_trace())
    assert trace.tokens == 20 * (1 + 2 + 3 + 4)
    assert sorted(trace.calls) == [1] * 20 + [2] * 20 + [3] * 20 + [4] * 20
    recorded = sorted(each.int().tolist() for each in trace.topk_ids.split(list(trace.calls), 1))
    assert recorded == sorted(ids.tolist() for ids in steps.values())


# ---- limits and files --------------------------------------------------------------------------------------------


def test_the_recording_is_bounded(tmp_path, caplog):
    size = CALL_BYTES + 10 * TOP_K * 2
    recorder = Recorder("vllm", tmp_path / "t.safetensors", max_bytes=7 * size, layers=2)
    for number in range(20):
        recorder.add(draw(0, EXPERTS, (10, TOP_K), number), EXPERTS, False)
    recorder.add(draw(0, EXPERTS, (1, TOP_K)), EXPERTS, False)  # would fit, but after a gap
    assert len(recorder._calls) == 7
    assert sum("reached its limit" in record.message for record in caplog.records) == 1
    assert load_trace(recorder.file()).calls == (10, 10, 10), "written when the limit was reached"
    recorder.write()
    assert load_trace(recorder.file()).details["calls_left_out"] == {"incomplete step": 1, "limit": 14}


def test_the_file_is_rewritten_whenever_the_recording_has_doubled(recorder, monkeypatch):
    size = CALL_BYTES + 10 * TOP_K * 2
    recorder._next_write = size
    sizes = []
    monkeypatch.setattr(recorder, "write", lambda: sizes.append(len(recorder._calls)))
    for number in range(40):
        recorder.add(draw(0, EXPERTS, (10, TOP_K), number), EXPERTS, False)
    assert sizes == [1, 2, 4, 8, 16, 32]


def test_a_path_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").touch()
    recorder = Recorder("vllm", tmp_path / "file" / "t.safetensors")
    recorder.add(draw(0, EXPERTS, (3, TOP_K)), EXPERTS, False)
    with pytest.raises(TraceError, match="expected a path that can be written"):
        recorder.write()
    recorder._unwritten = True
    recorder._write_at_exit()
    assert any("writes no trace" in record.message for record in caplog.records)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_rank_is_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    recorder = Recorder("vllm", tmp_path / "t.safetensors")
    recorder.add(draw(0, EXPERTS, (3, TOP_K)), EXPERTS, False)
    monkeypatch.undo()  # at exit the process group is gone
    assert recorder.write().name == f"t.rank3.pid{os.getpid()}.safetensors"
    assert load_trace(recorder.file()).details["rank"] == 3


# ---- switching it on ---------------------------------------------------------------------------------------------


def test_off_by_default(monkeypatch):
    monkeypatch.delenv("MOEALIGN_TRACE", raising=False)
    monkeypatch.setattr(engines, "recorder", None)
    engines.start_trace("vllm")
    assert engines.recorder is None
    with pytest.raises(TraceError, match="set MOEALIGN_TRACE before it is installed"):
        engines.write_trace()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MOEALIGN_TRACE_MB", "many", "MOEALIGN_TRACE_MB: expected a number of MiB above 0, got 'many'"),
        ("MOEALIGN_TRACE_MB", "nan", "MOEALIGN_TRACE_MB: expected a number of MiB above 0, got 'nan'"),
        ("MOEALIGN_TRACE_MB", "-1", "MOEALIGN_TRACE_MB: expected"),
        ("MOEALIGN_TRACE_LAYERS", "2.5", "MOEALIGN_TRACE_LAYERS: expected a whole number of MoE layers above 0"),
        ("MOEALIGN_TRACE_LAYERS", "0", "MOEALIGN_TRACE_LAYERS: expected"),
    ],
)
def test_wrong_variables(tmp_path, monkeypatch, variable, value, message):
    monkeypatch.setattr(engines, "recorder", None)
    monkeypatch.setenv("MOEALIGN_TRACE", str(tmp_path / "t.safetensors"))
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidInput, match=message):
        engines.start_trace("vllm")
    assert engines.recorder is None


def test_variables_configure_the_recorder_that_install_starts(tmp_path, monkeypatch):
    for module in (vllm._LAYERS, vllm._OPS):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(engines, "recorder", None)
    monkeypatch.setenv("MOEALIGN_TRACE", str(tmp_path / "t"))
    monkeypatch.setenv("MOEALIGN_TRACE_MB", "0.5")
    monkeypatch.setenv("MOEALIGN_TRACE_LAYERS", "48")
    vllm.install()
    recorder = engines.recorder
    assert (recorder.engine, recorder.max_bytes, recorder.layers) == ("vllm", 1 << 19, 48)
    assert recorder.file().name == f"t.pid{os.getpid()}.safetensors"
    engines.start_trace("sglang")
    assert engines.recorder is recorder


PROCESS = """
    import multiprocessing, os, sys, types
    import torch
    from moealign.integrations import engines, vllm

    for name in (vllm._LAYERS, vllm._OPS):
        sys.modules[name] = types.ModuleType(name)

    def own(topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False,
            return_scatter_idx=False):
        return "own"

    layers = sys.modules[vllm._LAYERS]
    layers.moe_align_block_size = own

    def step(value, tokens):
        for layer in range(2):
            layers.moe_align_block_size(torch.full((tokens, 1), value), 4, 8)

    vllm.install()
"""


def in_process(tmp_path, body, **variables):
    path = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    found = {name: value for name, value in os.environ.items() if not name.startswith("MOEALIGN_TRACE")}
    found |= {"PYTHONPATH": os.pathsep.join(path), "MOEALIGN_BACKEND": "reference", **variables}
    code = textwrap.dedent(PROCESS) + textwrap.dedent(body)
    done = processes.run("-c", code, env=found, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_variable_nothing_is_imported_or_written(tmp_path):
    body = """
        step(1, 2)
        print(sorted(name for name in sys.modules if name.endswith(("integrations.recording", ".steps"))))
    """
    assert in_process(tmp_path, body) == "[]\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_exit_and_forked_processes(tmp_path):
    """Parent, a bare fork and a child of multiprocessing each write what they did themselves."""
    body = """
        step(1, 5)
        child = os.fork()
        if child == 0:
            step(2, 3)
            step(2, 1)
            engines.write_trace()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        worker = multiprocessing.get_context("fork").Process(target=step, args=(3, 4))
        worker.start()
        worker.join()
        print(os.getpid(), child, worker.pid)
    """
    folder = tmp_path / "made" / "on demand"
    settings = {"MOEALIGN_TRACE": str(folder / "t.safetensors"), "MOEALIGN_TRACE_LAYERS": "2"}
    processes = in_process(tmp_path, body, **settings).split()
    traces = [load_trace(folder / f"t.pid{process}.safetensors") for process in processes]
    assert [trace.calls for trace in traces] == [(5,), (3, 1), (4,)]
    assert [trace.topk_ids.unique().tolist() for trace in traces] == [[1], [2], [3]]
    assert [(trace.layers, trace.details["pid"]) for trace in traces] == [(2, int(process)) for process in processes]
    assert len(list(folder.iterdir())) == 3


def test_a_process_without_calls_writes_nothing(tmp_path):
    in_process(tmp_path, "", MOEALIGN_TRACE=str(tmp_path / "t.safetensors"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_copies_are_asynchronous_and_captures_are_left_out(recorder):
    ids = draw(0, EXPERTS, (6, TOP_K)).cuda()
    recorder.add(ids, EXPERTS, False)
    assert recorder._calls[0].ids.is_pinned()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy = ids + 0
        recorder.add(copy, EXPERTS, False)
    graph.replay()
    trace = load_trace(recorder.write())
    assert torch.equal(trace.topk_ids[0].int(), ids.cpu())
    assert trace.details["calls_left_out"] == {"graph capture": 1}
    assert trace.device == torch.cuda.get_device_name()
