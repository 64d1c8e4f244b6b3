"""Gates with constants: those of the models, in torch and in a layer, and how Transformers' modules are recognised."""

from __future__ import annotations

import importlib
import types

import pytest
import torch
from cases.experts import expert_loop, random_layer, relative_error
from torch.nn import functional as F

from moealign import Gate, InvalidInput, InvalidType, align, fused_moe, grouped_gemm
from moealign.experts.activations import PLAIN, function_of, parse
from moealign.integrations import gate_forms
from moealign.integrations import transformers as integration


def gpt_oss(rows):
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def kimi(rows):
    gate, up = rows.chunk(2, -1)
    return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)


def step(rows):
    gate, up = rows.chunk(2, -1)
    return F.silu(gate).clamp(max=5.0) * up.clamp(-5.0, 5.0)


def clamped(rows):
    gate, up = rows.chunk(2, -1)
    return F.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)


FORMS = {
    "gpt-oss": (Gate(limit=7.0, alpha=1.702, offset=1.0, interleaved=True), gpt_oss),
    "Kimi-K3": (Gate("situ"), kimi),
    "Step-3.7": (Gate(limit=5.0, limit_after=True), step),
    "DeepSeek-V4": (Gate(limit=7.0), clamped),
    "no constants": (Gate("gelu"), lambda rows: F.gelu(rows[..., :8]) * rows[..., 8:]),
}
forms = pytest.mark.parametrize(("gate", "plain"), FORMS.values(), ids=FORMS)


@forms
def test_a_gate_is_its_models_formula(gate, plain):
    rows = torch.linspace(-60, 60, 160, dtype=torch.float64).view(10, 16)
    torch.testing.assert_close(gate(rows), plain(rows))
    assert parse(gate.text) == gate
    assert function_of(gate.text, True) == gate


@forms
@pytest.mark.parametrize("transposed", [True, False])
def test_a_layer_with_a_gate_equals_plain_loops(gate, plain, transposed):
    x, gate_up, down, weights, ids, biases = random_layer(20, 2, 4, 9, 8, bias=True, transposed=transposed)
    gate_up = gate_up * 6  # past the limits
    extra = {"gate_up_bias": biases[0], "down_bias": biases[1], "transposed": transposed}
    leaves = [each.requires_grad_() for each in (x, gate_up, down, weights)]
    got = fused_moe(*leaves, ids, activation=gate, **extra)
    want = expert_loop(*leaves, ids, activation=plain, bias=biases, transposed=transposed)
    assert relative_error(got, want) < 1e-12
    for one, other in zip(*(torch.autograd.grad(each.square().sum(), leaves) for each in (got, want)), strict=True):
        assert relative_error(one, other) < 1e-10
    operator = torch.ops.moealign.fused_moe(
        x, gate_up, down, weights, ids, None, None, gate.text, *biases, transposed, None
    )
    assert relative_error(operator, want) < 1e-12


@forms
def test_a_product_with_a_gate(gate, plain):
    x, gate_up, _, _, ids, _ = random_layer(20, 2, 4, 9, 8)
    layout = align(ids, block_size=16, num_experts=4)
    rows = grouped_gemm(x, gate_up, layout, top_k=2)
    torch.testing.assert_close(grouped_gemm(x, gate_up, layout, top_k=2, activation=gate), plain(rows))


def test_a_gate_compiles_and_exports():
    x, gate_up, down, weights, ids, _ = random_layer(6, 2, 3, 8, 8)
    gate = FORMS["gpt-oss"][0]

    def layer(x, ids):
        return fused_moe(x, gate_up, down, weights, ids, activation=gate)

    want = layer(x, ids)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, ids), want)

    class Layer(torch.nn.Module):
        def forward(self, x, ids):
            return layer(x, ids)

    program = torch.export.export(Layer(), (x, ids))
    assert "moealign.fused_moe" in str(program.graph)
    torch.testing.assert_close(program.module()(x, ids), want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Gate("tanh"), InvalidInput, "activation: expected one of silu, .*situ, got 'tanh'"),
        (lambda: Gate(limit=0.0), InvalidInput, "limit: expected a finite number above 0, got 0.0"),
        (lambda: Gate(limit=float("inf")), InvalidInput, "limit: expected a finite number above 0, got inf"),
        (lambda: Gate(offset=float("nan")), InvalidInput, "offset: expected a finite number, got nan"),
        (lambda: Gate(alpha="x"), InvalidType, "alpha: expected a float, got str"),
        (lambda: Gate("relu", alpha=2.0), InvalidInput, "alpha: expected activation='silu' together with it"),
        (lambda: Gate(limit_after=True), InvalidInput, "limit_after: expected a limit together with it"),
        (lambda: Gate(interleaved=1), InvalidType, "interleaved: expected True or False, got int"),
    ],
)
def test_a_gate_that_is_none_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gate_needs_weights_of_a_gate():
    x, up, down, weights, ids, _ = random_layer(3, 2, 3, 8, 8, gated=False)
    with pytest.raises(InvalidInput, match=r"expected gate_up_proj with a gate, \[E, 2I, H\]"):
        fused_moe(x, up, down, weights, ids, activation=Gate())


# ---- Transformers' modules -------------------------------------------------------------------------------------------

#: Module of the modelling file, class, and the gate that its ``_apply_gate`` is.
CLASSES = [
    ("deepseek_v4", "DeepseekV4Experts", Gate(limit=7.0)),
    ("glm5_next", "Glm5NextTextExperts", Gate(limit=7.0)),
    ("hy_v4", "HYV4Experts", Gate(limit=7.0)),
    ("hy_v4_vl", "HYV4VLExperts", Gate(limit=7.0)),
    ("minimax_m3_vl", "MiniMaxM3VLExperts", Gate(limit=7.0, alpha=1.702, offset=1.0)),
    ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", Gate(limit=7.0, alpha=1.702, offset=1.0)),
    ("gpt_oss", "GptOssExperts", Gate(limit=7.0, alpha=1.702, offset=1.0, interleaved=True)),
    ("step3p7", "Step3p7Experts", Gate(limit=7.0, limit_after=True)),
    ("beam", "BeamExperts", Gate()),
    ("inkling2", "Inkling2Experts", Gate("situ", beta=3.0, linear_beta=9.0)),
    ("inkling2_loop", "Inkling2LoopExperts", Gate("situ", beta=3.0, linear_beta=9.0)),
]


def experts_module(model, name):
    """An object of the class without its weights, with small constants."""
    modelling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    kind = getattr(modelling, name)
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    module.act_fn = torch.nn.SiLU()
    module.limit = module.swiglu_limit = 7.0
    module.alpha = module.swiglu_alpha = 1.702
    if model.startswith("inkling2"):
        cap = next(value for key, value in vars(modelling).items() if key.endswith("SoftcappedSwiGLU"))
        module.act_fn = cap(types.SimpleNamespace(mlp_gate_softcap=3.0, mlp_up_softcap=9.0))
    if model == "gpt_oss":
        module.is_concatenated = False
    return module


@pytest.mark.parametrize(("model", "name", "gate"), CLASSES, ids=[name for _, name, _ in CLASSES])
def test_gates_of_transformers_are_recognised_by_what_they_compute(model, name, gate):
    pytest.importorskip("transformers")
    try:
        module = experts_module(model, name)
    except ImportError as error:
        pytest.skip(f"this release of Transformers has no {model}: {error}")
    found = integration._activation(module, True)
    assert found == gate or (model == "beam" and found in (gate, "silu"))
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)) * 10
    torch.testing.assert_close(function_of(found, True)(rows), module._apply_gate(rows))
    if model in ("deepseek_v4", "step3p7"):
        module.limit = 2.0  # a later change is followed
        assert integration._activation(module, True).limit == 2.0


def test_another_gate_is_called():
    module = torch.nn.Module()
    module.act_fn, module.limit = torch.nn.SiLU(), 7.0
    module._apply_gate = lambda rows: torch.tanh(rows[:, :16]) * rows[:, 16:]
    assert integration._activation(module, True) is module._apply_gate
    module._apply_gate = lambda rows: clamped(rows).detach()  # without its gradient
    assert integration._activation(module, True) is module._apply_gate


def test_the_cache_of_gates_is_bounded():
    for number in range(3 * gate_forms._MOST):
        module = torch.nn.Module()
        module.limit = 1.0 + number
        module._apply_gate = lambda rows: clamped(rows)
        gate_forms.fused_gate(module, None)
    assert len(gate_forms._known) <= gate_forms._MOST


def test_explain_lists_every_layer():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    integration.install()
    try:
        for config, expected in (
            (transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=16), "fused: silu"),
            (transformers.GptOssConfig(**sizes, num_local_experts=4), "fused: Gate(activation='silu', limit=7.0"),
        ):
            model = transformers.AutoModelForCausalLM.from_config(config)
            (report,) = integration.explain(model).values()
            assert report.startswith(expected)
            (name,) = integration.explain(model)
            model.get_submodule(name)._apply_gate = lambda rows: torch.tanh(rows[:, ::2]) * rows[:, 1::2]
            (report,) = integration.explain(model).values()
            assert report.startswith("not fused: ")
    finally:
        integration.uninstall()


def test_plain_names_have_functions():
    rows = torch.randn(3, 8)
    for name, function in PLAIN.items():
        assert torch.equal(function_of(name, False)(rows), function(rows))
        assert torch.equal(function_of(name, True)(rows), function(rows[:, :4]) * rows[:, 4:])
