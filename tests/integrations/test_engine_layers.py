"""Whole layers on stand-in engines: which layers we run, with which arguments, and what is put back.

The engines themselves, as released, are tested by tests/engines/run_engines.py.
"""

from __future__ import annotations

import logging
import sys
import types
from enum import Enum

import pytest
import torch
from cases.experts import expert_loop, random_layer, relative_error

from moealign import Gate
from moealign.errors import InvalidInput
from moealign.integrations import engines, sglang_layer, vllm, vllm_layer

CONSTANTS = {
    "clamp_limit": None,
    "alpha": 1.0,
    "beta": 0.0,
    "activation_situ_beta": None,
    "activation_situ_linear_beta": None,
}


def constants(**changed):
    return types.SimpleNamespace(**{**CONSTANTS, **changed})


def module(monkeypatch, name, **members):
    made = types.ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class Activation(Enum):
    SILU = "silu"
    ODD = "odd"

    @property
    def is_gated(self):
        return True


class TritonExperts:
    """What we use of vLLM's class: its constants, its sizes, and its own computation, which fills threes."""

    def __init__(self):
        self.activation_config, self.w1_bias, self.w2_bias, self.seen = constants(), None, None, []
        self.quant_dtype = None

    def moe_problem_size(self, a1, w1, w2, topk_ids):
        return w1.shape[0], a1.shape[0], w1.shape[1], a1.shape[1], topk_ids.shape[1]

    def workspace_dtype(self, dtype):
        return dtype

    def workspace_shapes(self, tokens, columns, hidden, top_k, *rest):
        return (tokens, top_k, hidden), (tokens, top_k, columns), (tokens, hidden)

    def apply(self, output, *args):
        self.seen.append(args)
        output.fill_(3)


class UnquantizedFusedMoEMethod:
    def __init__(self):
        self.experts_cls = TritonExperts


class OtherMethod(UnquantizedFusedMoEMethod):
    pass


@pytest.fixture
def engine(monkeypatch):
    """A vLLM 0.33 with its registry of plug-in classes and a layer that asks it."""
    for counts in (engines.call_counts, engines.left_counts, engines.layer_counts):
        counts.clear()
    registry = {}

    class PluggableLayer:
        def __new__(cls, *args, **kwargs):
            return super().__new__(registry.get(cls.__name__, cls))

        @classmethod
        def register_oot(cls, ours, name):
            assert name not in registry
            registry[name] = ours

    class RoutedExperts(PluggableLayer):
        def __init__(self, method=UnquantizedFusedMoEMethod, dtype=torch.bfloat16, lora=False, on_input=False):
            self.layer_name, self.params_dtype, self.apply_router_weight_on_input = "layers.0.experts", dtype, on_input
            self.moe_config = types.SimpleNamespace(in_dtype=dtype, is_lora_enabled=lora)
            self.quant_method = method()

    at = vllm_layer._LAYERS
    module(monkeypatch, f"{at}.experts.triton_moe", TritonExperts=TritonExperts)
    module(monkeypatch, f"{at}.unquantized_fused_moe_method", UnquantizedFusedMoEMethod=UnquantizedFusedMoEMethod)
    module(monkeypatch, f"{at}.routed_experts", RoutedExperts=RoutedExperts)
    module(monkeypatch, "vllm.model_executor.custom_op", op_registry_oot=registry, PluggableLayer=PluggableLayer)
    envs = module(monkeypatch, "vllm.envs", VLLM_BATCH_INVARIANT=False)
    for name in (vllm._LAYERS, vllm._OPS):
        module(monkeypatch, name)
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda package: "0.33.1+cu130")
    vllm_layer._classes.cache_clear()
    yield types.SimpleNamespace(registry=registry, layer=RoutedExperts, envs=envs)
    vllm.uninstall()
    vllm_layer._classes.cache_clear()


def arguments(tokens=5, dtype=torch.bfloat16):
    x, gate_up, down, weights, ids, _ = random_layer(tokens, 2, 4, 16, 8)
    wide = (x, gate_up, down, weights)
    x, gate_up, down = (each.to(dtype) for each in wide[:3])
    call = (x, gate_up, down, weights.float(), ids, Activation.SILU, 4, None, None, None)
    empty = x.new_empty(0)
    return call, (empty, empty, None, False), expert_loop(x.double(), gate_up.double(), down.double(), weights, ids)


def test_a_layer_runs_our_experts_and_is_put_back(engine, caplog):
    with caplog.at_level(logging.INFO, logger="moealign"):
        assert vllm.install(layers=True) == [f"{vllm_layer._LAYERS}.routed_experts.RoutedExperts"]
        assert vllm.install(layers=True) == []
        layer, second = engine.layer(), engine.layer()
    assert type(layer) is engine.registry["RoutedExperts"] is not engine.layer
    experts = layer.quant_method.experts_cls()
    assert isinstance(experts, TritonExperts)
    assert second.quant_method.experts_cls is type(experts)
    said = [record.message for record in caplog.records if "runs whole layers" in record.message]
    assert said == ["moealign runs whole layers of vLLM, layers.0.experts the first (logged once)"]
    call, rest, wanted = arguments()
    out = torch.empty_like(call[0])
    assert experts.workspace_shapes(5, 16, 16, 2, 4, 4, None, Activation.SILU) == ((0,), (0,), (5, 16))
    assert experts.apply(out, *call, *rest) is None
    assert relative_error(out.double(), wanted) < 2e-2
    assert (experts.seen, vllm.layers()) == ([], {"moealign": 2, "vllm": {}})
    assert vllm.uninstall() == [f"{vllm_layer._LAYERS}.routed_experts.RoutedExperts"]
    assert engine.registry == {}
    assert type(engine.layer()) is engine.layer
    experts.apply(out, *call, *rest)
    assert (out == 3).all(), "the layer that was built before is vLLM's again"
    assert vllm.calls()["experts"] == {"moealign": 1, "vllm": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": OtherMethod}, "expected unquantised or FP8 experts, got OtherMethod"),
        ({"lora": True}, "expected no LoRA, got is_lora_enabled"),
        ({"dtype": torch.float32}, "expected bfloat16 or float16, got torch.float32"),
        ({"on_input": True}, "expected routing weights after the experts, got apply_router_weight_on_input"),
    ],
)
def test_layers_that_stay_vllm_s(engine, options, said, caplog):
    vllm.install(layers=True)
    layers = [engine.layer(**options) for _ in range(2)]
    assert all(layer.quant_method.experts_cls is TritonExperts for layer in layers)
    assert vllm.layers() == {"moealign": 0, "vllm": {said: 2}}
    assert [record.message for record in caplog.records].count(
        f"moealign leaves layers.0.experts to vLLM (logged once): {said}"
    ) == 1
    assert f'moealign_layers{{engine="vllm",by="vllm",reason="{said}"}} 2\n' in vllm.metrics()


def test_experts_of_another_kernel_stay_vllm_s(engine):
    vllm.install(layers=True)

    class Method(UnquantizedFusedMoEMethod):
        pass

    layer = engine.layer()
    layer.quant_method.experts_cls = Method
    said = vllm_layer.refuses_layer(layer, UnquantizedFusedMoEMethod, TritonExperts)
    assert said == "expected TritonExperts of vLLM, got Method"


@pytest.mark.parametrize(
    ("block", "scheme", "named", "all2all", "said"),
    [
        ([128, 128], "dynamic", {}, False, None),  # 0.31 and 0.32 do not have per_act_token_quant
        ([128, 128], "dynamic", {"per_act_token_quant": False}, False, None),
        (None, "static", {}, False, None),
        (None, "dynamic", {"per_act_token_quant": True}, False, None),
        (None, "dynamic", {}, False, "expected FP8 with static scales or scales of rows"),
        ([64, 64], "dynamic", {}, False, "expected FP8 in blocks of 128 x 128, got 64 x 64"),
        ([128, 128], "dynamic", {}, True, "expected no all-to-all of FP8 rows, got use_all2all_kernels"),
    ],
)
def test_fp8_layers_of_vllm_s(engine, block, scheme, named, all2all, said):
    layer = engine.layer()
    layer.moe_config.moe_parallel_config = types.SimpleNamespace(use_all2all_kernels=all2all)
    layer.quant_method = type("Fp8MoEMethod", (), {})()
    config = types.SimpleNamespace(activation_scheme=scheme)
    vars(layer.quant_method).update(
        experts_cls=TritonExperts, quant_config=config, weight_block_size=block, moe_block_shape=block, **named
    )
    found = vllm_layer.refuses_layer(layer, UnquantizedFusedMoEMethod, TritonExperts)
    assert found is None if said is None else found.startswith(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"post_gemm2_hook": print}, "post_gemm2_hook: expected none"),
        ({"_lora_context": 1}, "LoRA: expected no adapters"),
        ({"w1_bias": torch.zeros(4, 16)}, "gate_up_bias: expected torch.bfloat16 like the rows"),
        ({"activation": Activation.ODD}, "activation: expected one that fused_moe has"),
        ({"map": torch.zeros(3, dtype=torch.int32)}, "expert_map: expected [4]"),
        ({"offloaded": True}, "weights: expected them on the device"),
        ({"dtype": torch.float32}, "hidden_states: expected bfloat16 or float16"),
        ({"on_input": True}, "apply_router_weight_on_input: expected False"),
    ],
)
def test_calls_that_stay_vllm_s_have_its_workspaces(engine, change, said):
    vllm.install(layers=True)
    experts = engine.layer().quant_method.experts_cls()
    call, rest, _ = arguments(dtype=change.pop("dtype", torch.bfloat16))
    call, rest = list(call), list(rest)
    call[5] = change.pop("activation", call[5])
    call[7] = change.pop("map", None)
    rest[3] = change.pop("on_input", False)
    if change.pop("offloaded", False):
        call[2]._vllm_is_uva_offloaded = True
    for name, value in change.items():
        setattr(experts, name, value)
    out = torch.empty_like(call[0])
    experts.apply(out, *call, *rest)
    assert (out == 3).all()
    *_, first, second, meta, on_input = experts.seen[0]
    assert (first.numel(), second.numel(), meta, on_input) == (5 * 2 * 16, 5 * 2 * 16, None, rest[3])
    assert list(engines.left_counts.items()) == [(("vllm", "experts", said), 1)]
    assert vllm.calls()["experts"] == {"moealign": 0, "vllm": 1}


def test_batch_invariance_follows_vllm_s_variable(engine, monkeypatch):
    vllm.install(layers=True)
    experts, seen = engine.layer().quant_method.experts_cls(), []
    monkeypatch.setattr(vllm_layer, "fused_moe", lambda *args, **named: seen.append(named["batch_invariant"]))
    call, rest, _ = arguments()
    for value in (False, True):
        engine.envs.VLLM_BATCH_INVARIANT = value
        experts.apply(torch.empty_like(call[0]), *call, *rest)
    assert seen == [False, True]


def test_an_error_of_ours_that_is_no_refusal_is_not_hidden(engine, monkeypatch):
    vllm.install(layers=True)
    experts = engine.layer().quant_method.experts_cls()
    monkeypatch.setattr(vllm_layer, "fused_moe", lambda *args, **named: 1 / 0)
    call, rest, _ = arguments()
    with pytest.raises(ZeroDivisionError):
        experts.apply(torch.empty_like(call[0]), *call, *rest)
    assert experts.seen == []


def test_what_another_plug_in_registered_stays(engine, caplog):
    engine.registry["RoutedExperts"] = other = type("Other", (engine.layer,), {})
    assert vllm.install(layers=True) == []
    assert "moealign leaves whole layers to vLLM: Other of another plug-in is registered" in caplog.text
    assert vllm.uninstall() == []
    assert engine.registry == {"RoutedExperts": other}


@pytest.mark.parametrize(
    ("release", "known"), [("0.31.0", True), ("0.32.2rc1", True), ("0.30.9", False), ("0.330.0", False)]
)
def test_releases_whose_layers_are_known(engine, monkeypatch, caplog, release, known):
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda package: release)
    assert bool(vllm.install(layers=True)) is known
    assert (f"expected vllm 0.31, 0.32, 0.33 for whole layers, got {release}" in caplog.text) is not known


def test_the_plug_in_installs_what_the_variable_says(engine, monkeypatch):
    for value, layers in (("1", False), ("layer", True), ("layers", False)):
        monkeypatch.setenv("MOEALIGN_VLLM", value)
        vllm.plugin()
        assert vllm_layer.installed() is layers
        vllm.uninstall()


def test_messages_go_where_the_engine_s_go(monkeypatch):
    ours, theirs = logging.getLogger("moealign"), logging.getLogger("an engine")
    monkeypatch.setattr(ours, "parent", ours.parent)
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    engines.follow_log("an engine")
    logging.getLogger("moealign.integrations").info("too early")
    theirs.addHandler(handler)  # later, as vLLM does
    theirs.setLevel(logging.INFO)
    logging.getLogger("moealign.integrations.engines").info("seen")
    assert [record.message if hasattr(record, "message") else record.msg for record in seen] == ["seen"]
    monkeypatch.setattr(ours, "level", logging.ERROR)  # configured by the process: left as it is
    engines.follow_log("another engine")
    assert ours.parent is theirs


@pytest.mark.parametrize(
    ("name", "changed", "wanted"),
    [
        ("silu", {}, "silu"),
        ("silu", {"clamp_limit": 7.0}, Gate(limit=7.0)),
        ("gelu_tanh", {}, "gelu_tanh"),
        ("relu2_no_mul", {}, "relu2"),
        ("swigluoai", {}, Gate(limit=7.0, alpha=1.702, offset=1.0, interleaved=True)),
        (
            "swigluoai_uninterleave",
            {"clamp_limit": 5.0, "alpha": 1.5, "beta": 0.5},
            Gate(limit=5.0, alpha=1.5, offset=0.5),
        ),
        ("swiglustep", {}, Gate(limit=7.0, limit_after=True)),
        ("situ", {"activation_situ_beta": 3.0}, Gate("situ", beta=3.0, linear_beta=None)),
    ],
)
def test_vllm_s_activations(name, changed, wanted):
    assert vllm_layer.gate_of(name, constants(**changed)) == wanted


@pytest.mark.parametrize("name", ["swigluoai_uninterleave", "situ", "relu2", "tanh"])
def test_an_activation_of_vllm_s_that_we_lack(name):
    with pytest.raises(InvalidInput, match=f"activation: expected one that fused_moe has, got '{name}'"):
        vllm_layer.gate_of(name, constants())


# ---- SGLang ------------------------------------------------------------------------------------------------------


def config(**changed):
    known = {
        "activation": "silu", "is_gated": True, "gemm1_alpha": None, "gemm1_clamp_limit": None, "swiglu_limit": None,
        "gate_up_interleaved": True, "apply_router_weight_on_input": False, "no_combine": False, "inplace": False,
        "routed_scaling_factor": None, "layer_id": 7,
    }  # fmt: skip
    return types.SimpleNamespace(**{**known, **changed})


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, "silu"),
        (
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0},
            Gate(limit=7.0, alpha=1.702, offset=1.0, interleaved=True),
        ),
        (
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "gate_up_interleaved": False},
            Gate(limit=7.0, alpha=1.702, offset=1.0),
        ),
        ({"gemm1_clamp_limit": 7.0}, Gate(limit=7.0, limit_after=True)),
        ({"swiglu_limit": 10}, Gate(limit=10.0)),
        ({"activation": "situ", "gemm1_clamp_limit": 25.0}, Gate("situ", beta=4.0, linear_beta=25.0)),
        ({"activation": "gelu_tanh"}, "gelu_tanh"),
        ({"activation": "relu2", "is_gated": False}, "relu2"),
    ],
)
def test_sglang_s_activations(changed, wanted):
    assert sglang_layer.gate_of(config(**changed), False) == wanted


def test_rows_that_sglang_has_interleaved():
    assert sglang_layer.gate_of(config(), True) == Gate(interleaved=True)


@pytest.mark.parametrize(
    "changed", [{"activation": "silu_rounded"}, {"activation": "gelu", "gemm1_alpha": 1.0}, {"gemm1_alpha": 1.702}]
)
def test_an_activation_of_sglang_s_that_we_lack(changed):
    with pytest.raises(InvalidInput, match="activation: expected one that fused_moe has"):
        sglang_layer.gate_of(config(**changed), False)


@pytest.fixture
def sgl(monkeypatch):
    """Of SGLang, the modules that a layer asks, and the records that it is given."""
    for counts in (engines.call_counts, engines.left_counts, engines.layer_counts):
        counts.clear()
    sglang_layer.forget()
    execution = types.SimpleNamespace(moe=types.SimpleNamespace(enable_fused_moe_sum_all_reduce=False))
    module(monkeypatch, "sglang.srt.runtime_context", get_exec=lambda: execution)
    module(
        monkeypatch,
        f"{sglang_layer._MOE}.moe_runner.triton_utils.fused_moe",
        is_batch_invariant_mode_enabled=lambda: False,
        is_allocation_symmetric=lambda: False,
    )
    combined = types.SimpleNamespace
    module(monkeypatch, f"{sglang_layer._MOE}.token_dispatcher.standard", StandardCombineInput=combined)


def record(name, **members):
    return type(name, (types.SimpleNamespace,), {})(**members)


def quant_info(w13, w2, **changed):
    formats = dict.fromkeys([*sglang_layer._FORMATS, "use_fp8_w8a8", "per_channel_quant"], False)
    rest = {"b13": None, "b2": None, "fuse_swiglu_interleaved": False}
    return record("TritonMoeQuantInfo", w13_weight=w13, w2_weight=w2, **{**formats, **rest, **changed})


def dispatched(x, weights, ids):
    choice = record("StandardTopKOutput", topk_weights=weights, topk_ids=ids)
    rest = {"hidden_states_scale": None, "hidden_states_pre_quant": None}
    return record("StandardDispatchOutput", hidden_states=x, topk_output=choice, **rest)


class Runner:
    def __init__(self, **changed):
        self.config, self.lora_enabled = config(**changed), False


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_layer_of_sglang_s(sgl, inplace, scale):
    (x, w13, w2, weights, ids, *_), _, wanted = arguments()
    runner = Runner(inplace=inplace, routed_scaling_factor=scale)
    found = sglang_layer.run(runner, dispatched(x, weights, ids), quant_info(w13, w2)).hidden_states
    assert (found is x) is inplace
    assert relative_error(found.double(), wanted * (scale or 1)) < 2e-2
    sglang_layer.run(runner, dispatched(x, weights, ids), quant_info(w13, w2))
    assert engines.layers("sglang") == {"moealign": 1, "sglang": {}}


@pytest.mark.parametrize(
    ("sizes", "share"),
    [({}, None), ({"num_experts": 4, "num_local_experts": 4}, None), ({"num_experts": 32, "num_local_experts": 4}, 8)],
)
def test_a_layer_of_sglang_s_expects_the_routes_of_its_rank(sgl, sizes, share, monkeypatch):
    (x, w13, w2, weights, ids, *_), *_ = arguments()
    seen = []
    plain = sglang_layer.fused_moe
    monkeypatch.setattr(sglang_layer, "fused_moe", lambda *args, **named: seen.append(named) or plain(*args, **named))
    sglang_layer.run(Runner(**sizes), dispatched(x, weights, ids), quant_info(w13, w2))
    assert seen[0]["expected_routes"] == (None if share is None else -(-ids.numel() // share))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_int4_w4a16": True}, "expected unquantised or FP8 experts, got use_int4_w4a16"),
        ({"no_combine": True}, "no_combine: expected False"),
        ({"float": True}, "expected bfloat16 or float16, got torch.float32"),
    ],
)
def test_layers_that_stay_sglang_s(sgl, changed, said):
    (x, w13, w2, weights, ids, *_), *_ = arguments(dtype=torch.float32 if "float" in changed else torch.bfloat16)
    formats = {name: value for name, value in changed.items() if name.startswith("use_")}
    runner = Runner(**{name: value for name, value in changed.items() if name == "no_combine"})
    for _ in range(2):
        with pytest.raises(InvalidInput, match=said):
            sglang_layer.run(runner, dispatched(x, weights, ids), quant_info(w13, w2, **formats))
    assert sum(engines.layers("sglang")["sglang"].values()) == 1
