"""Whole layers inside the released SGLang: run by run_engines.py, in an environment that has it.

The released files run on a CPU: SGLang's runner, its hook registry and its records, against SGLang's own layer in
torch (``moe_forward_native``).  Image libraries that its model configurations import are stand-ins.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from cases.experts import SCHEMES, quantized_loop, random_quantized, relative_error

from moealign.integrations import engines
from moealign.integrations import sglang as drop_in

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang's files are not here")
MOE = "sglang.srt.layers.moe"
HIDDEN, INNER, EXPERTS, TOP_K = 128, 64, 8, 2


def anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


@pytest.fixture(scope="module", autouse=True)
def process():
    """A process of SGLang as far as layers need one."""
    importlib.import_module("sglang")  # first: Transformers must not see the stand-ins
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io"):
        if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
            module = types.ModuleType(name)
            module.__getattr__, module.__path__ = anything, []
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module
    context = importlib.import_module("sglang.srt.runtime_context")
    execution = types.SimpleNamespace(moe=types.SimpleNamespace(enable_fused_moe_sum_all_reduce=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "get_exec", lambda: execution)
        fused = importlib.import_module(f"{MOE}.moe_runner.triton_utils.fused_moe")
        patch.setattr(fused, "is_allocation_symmetric", lambda: False)
        yield execution.moe


@pytest.fixture
def installed():
    for counts in (engines.call_counts, engines.left_counts, engines.layer_counts):
        counts.clear()
    names = drop_in.install(layers=True)
    yield names
    drop_in.uninstall()


def of(module, name):
    return getattr(importlib.import_module(f"{MOE}.{module}"), name)


def build(dtype=torch.bfloat16, lora=False, **options):
    """SGLang's runner, its configuration, and the weights of a layer."""
    config = of("moe_runner.base", "MoeRunnerConfig")(
        num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size_per_partition=INNER, layer_id=3, top_k=TOP_K,
        **{"inplace": False, "num_experts": EXPERTS, **options},
    )  # fmt: skip
    backend = of("utils", "MoeRunnerBackend").TRITON
    runner = of("moe_runner.runner", "MoeRunner")(backend, config, lora_enabled=lora)
    draw = torch.Generator().manual_seed(0)
    rows = 2 * INNER if config.is_gated else INNER
    w13 = (torch.randn(EXPERTS, rows, HIDDEN, generator=draw) * HIDDEN**-0.5).to(dtype)
    w2 = (torch.randn(EXPERTS, HIDDEN, INNER, generator=draw) * INNER**-0.5).to(dtype)
    return runner, w13, w2


def batch(tokens, dtype=torch.bfloat16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=draw).to(dtype)
    weights, ids = torch.rand(tokens, EXPERTS, generator=draw).softmax(-1).topk(TOP_K)
    return x, weights, ids.int()


def dispatched(x, weights, ids, **named):
    choice = of("topk", "StandardTopKOutput")(weights, ids, None)
    return of("token_dispatcher.standard", "StandardDispatchOutput")(x, None, choice, **named)


def info(w13, w2, **named):
    return of("moe_runner.triton", "TritonMoeQuantInfo")(w13_weight=w13, w2_weight=w2, **named)


def loop(activate, w13, w2, x, weights, ids):
    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(EXPERTS):
        token, choice = torch.where(ids == expert)
        rows = activate(x[token].double() @ w13[expert].double().T) @ w2[expert].double().T
        out.index_add_(0, token, rows * weights[token, choice, None].double())
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_layer_equals_sglang_s_own_in_torch(installed, dtype, inplace, scale):
    runner, w13, w2 = build(dtype, inplace=inplace, routed_scaling_factor=scale)
    for tokens in (1, 5, 33):
        x, weights, ids = batch(tokens, dtype)
        layer = types.SimpleNamespace(num_experts=EXPERTS, w13_weight=w13.double(), w2_weight=w2.double())
        config = types.SimpleNamespace(activation="silu", gemm1_alpha=None, apply_router_weight_on_input=False)
        choice = of("topk", "StandardTopKOutput")(weights.double(), ids, None)
        wanted = of("fused_moe_native", "moe_forward_native")(layer, x.double(), choice, config) * (scale or 1)
        found = runner.run(dispatched(x, weights, ids), info(w13, w2))
        assert type(found) is of("token_dispatcher.standard", "StandardCombineInput")
        assert (found.hidden_states is x) is inplace
        assert relative_error(found.hidden_states, wanted) < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert drop_in.calls()["experts"] == {"moealign": 3, "sglang": 0}
    assert drop_in.layers() == {"moealign": 1, "sglang": {}}


GATES = {
    "gpt-oss": {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 1.0},
    "MiniMax": {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 1.0, "gate_up_interleaved": False},
    "limit after": {"gemm1_clamp_limit": 0.5},
    "DeepSeek-V4": {"swiglu_limit": 1.0},
    "situ": {"activation": "situ", "gemm1_clamp_limit": 25.0},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu2": {"activation": "relu2", "is_gated": False},
    "silu alone": {"activation": "silu", "is_gated": False},
    "interleaved": {},
}


@pytest.mark.parametrize("name", GATES)
def test_activations_equal_sglang_s(installed, name):
    functional = torch.nn.functional
    fused = importlib.import_module(f"{MOE}.moe_runner.triton_utils.fused_moe")

    def own(function):
        return getattr(fused, function)._torchdynamo_orig_callable  # not compiled

    def halves(apply):
        return lambda rows: apply(*rows.chunk(2, dim=-1))

    activate = {
        "gpt-oss": lambda rows: own("swiglu_gpt_oss_sigmoid_alpha")(rows, 1.702, 1.0),
        "MiniMax": lambda rows: own("swiglu_no_interleaved_with_alpha_and_limit")(rows, 1.702, 1.0),
        "limit after": lambda rows: own("_swiglu_silu_clamp_mul")(rows, 0.5),
        "DeepSeek-V4": halves(lambda gate, up: functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)),
        "situ": halves(lambda g, u: 4 * torch.tanh(g / 4) * torch.sigmoid(g) * 25 * torch.tanh(u / 25)),
        "gelu": halves(lambda gate, up: functional.gelu(gate) * up),
        "gelu_tanh": halves(lambda gate, up: functional.gelu(gate, approximate="tanh") * up),
        "relu2": lambda rows: functional.relu(rows).square(),
        "silu alone": functional.silu,
        "interleaved": lambda rows: functional.silu(rows[..., ::2]) * rows[..., 1::2],
    }[name]
    runner, w13, w2 = build(**GATES[name])
    x, weights, ids = batch(19)
    found = runner.run(dispatched(x, weights, ids), info(w13, w2, fuse_swiglu_interleaved=name == "interleaved"))
    assert relative_error(found.hidden_states, loop(activate, w13, w2, x, weights, ids)) < 1e-2
    assert drop_in.calls()["experts"] == {"moealign": 1, "sglang": 0}


FP8 = {
    "block": (SCHEMES[0], {"block_shape": [128, 128]}),
    "channel": (((1, 0), "row", False), {"per_channel_quant": True}),
    "static": (((0, 0), "static", False), {}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FP8)
def test_fp8_layers_equal_a_loop(installed, name, dtype):
    runner, *_ = build()
    scheme, options = FP8[name]
    sizes = ((2 * 128, HIDDEN), (HIDDEN, 128))
    both = [random_quantized(EXPERTS, *size, scheme, seed) for seed, size in enumerate(sizes)]
    scales = [each.scales if name == "block" else each.scales.flatten(1).squeeze(1) for each in both]
    quant = info(
        both[0].data, both[1].data, use_fp8_w8a8=True, w13_scale=scales[0], w2_scale=scales[1],
        a13_scale=both[0].activation_scale, a2_scale=both[1].activation_scale, **options,
    )  # fmt: skip
    for tokens in (1, 19):
        x, weights, ids = batch(tokens, dtype)
        ids[0, 1] = -1
        found = runner.run(dispatched(x, weights, ids), quant).hidden_states
        assert relative_error(found, quantized_loop(x, *both, weights, ids)) < 3e-2
    assert drop_in.calls()["experts"] == {"moealign": 2, "sglang": 0}
    assert drop_in.layers() == {"moealign": 1, "sglang": {}}


def test_routes_of_other_ranks_add_zero(installed):
    runner, w13, w2 = build(num_experts=2 * EXPERTS)
    x, weights, ids = batch(7)
    ids[2], ids[3, 1], weights[2] = -1, -1, float("nan")
    found = runner.run(dispatched(x, weights, ids), info(w13, w2)).hidden_states
    silu = lambda rows: torch.nn.functional.silu(rows[..., :INNER]) * rows[..., INNER:]  # noqa: E731
    assert relative_error(found, loop(silu, w13, w2, x, weights.nan_to_num(), ids)) < 1e-2
    assert found[2].abs().max() == 0


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("format", "expected unquantised or FP8 experts, got use_int8_w8a8"),
        (
            "batch scale",
            "expected FP8 with static scales or scales of rows, got dynamic scales of a whole batch",
        ),
        ("small blocks", "expected FP8 in blocks of 128 x 128, got 64 x 64"),
        ("runner", "expected unquantised or FP8 experts of the Triton runner, got OtherQuantInfo"),
        ("lora", "expected no LoRA, got lora_enabled"),
        ("float32", "expected bfloat16 or float16, got torch.float32"),
        ("on input", "apply_router_weight_on_input: expected False, got True"),
        ("no combine", "no_combine: expected False, got True"),
        ("rounded", "activation: expected one that fused_moe has, got 'silu_rounded' with alpha None, limit None"),
        ("all-reduce", "enable_fused_moe_sum_all_reduce: expected False, got True"),
    ],
)
def test_layers_that_stay_sglang_s_are_counted_and_named(installed, monkeypatch, process, case, said):
    class Core(of("moe_runner.base", "DispatchMoeRunnerCore")):
        runner_backend = None

        def run_from_dispatch(self, *given, **named):
            return "SGLang's"

    options = {
        "lora": {"lora": True}, "float32": {"dtype": torch.float32}, "no combine": {"no_combine": True},
        "on input": {"apply_router_weight_on_input": True}, "rounded": {"activation": "silu_rounded"},
    }.get(case, {})  # fmt: skip
    runner, w13, w2 = build(**options)
    runner.fused_func, runner.runner_core = lambda *given: "SGLang's", Core(runner.config)
    monkeypatch.setattr(process, "enable_fused_moe_sum_all_reduce", case == "all-reduce")
    fp8 = case in ("batch scale", "small blocks")
    blocks = [64, 64] if case == "small blocks" else None
    quant = info(w13, w2, use_int8_w8a8=case == "format", use_fp8_w8a8=fp8, block_shape=blocks)
    if case == "runner":
        quant = type("OtherQuantInfo", (), {})()
    for _ in range(2):
        assert runner.run(dispatched(*batch(3)), quant) == "SGLang's"
    assert drop_in.layers() == {"moealign": 0, "sglang": {said: 1}}
    assert drop_in.calls()["experts"] == {"moealign": 0, "sglang": 2}


@pytest.mark.parametrize("case", ["bias", "packed rows", "other choice"])
def test_calls_that_stay_sglang_s(installed, case):
    runner, w13, w2 = build()
    runner.fused_func = lambda *given: "SGLang's"
    x, weights, ids = batch(3)
    given = dispatched(x, weights, ids, hidden_states_pre_quant=(x, x) if case == "packed rows" else None)
    if case == "other choice":
        given = given._replace(topk_output=types.SimpleNamespace())
    quant = info(w13, w2, b13=torch.zeros(EXPERTS, 2 * INNER) if case == "bias" else None)  # float32, as SGLang has it
    assert runner.run(given, quant) == "SGLang's"
    assert drop_in.calls()["experts"] == {"moealign": 0, "sglang": 1}
    assert runner.run(dispatched(x, weights, ids), info(w13, w2)) != "SGLang's"


def test_why_a_runner_core_is_not_the_way_in():
    """SGLang's extension point for runners does not reach a layer whose runner has a fused function."""
    module = importlib.import_module(f"{MOE}.moe_runner.runner")
    made = []
    module.register_moe_runner_core("triton", lambda config: made.append(config))
    try:
        runner = build()[0]
        assert len(made) == 1
        assert runner.fused_func is of("moe_runner.triton", "fused_experts_none_to_triton")
    finally:
        del module._CUSTOM_RUNNER_CORE_FACTORIES["triton"]


def test_uninstall_restores_the_method():
    runner_class = of("moe_runner.runner", "MoeRunner")
    own = vars(runner_class)["run"]
    assert drop_in.install(layers=True)[-1] == f"{MOE}.moe_runner.runner.MoeRunner.run"
    assert vars(runner_class)["run"] is not own
    drop_in.uninstall()
    assert vars(runner_class)["run"] is own
    assert not drop_in.installed()


def test_another_release_keeps_its_layers(monkeypatch, caplog):
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda package: "0.5.24")
    own = vars(of("moe_runner.runner", "MoeRunner"))["run"]
    try:
        assert not any(name.endswith(".run") for name in drop_in.install(layers=True))
        assert vars(of("moe_runner.runner", "MoeRunner"))["run"] is own
    finally:
        drop_in.uninstall()
    assert "expected sglang 0.5.23 for whole layers, got 0.5.24" in caplog.text


def test_one_token_of_the_marlin_layer(installed):
    """Through SGLang's own names; its kernel is for GPUs, so the layout is compared with its documented one."""
    name = "sglang.kernels.ops.moe.moe_align_single_token"
    assert f"{name}.moe_align_single_token" in installed
    align = importlib.import_module(name).moe_align_single_token
    ids = torch.tensor([[7, -1, 3, 200]], dtype=torch.int32)
    rows, experts, totals = align(ids, 8, return_inactive_prefix_count=True)
    assert experts.tolist() == [-1, 3, 7, 200]
    assert rows.view(4, 8).tolist() == [[choice] + [4] * 7 for choice in (1, 2, 0, 3)]
    assert totals.tolist() == [32, 1]
    assert drop_in.calls()["moe_align_single_token"] == {"moealign": 1, "sglang": 0}
