"""Whole layers inside the released vLLM: run by run_engines.py, in an environment that has it.

On a CPU the released files build the layers, call the experts and combine; only the platform is a stand-in.  Results
are compared with loops over the experts in float64 around vLLM's own activations in torch.  On a GPU with vLLM's
compiled library, results, memory and CUDA graphs are compared with those of vLLM's own layer.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from cases.experts import quantized_loop, relative_error
from engine_checks import DEVICE, GPU, on_gpu

from moealign import QuantizedWeights
from moealign.integrations import engines, vllm_layer
from moealign.integrations import vllm as drop_in

FUSED = "vllm.model_executor.layers.fused_moe"
COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors"
HIDDEN, INNER, EXPERTS, TOP_K = 128, 64, 8, 2
ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def of_vllm(module, name):
    return getattr(importlib.import_module(module), name)


def requantise(rows, scale):
    """vLLM's operator, by which it gives both halves of an expert one scale as it loads them."""
    return (rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.fixture(scope="module", autouse=True)
def platform():
    """A process of vLLM as far as layers need one; on a CPU, with Triton as the platform's backend."""
    config, device = (of_vllm("vllm.config", name) for name in ("VllmConfig", "DeviceConfig"))
    workspace = importlib.import_module("vllm.v1.worker.workspace")
    of_fp8, quantization = importlib.import_module(f"{FUSED}.oracle.fp8"), "vllm.model_executor.layers.quantization"
    with pytest.MonkeyPatch.context() as patch:
        first = sorted(of_fp8.Fp8MoeBackend, key=lambda backend: backend is not of_fp8.Fp8MoeBackend.TRITON)
        patch.setattr(of_fp8, "_get_priority_backends", lambda *given: list(first))
        for name in ("vllm.distributed", f"{quantization}.fp8"):  # no group of ranks is set up
            patch.setattr(importlib.import_module(name), "get_tensor_model_parallel_world_size", lambda: 1)
        if not GPU:
            oracle = importlib.import_module(f"{FUSED}.oracle.unquantized")
            backends = [oracle.UnquantizedMoeBackend.TRITON]
            patch.setattr(oracle, "_get_priority_backends", lambda config: list(backends))
            patch.setattr(oracle, "_trtllm_bf16_lora_supported", lambda config: False, raising=False)
            patch.setattr(type(of_vllm("vllm.platforms", "current_platform")), "supports_fp8", lambda self: True)
            triton = of_vllm(f"{FUSED}.experts.triton_moe", "TritonExperts")
            patch.setattr(triton, "_supports_current_device", staticmethod(lambda: True))
            patch.setattr(type(of_vllm("vllm.platforms", "current_platform")), "is_cuda_alike", lambda self: True)
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
            patch.setattr(importlib.import_module("vllm._custom_ops"), "scaled_fp8_quant", requantise)
        workspace.init_workspace_manager(torch.device(DEVICE))
        with of_vllm("vllm.config", "set_current_vllm_config")(config(device_config=device(device=DEVICE))):
            yield
        workspace.reset_workspace_manager()


@pytest.fixture
def installed():
    for counts in (engines.call_counts, engines.left_counts, engines.layer_counts):
        counts.clear()
    names = drop_in.install(layers=True)
    yield names
    drop_in.uninstall()


def build(activation="silu", dtype=torch.bfloat16, *, ep=None, bias=False, quant=None, limit=None, **options):
    """vLLM's layer of routed experts with random weights, after the weights have been loaded."""
    parallel = of_vllm(f"{FUSED}.config", "FusedMoEParallelConfig")
    names = ("tp", "pcp", "dp", "ep")
    sizes = {f"{name}_size": 1 for name in names} | {f"{name}_rank": 0 for name in names} | {"sp_size": 1}
    if ep is not None:
        sizes |= {"ep_size": 2, "ep_rank": ep}
    mode = parallel(**sizes, use_ep=ep is not None, all2all_backend="allgather_reducescatter", enable_eplb=False)
    manager = of_vllm(f"{FUSED}.expert_map_manager", "ExpertMapManager")(
        max_num_batched_tokens=64, top_k=TOP_K, global_num_experts=EXPERTS, num_redundant_experts=0,
        num_expert_group=None, moe_parallel_config=mode, placement_strategy="linear", enable_eplb=False,
    )  # fmt: skip
    lora, inner = options.pop("lora", False), options.pop("inner", INNER)
    of_config = {"swiglu_limit": limit, "swiglu_alpha": 1.5, "swiglu_beta": 0.5}
    config = of_vllm(f"{FUSED}.config", "FusedMoEConfig")(
        num_experts=EXPERTS, experts_per_token=TOP_K, hidden_dim=HIDDEN, intermediate_size=inner,
        num_local_experts=manager.local_num_experts, num_logical_experts=EXPERTS,
        activation=of_vllm(f"{FUSED}.activation", "MoEActivation")(activation), device=DEVICE, has_bias=bias,
        routing_method=of_vllm(f"{FUSED}.config", "RoutingMethodType").Renormalize, moe_parallel_config=mode,
        in_dtype=dtype, is_lora_enabled=lora, activation_situ_beta=4.0, activation_situ_linear_beta=25.0,
        **(of_config if limit is not None else {}),
    )  # fmt: skip
    up = None if activation.endswith("_no_mul") else "up_proj"
    with torch.device(DEVICE):
        layer = of_vllm(f"{FUSED}.routed_experts", "RoutedExperts")(
            "model.layers.3.mlp.experts", dtype, config, quant, expert_map_manager=manager, ckpt_up_proj_name=up,
            **options,
        )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    for name, each in layer.named_parameters():
        scale = {"w13_weight": HIDDEN**-0.5, "w2_weight": INNER**-0.5}.get(name, 1.0)
        each.data.copy_(torch.randn(each.shape, generator=draw) * scale)
    if quant is None:
        layer.quant_method.process_weights_after_loading(layer)
    return layer.to(DEVICE)


def build_fp8(scheme="block", *, block=(128, 128), **options):
    """The same with FP8 weights and scales, as a checkpoint has them."""
    if scheme == "channel":
        arguments = of_vllm("compressed_tensors.quantization", "QuantizationArgs")
        weights = arguments(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)
        rows = arguments(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
        method = of_vllm(f"{COMPRESSED}_moe_w8a8_fp8", "CompressedTensorsW8A8Fp8MoEMethod")
        config = quantised(lambda layer: method(weights, rows, layer.moe_config))
    else:
        made = of_vllm("vllm.model_executor.layers.quantization.fp8", "Fp8Config")
        config = made(
            activation_scheme="static" if scheme == "static" else "dynamic",
            weight_block_size=list(block) if scheme == "block" else None,
        )
    layer = build(quant=config, inner=options.pop("inner", 128), **options)
    draw = torch.Generator().manual_seed(0)
    for name, each in layer.named_parameters():
        if each.dtype is torch.float8_e4m3fn:
            drawn = torch.randn(each.shape, generator=draw) * 100
            each.data.copy_(drawn.clamp(-448, 448).to(torch.float8_e4m3fn))
        elif "input_scale" in name:
            each.data.copy_(torch.rand(each.shape, generator=draw) * 0.005 + 0.01)
        else:
            each.data.copy_((torch.rand(each.shape, generator=draw) + 0.1) * 1e-3)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def of_layer(layer, scheme):
    """Our record of the weights of `layer`, from its parameters alone."""
    scale = "weight_scale_inv" if scheme == "block" else "weight_scale"
    found = []
    for name in ("w13", "w2"):
        data, scales = getattr(layer, f"{name}_weight").cpu(), getattr(layer, f"{name}_{scale}").cpu()
        if scheme == "block":
            found.append(QuantizedWeights(data, scales))
        elif scheme == "channel":
            found.append(QuantizedWeights(data, scales, (1, 0), "row"))
        else:
            static = getattr(layer, f"{name}_input_scale").cpu().reshape(1)
            found.append(QuantizedWeights(data, scales.view(-1, 1, 1), (0, 0), "static", static))
    return found


def batch(tokens, dtype=torch.bfloat16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=draw).to(DEVICE, dtype)
    weights, ids = torch.rand(tokens, EXPERTS, generator=draw).softmax(-1).topk(TOP_K)
    return x, weights.to(DEVICE), ids.to(DEVICE, torch.int32)


def activations():
    """vLLM's activations in torch, by the name that its layers know them by."""
    module = importlib.import_module("vllm.model_executor.layers.activation")

    def native(name, **kwargs):
        known = vars(getattr(module, name))["forward_native"]
        made = [] if isinstance(known, staticmethod) else [types.SimpleNamespace(**kwargs)]
        return lambda rows: getattr(known, "__func__", known)(*made, rows)

    clamped = {"swiglu_limit": 1.5, "limit": 1.5}
    found = {
        "silu": (native("SiluAndMul"), None),
        "silu, clamped": (native("SiluAndMulWithClamp", **clamped, alpha=1.0, beta=0.0), 1.5),
        "gelu": (native("GeluAndMul", approximate="none"), None),
        "gelu_tanh": (native("GeluAndMul", approximate="tanh"), None),
        "swigluoai": (native("SwigluOAIAndMul", alpha=1.702, limit=7.0), None),
        "swigluoai_uninterleave": (native("SiluAndMulWithClamp", **clamped, alpha=1.5, beta=0.5), 1.5),
        "swiglustep": (native("SwigluStepAndMul", limit=7.0), None),
        "silu_no_mul": (torch.nn.functional.silu, None),
        "gelu_no_mul": (torch.nn.functional.gelu, None),
        "gelu_tanh_no_mul": (lambda rows: torch.nn.functional.gelu(rows, approximate="tanh"), None),
        "relu2_no_mul": (native("ReLUSquaredActivation"), None),
    }
    if hasattr(module, "SituAndMul"):
        found["situ"] = (native("SituAndMul", beta=4.0, linear_beta=25.0), None)
    return found


ACTIVATIONS = (
    "silu", "silu, clamped", "gelu", "gelu_tanh", "swigluoai", "swigluoai_uninterleave", "swiglustep", "situ",
    "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul",
)  # fmt: skip


def reference(layer, activate, x, weights, ids):
    """A loop over the experts of this rank, in float64."""
    wide = {name: each.double() for name, each in layer.named_parameters()}
    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(EXPERTS):
        local = expert if layer.expert_map is None else int(layer.expert_map[expert])
        token, choice = torch.where(ids == expert)
        if local < 0 or not len(token):
            continue
        rows = x[token].double() @ wide["w13_weight"][local].T
        rows = activate(rows + wide["w13_bias"][local] if "w13_bias" in wide else rows).double()
        rows = rows @ wide["w2_weight"][local].T
        rows = rows + wide["w2_bias"][local] if "w2_bias" in wide else rows
        out.index_add_(0, token, rows * weights[token, choice, None].double())
    return out


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_equals_a_loop_around_vllm_s_activation(installed, activation, dtype):
    known = activations()
    if activation not in known:
        pytest.skip(f"this release has no {activation}")
    activate, limit = known[activation]
    layer = build(activation.partition(",")[0], dtype, limit=limit)
    for tokens in (1, 5, 33):
        x, weights, ids = batch(tokens, dtype)
        found = layer.forward_modular(x, weights, ids)
        assert found.dtype is dtype
        assert relative_error(found, reference(layer, activate, x, weights, ids)) < ERROR[dtype]
    assert drop_in.calls()["experts"] == {"moealign": 3, "vllm": 0}
    assert drop_in.layers() == {"moealign": 1, "vllm": {}}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_biases_and_the_experts_of_a_rank(installed, rank, bias):
    layer = build(ep=rank, bias=bias)
    assert (layer.expert_map is None) == (rank is None)
    x, weights, ids = batch(21)
    ids[4] = -1  # padding of a CUDA graph
    weights[5, 0] = float("nan") if rank is not None else weights[5, 0]
    ids[5, 0] = {0: 6, 1: 2}.get(rank, ids[5, 0].item())  # the other rank's
    found = layer.forward_modular(x, weights, ids)
    wanted = reference(layer, activations()["silu"][0], x, weights.nan_to_num(), ids)
    assert relative_error(found, wanted) < ERROR[torch.bfloat16]
    assert found[4].abs().max() == 0
    assert drop_in.calls()["experts"] == {"moealign": 1, "vllm": 0}


def test_the_ranks_of_expert_parallelism_add_up(installed):
    x, weights, ids = batch(17)
    whole, parts = build(), [build(ep=rank) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        for name in ("w13_weight", "w2_weight"):
            getattr(part, name).data.copy_(getattr(whole, name).data[4 * rank : 4 * rank + 4])
    total = sum(part.forward_modular(x, weights, ids).double() for part in parts)
    assert relative_error(total, whole.forward_modular(x, weights, ids).double()) < ERROR[torch.bfloat16]


def test_weights_are_read_where_they_lie(installed):
    layer = build()
    experts = layer.quant_method.moe_kernel.fused_experts
    held = [value for value in vars(experts).values() if isinstance(value, torch.Tensor)]
    assert held == [], "no copy, no second layout"
    assert [name for name, _ in layer.named_parameters()] == ["w13_weight", "w2_weight"]
    x, weights, ids = batch(9)
    first = layer.forward_modular(x, weights, ids)
    layer.w13_weight.data.mul_(2)  # as a weight update in place does
    layer.w2_weight.data.mul_(0.5)
    again = layer.forward_modular(x, weights, ids)
    assert not torch.equal(first, again)
    assert relative_error(again, reference(layer, activations()["silu"][0], x, weights, ids)) < 1e-2


def test_batch_invariance_follows_vllm_s_variable(installed, monkeypatch):
    seen = []
    own = vllm_layer.fused_moe
    monkeypatch.setattr(vllm_layer, "fused_moe", lambda *a, **k: seen.append(k["batch_invariant"]) or own(*a, **k))
    layer, inputs = build(), batch(3)
    layer.forward_modular(*inputs)
    monkeypatch.setattr(importlib.import_module("vllm.envs"), "VLLM_BATCH_INVARIANT", True, raising=False)
    layer.forward_modular(*inputs)
    assert seen == [False, True]


SCHEMES = ("block", "channel", "static")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 1])
def test_an_fp8_layer_equals_a_loop(installed, scheme, dtype, rank):
    layer = build_fp8(scheme, dtype=dtype, ep=rank)
    mapped = None if layer.expert_map is None else layer.expert_map.cpu()
    for tokens in (1, 5, 33):
        x, weights, ids = batch(tokens, dtype)
        found = layer.forward_modular(x, weights, ids)
        wanted = quantized_loop(x.cpu(), *of_layer(layer, scheme), weights.cpu(), ids.cpu(), expert_map=mapped)
        assert found.dtype is dtype
        assert relative_error(found.cpu(), wanted) < 3e-2  # a rounding of rows to e4m3 can fall to either side
    assert drop_in.calls()["experts"] == {"moealign": 3, "vllm": 0}
    assert drop_in.layers() == {"moealign": 1, "vllm": {}}


def test_fp8_weights_and_scales_are_read_where_they_lie(installed, monkeypatch):
    seen, own = [], vllm_layer.fused_moe
    monkeypatch.setattr(vllm_layer, "fused_moe", lambda *a, **k: seen.append(a[1:3]) or own(*a, **k))
    layer = build_fp8()
    layer.forward_modular(*batch(4))
    held = [(each.data.data_ptr(), each.scales.data_ptr()) for each in seen[0]]
    assert held == [
        (getattr(layer, f"{name}_weight").data_ptr(), getattr(layer, f"{name}_weight_scale_inv").data_ptr())
        for name in ("w13", "w2")
    ]


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        ("dynamic", {}, "expected FP8 with static scales or scales of rows, got dynamic scales of a whole batch"),
        ("block", {"block": (64, 64)}, "expected FP8 in blocks of 128 x 128, got 64 x 64"),
        ("block", {"lora": True}, "expected no LoRA, got is_lora_enabled"),
    ],
)
def test_fp8_layers_that_stay_vllm_s(installed, scheme, options, said):
    layer = build_fp8(scheme, **options)
    assert drop_in.layers() == {"moealign": 0, "vllm": {said: 1}}
    assert type(layer.quant_method.moe_kernel.fused_experts).__name__ == "TritonExperts"


def test_an_fp8_call_that_stays_vllm_s_is_quantised_by_vllm(installed, monkeypatch):
    """vLLM's own code up to its kernels gets rows in the model's dtype, and the promise to quantise them itself."""
    triton, seen = of_vllm(f"{FUSED}.experts.triton_moe", "TritonExperts"), []
    module = importlib.import_module(f"{FUSED}.experts.triton_moe")

    class Quantised(Exception):
        pass

    def quantise(rows, scale, dtype, by_row, block_shape, **named):
        seen.append((rows.dtype, scale, dtype, by_row, list(block_shape)))
        raise Quantised

    monkeypatch.setattr(module, "moe_kernel_quantize_input", quantise)
    layer = build_fp8()
    experts = layer.quant_method.moe_kernel.fused_experts
    assert isinstance(experts, triton)
    assert experts.expects_unquantized_inputs
    experts.post_gemm2_hook = print
    with pytest.raises(Quantised):
        layer.forward_modular(*batch(6))
    assert seen == [(torch.bfloat16, None, torch.float8_e4m3fn, False, [128, 128])]
    assert drop_in.calls()["experts"] == {"moealign": 0, "vllm": 1}


# ---- what stays vLLM's -----------------------------------------------------------------------------------------------


def quantised(make=None):
    base = of_vllm("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig")
    method = of_vllm(f"{FUSED}.fused_moe_method_base", "FusedMoEMethodBase")

    class SomeFormat(method):
        def create_weights(self, layer, **kwargs):
            pass

        def get_fused_moe_quant_config(self, layer):
            return None

    class Config(base):
        online_quantization_config = None

        def get_quant_method(self, layer, prefix):
            return SomeFormat(layer.moe_config) if make is None else make(layer)

    for name in Config.__abstractmethods__:
        setattr(Config, name, classmethod(lambda cls, *args: None))
    Config.__abstractmethods__ = frozenset()
    return Config()


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("quantised", "expected unquantised or FP8 experts, got SomeFormat"),
        ("lora", "expected no LoRA, got is_lora_enabled"),
        ("float32", "expected bfloat16 or float16, got torch.float32"),
        ("on input", "expected routing weights after the experts, got apply_router_weight_on_input"),
    ],
)
def test_layers_that_stay_vllm_s_are_counted_and_named(installed, case, said, caplog):
    options = {
        "quantised": lambda: {"quant": quantised()},
        "lora": lambda: {"lora": True},
        "float32": lambda: {"dtype": torch.float32},
        "on input": lambda: {"apply_router_weight_on_input": True},
    }[case]()
    with caplog.at_level(logging.INFO, logger="moealign"):
        layers = [build(**options) for _ in range(2)]
    assert drop_in.layers() == {"moealign": 0, "vllm": {said: 2}}
    messages = [record.message for record in caplog.records if "leaves" in record.message]
    assert messages == [f"moealign leaves model.layers.3.mlp.experts to vLLM (logged once): {said}"]
    kernel = layers[0].quant_method.moe_kernel
    assert kernel is None or type(kernel.fused_experts).__name__ == "TritonExperts"


def test_experts_of_another_kernel_stay_vllm_s(installed, monkeypatch):
    oracle = importlib.import_module(f"{FUSED}.oracle.unquantized")
    method = importlib.import_module(f"{FUSED}.unquantized_fused_moe_method")
    cutlass = of_vllm(f"{FUSED}.experts.flashinfer_cutlass_moe", "FlashInferExperts")
    chosen = (oracle.UnquantizedMoeBackend.OOT, cutlass)
    monkeypatch.setattr(method, "select_unquantized_moe_backend", lambda moe_config: chosen)
    build()
    assert drop_in.layers()["vllm"] == {"expected TritonExperts of vLLM, got FlashInferExperts": 1}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("hook", "post_gemm2_hook: expected none"),
        ("lora", "LoRA: expected no adapters"),
        ("offloaded", "weights: expected them on the device"),
        ("activation", "activation: expected one that fused_moe has"),
        ("bias", "gate_up_bias: expected torch.bfloat16 like the rows"),
    ],
)
def test_a_call_that_stays_vllm_s_gets_workspaces_of_its_own(installed, monkeypatch, case, kind):
    triton = of_vllm(f"{FUSED}.experts.triton_moe", "TritonExperts")
    seen = []

    def theirs(self, *args):
        seen.append(args)
        args[0].fill_(3)

    monkeypatch.setattr(triton, "apply", theirs)
    layer = build(bias=case == "bias")
    experts = layer.quant_method.moe_kernel.fused_experts
    if case == "hook":
        experts.post_gemm2_hook = print
    elif case == "lora":
        experts._lora_context = object()
    elif case == "offloaded":
        layer.w2_weight._vllm_is_uva_offloaded = True
    elif case == "activation":
        layer.activation = types.SimpleNamespace(value="unheard_of", is_gated=True)
    else:
        experts.quant_config._w1.bias = layer.w13_bias.float()
    x, weights, ids = batch(6)
    if case == "lora":  # vLLM keeps the rows on the context
        experts._lora_context = types.SimpleNamespace(original_hidden_states=None)
    assert (layer.forward_modular(x, weights, ids) == 3).all()
    output, rows, *_, first, second, meta, on_input = seen[0]
    assert (output.shape, rows.shape, meta, on_input) == (x.shape, x.shape, None, False)
    assert (first.numel(), second.numel()) == (6 * TOP_K * HIDDEN, 6 * TOP_K * max(2 * INNER, HIDDEN))
    assert drop_in.calls()["experts"] == {"moealign": 0, "vllm": 1}
    assert list(engines.left_counts) == [("vllm", "experts", kind)]


# ---- in and out ------------------------------------------------------------------------------------------------------


def test_uninstall_restores_layers_old_and_new(monkeypatch):
    registry = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot
    routed, triton = of_vllm(f"{FUSED}.routed_experts", "RoutedExperts"), f"{FUSED}.experts.triton_moe"
    assert "RoutedExperts" not in registry
    assert drop_in.install(layers=True)[-1] == f"{FUSED}.routed_experts.RoutedExperts"
    assert drop_in.install(layers=True) == []
    old = build()
    assert type(old) is registry["RoutedExperts"] is not routed
    assert isinstance(old, routed)
    assert f"{FUSED}.routed_experts.RoutedExperts" in drop_in.uninstall()
    assert registry == {}
    new = build()
    assert type(new) is routed
    assert new.quant_method.experts_cls is of_vllm(triton, "TritonExperts")
    engines.call_counts.clear()
    monkeypatch.setattr(of_vllm(triton, "TritonExperts"), "apply", lambda self, *args, **kwargs: None)
    for layer in (old, new):
        layer.forward_modular(*batch(3))
    assert drop_in.calls() == {}, "vLLM computes both"


def test_another_plug_in_s_layer_is_left_alone(caplog):
    registry = importlib.import_module("vllm.model_executor.custom_op")
    other = type("Other", (of_vllm(f"{FUSED}.routed_experts", "RoutedExperts"),), {})
    registry.PluggableLayer.register_oot(other, name="RoutedExperts")
    try:
        assert not any(name.endswith(".RoutedExperts") for name in drop_in.install(layers=True))
        assert "RoutedExperts of another plug-in" not in caplog.text
        assert "moealign leaves whole layers to vLLM: Other of another plug-in is registered" in caplog.text
        drop_in.uninstall()
        assert registry.op_registry_oot["RoutedExperts"] is other
    finally:
        del registry.op_registry_oot["RoutedExperts"]


def test_another_release_keeps_its_layers(monkeypatch, caplog):
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda package: "0.34.0")
    try:
        assert not any(name.endswith(".RoutedExperts") for name in drop_in.install(layers=True))
    finally:
        drop_in.uninstall()
    assert "expected vllm 0.31, 0.32, 0.33 for whole layers, got 0.34.0" in caplog.text


def test_the_counts_are_prometheus_s(installed):
    families = of_vllm("prometheus_client.parser", "text_string_to_metric_families")
    layer = build()
    layer.forward_modular(*batch(4))
    build(lora=True)
    layer.quant_method.moe_kernel.fused_experts.post_gemm2_hook = print
    engines.leave("vllm", "experts", 'a "reason", got 3')
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families(drop_in.metrics())
        for sample in family.samples
    }
    engine, function = ("engine", "vllm"), ("function", "experts")
    assert found == {
        ("moealign_layers", ("by", "moealign"), engine, ("reason", "")): 1,
        ("moealign_layers", ("by", "vllm"), engine, ("reason", "expected no LoRA, got is_lora_enabled")): 1,
        ("moealign_calls_total", ("by", "moealign"), engine, function): 1,
        ("moealign_calls_total", ("by", "vllm"), engine, function): 1,
        ("moealign_left_total", engine, function, ("reason", 'a "reason"')): 1,
    }


def test_a_trace_records_whole_layers_by_name(installed, monkeypatch, tmp_path):
    recording = importlib.import_module("moealign.integrations.recording")
    recorder = recording.Recorder("vllm", tmp_path / "t.safetensors", 1 << 20, None)
    monkeypatch.setattr(engines, "recorder", recorder)
    layer = build()
    ids = [batch(tokens, seed=tokens)[2] for tokens in (3, 5)]
    for each in ids:
        layer.forward_modular(*batch(len(each), seed=len(each)))
    trace = importlib.import_module("moealign.trace").load_trace(recorder.write())
    assert torch.equal(trace.topk_ids[0].int(), torch.cat(ids).cpu())
    assert trace.details["layers"] == ["model.layers.3.mlp.experts"]
    assert (trace.details["hidden"], trace.details["intermediate"]) == (HIDDEN, INNER)


PROCESS = """
import json
import vllm.logger, vllm.plugins as plugins
vllm.logger._configure_vllm_root_logger()      # as every process of vLLM's does before it loads plug-ins
plugins.load_general_plugins()
plugins.plugins_loaded = False
plugins.load_general_plugins()
from moealign.integrations import engines, vllm, vllm_layer
from vllm.model_executor.custom_op import op_registry_oot
print(json.dumps([vllm.installed(), vllm_layer.installed(), list(op_registry_oot), engines.status("vllm")]))
"""


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs the entry points installed")
@pytest.mark.parametrize("value", ["layer", "1", "0"])
def test_the_entry_point_in_a_process_of_vllm_s(value):
    from importlib.metadata import entry_points, version

    if not any(each.name == "moealign" for each in entry_points(group="vllm.general_plugins")):
        pytest.skip("moealign is on a path here, not installed")
    known = {**os.environ, "MOEALIGN_VLLM": value, "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr[-3000:]
    on, layers, registered, status = json.loads(done.stdout.splitlines()[-1])
    assert (on, layers) == (value != "0", value == "layer")
    assert registered == (["RoutedExperts"] if layers else [])
    said = (done.stdout + done.stderr).count("moealign replaces vllm")
    assert said == int(on), "once, where vLLM writes its own log"
    release = version("vllm")
    assert status.startswith(
        {
            "layer": f"on: vllm {release}, MOEALIGN_VLLM=layer, whole layers",
            "1": f"on: vllm {release}, MOEALIGN_VLLM=1",
            "0": f"off: vllm {release}; ",
        }[value]
    )


# ---- with vLLM's compiled library ------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("tokens", [1, 2, 16, 100, 1000, 4096])
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_a_layer_equals_vllm_s_own(tokens, rank, dtype):
    theirs = build(dtype=dtype, ep=rank)
    inputs = batch(tokens, dtype)
    wanted = theirs.forward_modular(*inputs)
    drop_in.install(layers=True)
    try:
        engines.call_counts.clear()
        ours = build(dtype=dtype, ep=rank)
        found = ours.forward_modular(*inputs)
        assert drop_in.calls()["experts"] == {"moealign": 1, "vllm": 0}
        assert all(torch.equal(found, ours.forward_modular(*inputs)) for _ in range(5)), "deterministic"
    finally:
        drop_in.uninstall()
    assert relative_error(found, wanted.double()) < 2 * ERROR[dtype]


@on_gpu
@pytest.mark.parametrize("rank", [None, 0])
def test_gpu_a_graph_replays_with_other_batches(installed, rank):
    layer = build(ep=rank)
    for tokens in (1, 8, 64, 512):
        inputs = [each.clone() for each in batch(tokens)]
        layer.forward_modular(*inputs)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer.forward_modular(*inputs)
        for seed in range(1, 4):
            other = batch(tokens, seed=seed)
            if seed == 3:
                other[2][tokens // 2 :] = -1  # a smaller batch, padded
            for held, new in zip(inputs, other, strict=True):
                held.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(found, layer.forward_modular(*other))


@on_gpu
def test_gpu_building_and_calling_a_layer_keeps_no_memory(installed):
    def held(build_layer):
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        layer = build_layer()
        layer.forward_modular(*batch(64))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - start, layer

    ours, kept = held(build)
    weights = sum(each.numel() * each.element_size() for each in kept.parameters())
    assert weights <= ours < weights + (1 << 20), "the weights once, and no second layout"


@on_gpu
@pytest.mark.parametrize("tokens", [1, 16, 100, 1000])
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("scheme", ["block", "channel"])
def test_gpu_an_fp8_layer_equals_a_loop_and_replays(installed, tokens, rank, scheme):
    layer = build_fp8(scheme, ep=rank)
    if drop_in.layers()["moealign"] == 0:
        pytest.skip(f"vLLM chose other experts: {drop_in.layers()['vllm']}")
    inputs = batch(tokens)
    found = layer.forward_modular(*inputs)
    assert all(torch.equal(found, layer.forward_modular(*inputs)) for _ in range(3)), "deterministic"
    few = 8
    x, weights, ids = (each[:few].cpu() for each in inputs)
    mapped = None if layer.expert_map is None else layer.expert_map.cpu()
    wanted = quantized_loop(x, *of_layer(layer, scheme), weights, ids, expert_map=mapped)
    assert relative_error(found[:few].cpu(), wanted) < 3e-2
    held = [each.clone() for each in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layer.forward_modular(*held)
    for seed in (1, 2):
        other = batch(tokens, seed=seed)
        for mine, new in zip(held, other, strict=True):
            mine.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, layer.forward_modular(*other))


# ---- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_benchmark_compares_two_layers_over_the_same_weights(monkeypatch, bias):
    """On a CPU vLLM's kernel cannot run, so that its layer is replaced by the reference, right and wrong."""
    benchmark = importlib.import_module("engines")
    model = benchmark.Model("small", (EXPERTS, TOP_K, HIDDEN, INNER), bias)
    weights = benchmark.random_weights(model.shape, DEVICE)
    biases = [torch.randn_like(each[:, :, 0]) for each in weights] if bias else []
    try:
        both = benchmark.layers(model, weights, biases, 64)
        inputs = batch(9)
        expected = benchmark.reference(model, weights, biases, inputs, list(range(9)))
        assert relative_error(both[benchmark.OURS].forward_modular(*inputs).double(), expected) < 1e-2
        for factor, said in ((1.0, None), (1.1, "vllm-0.33.0: relative error")):
            theirs = types.SimpleNamespace(forward_modular=lambda *given, by=factor: expected * by)
            found = benchmark.wrong(model, weights, biases, inputs, {**both, benchmark.VLLM: theirs})
            assert found is None if said is None else said in found
    finally:
        drop_in.uninstall()
