"""What the experts' benchmarks compute with, without a GPU: the peer's source, references, floors."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import common
import experts
import experts_cpu
import processes
import pytest
import tables
import torch
import train
import vllm_layer
from cases.experts import expert_loop, relative_error

from moealign import bench

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SOURCE = """
import vllm.envs as envs
logger = None

@triton.jit
def write_zeros_to_output(a):
    return a

def not_wanted():
    return 1

@triton.jit
def fused_moe_kernel(a):
    return write_zeros_to_output(a)

def get_default_config(M, E, N, K, topk, dtype, block_shape=None):
    if envs.VLLM_BATCH_INVARIANT:
        return {}
    return {"BLOCK_SIZE_M": 16 if M <= 32 else 128, "rocm": current_platform.is_rocm()}
"""


def test_only_the_kernel_and_its_configurations_are_taken_from_the_wheel(tmp_path):
    pytest.importorskip("triton")
    base = "vllm/model_executor/layers/fused_moe/"
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as archive:
        archive.writestr(base + "fused_moe.py", SOURCE)
        archive.writestr(
            vllm_layer.QUANTISING, "import vllm\n\n@triton.jit\ndef _per_token_group_quant_fp8(y):\n    return y\n"
        )
        name = base + "configs/E=8,N=14336,device_name=NVIDIA_H200"
        archive.writestr(name + ".json", json.dumps({"1": {"x": 1}, "64": {"x": 64}, "triton_version": "3"}))
        archive.writestr(name + ",dtype=fp8_w8a8.json", json.dumps({"1": {"x": 2}}))
        archive.writestr(name + ",dtype=fp8_w8a8,block_shape=[128,128].json", json.dumps({"1": {"x": 3}}))
    vllm_layer.extract(tmp_path / "vllm.whl", tmp_path)
    text = (tmp_path / vllm_layer.KERNEL).read_text()
    assert "not_wanted" not in text
    assert text.count("@triton.jit") == 3
    module = vllm_layer.load_kernel(tmp_path)
    shape = (8, 2, 4096, 14336)
    assert vllm_layer.config_of(module, shape, 64, "NVIDIA H200", False) == {"BLOCK_SIZE_M": 128, "rocm": False}
    assert vllm_layer.config_of(module, shape, 40, "NVIDIA H200", True) == {"x": 64}
    assert vllm_layer.config_of(module, shape, 40, "NVIDIA H200", True, fp8=True) == {"x": 3}
    assert vllm_layer.config_of(module, shape, 40, "NVIDIA H100", True) is None
    assert vllm_layer.load_kernel(tmp_path / "elsewhere") is None


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine can run it")
    assert experts.main([]) == 2
    assert "found none" in capsys.readouterr().out


def test_every_formulation_of_a_training_step_is_right():
    calls = {name: call for name, call in train.implementations().items() if name != train.LIGER}
    assert {train.OURS, train.TORCH} <= set(calls)
    for name, errors in train.gradient_errors(calls, (4, 2, 16, 8), 50, "cpu").items():
        assert not isinstance(errors, Exception), name
        assert max(errors) < 1e-5, name
    failures = []
    wrong = {**calls, "wrong": lambda *layer: 2 * calls[train.OURS](*layer)}
    assert train.verified(wrong, (4, 2, 16, 8), failures, "cpu") == list(calls)
    assert [line.split(":")[0] for line in failures] == ["WRONG (4, 2, 16, 8) wrong"]


def test_a_table_of_training_steps():
    times = {train.OURS: 1000.0, train.TORCH: 1500.0}
    rows = [
        {
            **bench.row_of(where, "T100-k2-E8-H16-I4", 200, (100, 2, 8, 0), name, [spent], "h100"),
            "peak_mib": f"{spent / 10:.1f}",
        }
        for where in ("train", "train-graph")
        for name, spent in times.items()
    ]
    table = tables.train_table(rows, "x.csv").splitlines()
    assert table[-1] == "| 8, 2, 16, 4 | 100, CUDA graph | 1.00 | - | 1.50 | - | 1.50x | - | 0 | 100 | - | 150 |"
    train.print_table(rows)


def test_a_training_step_has_three_times_the_operations():
    row = {"case": "T100-k2-E8-H16-I4", "routes": "200"}
    assert train.operations(row) == 3 * 200 * 2 * (3 * 16 * 4)


def test_the_floor_is_the_longer_of_bytes_and_operations():
    layer = experts.Layer((4, 2, 8, 16), 3, [])
    assert layer.quantized == []
    layer.inputs = [(torch.zeros(3, 8), torch.zeros(3, 2), torch.tensor([[0, 1], [0, 1], [1, 2]]))]
    weights = 3 * 8 * 16  # of one expert
    assert layer.floor_us(1.0, 1e9) == 3 * weights * 2
    assert layer.floor_us(1.0, 1e9, 1) == 3 * weights
    assert layer.floor_us(1e9, 1.0) == 2 * 3 * 2 * weights


def test_the_cpu_benchmarks_reference_and_loop_are_right(monkeypatch):
    import types

    torch.manual_seed(0)
    gate_up, down = torch.randn(4, 16, 8), torch.randn(4, 8, 8)
    module = types.SimpleNamespace(
        num_experts=4, gate_up_proj=gate_up, down_proj=down, has_gate=True, has_bias=False, is_transposed=False,
        act_fn=torch.nn.SiLU(), _is_expert_parallel=False, has_post_expert_norm=False,
    )  # fmt: skip
    x, ids, weights = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    expected = expert_loop(*(each.double() for each in (x, gate_up, down, weights)), ids)
    assert relative_error(common.float64_rows(range(5), x, gate_up, down, weights, ids), expected) < 1e-12
    for impl, call in experts_cpu.implementations(module, x, ids, weights).items():
        assert relative_error(call(), expected) < 1e-5, impl


@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks/transformers_model.py", "--small", "--layers", "1", "--prefill", "32", "--turns", "1"],
        ["benchmarks/experts_cpu.py", "--shapes", "0", "--tokens", "2", "--dtypes", "float32", "--seconds", "0.05"],
        ["benchmarks/routing_cpu.py", "--tokens", "3", "--seconds", "0.05"],
        ["examples/faster_transformers.py", "--tokens", "3"],
        ["examples/replay_routing.py", "--tokens", "8", "--layers", "1"],
    ],
    ids=lambda command: command[0],
)
def test_runs_from_the_command_line(command, tmp_path):
    pytest.importorskip("transformers")
    root = BENCHMARKS.parent
    out = [] if command[0].startswith("examples") else ["--out", str(tmp_path / "out.csv")]
    done = processes.run(*command, *out, cwd=root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if out:
        assert (tmp_path / "out.csv").read_text().count("\n") > 2
    else:
        expected = {"faster_transformers": r"the same tokens", "replay_routing": r"with replay +0\.0%"}
        assert re.search(expected[Path(command[0]).stem], done.stdout)


def test_layers_in_fp8_are_compared_with_the_arithmetic_in_torch():
    shape = (3, 2, 256, 128)
    weights = common.random_weights(shape, "cpu", torch.float32)
    x, ids = torch.randn(5, 256), torch.randint(0, 3, (5, 2), dtype=torch.int32)
    layer = experts.Layer(shape, 5, weights, [common.in_blocks(each) for each in weights], [(x, torch.rand(5, 2), ids)])
    for one, exact in zip(layer.quantized, weights, strict=True):
        assert one.data.float().abs().amax((1, 2)).eq(448).all()
        wide = one.data.float() * one.scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
        assert 1e-3 < relative_error(wide, exact) < 4e-2
    failures = []
    calls = {
        experts.OURS: experts.moealign_layer(layer, True),
        experts.BF16: experts.moealign_layer(layer),
        "wrong": lambda slot: 1.1 * experts.moealign_layer(layer, True)(slot),
        experts.HF: experts.moealign_layer(layer),  # another's limit is too narrow for what quantising costs
    }
    assert list(experts.verified(layer, calls, failures, True)) == [experts.OURS, experts.BF16]
    assert len(failures) == 2
