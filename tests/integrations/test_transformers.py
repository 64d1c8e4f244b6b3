"""Transformers' models through moealign, small and random, against their own eager experts."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from helpers import in_threads
from torch._subclasses.fake_tensor import FakeTensorMode

import moealign
from moealign.experts.activations import function_of
from moealign.integrations import router_forms
from moealign.integrations import transformers as integration
from moealign.trace import load_trace, save_trace

transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=6),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=24, head_dim=8),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4},
        n_routed_experts=8,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL, num_local_experts=4, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
}
TEXT = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def installed():
    integration.install()
    integration.install()  # idempotent
    yield
    integration.uninstall()
    integration.uninstall()


def make(name):
    """The same random model twice: with Transformers' eager experts, and with ours."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.pad_token_id = config.eos_token_id = config.bos_token_id = None
    eager = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()
    for parameter in eager.parameters():  # some begin as zeros or as uninitialised memory
        torch.nn.init.normal_(parameter, std=0.15)
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("moealign")
    assert eager.config._experts_implementation == "eager"
    assert ours.config._experts_implementation == "moealign"
    return eager.eval(), ours.eval()


def close(got, want, most):
    got, want = got.detach(), want.detach()
    scale = float(want.abs().max().clamp(min=1e-6))
    assert float((got - want).abs().max()) / scale < most


def close_gradients(ours, eager, most):
    """Every parameter's gradient is that of the eager model, or missing from both."""
    theirs = dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            close(parameter.grad, theirs[name].grad, most)


@pytest.fixture
def calls(monkeypatch):
    """How often our function computed an experts module."""
    seen = []
    original = integration.fused_moe

    def counted(*args, **kwargs):
        seen.append(kwargs["activation"])
        return original(*args, **kwargs)

    monkeypatch.setattr(integration, "fused_moe", counted)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_eager(name, calls):
    eager, ours = make(name)
    want, got = (model(TEXT, labels=TEXT) for model in (eager, ours))
    assert len(calls) == (1 if name == "deepseek-v3" else 2), "each layer of experts was computed by moealign"
    assert all(callable(each) for each in calls) == (name == "gpt-oss"), "a gate that is not plain is the module's own"
    close(got.logits, want.logits, 1e-6)
    want.loss.backward()
    got.loss.backward()
    close_gradients(ours, eager, 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_gives_the_same_tokens(name):
    eager, ours = make(name)
    want, got = (model.generate(TEXT, max_new_tokens=12, do_sample=False) for model in (eager, ours))
    assert torch.equal(got, want)


def test_training_steps_give_the_same_model():
    models = make("qwen3-moe")
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(TEXT, labels=TEXT).loss.backward()
            optimizer.step()
    eager, ours = (model.eval()(TEXT).logits for model in models)
    close(ours, eager, 1e-4)


def test_a_model_is_loaded_with_it(tmp_path):
    eager, _ = make("qwen3-moe")
    eager.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moealign")
    close(loaded(TEXT).logits, eager(TEXT).logits, 1e-6)


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_compiled_gradients_equal_eager(name):
    """Of the hidden states (through the layer below), the experts' weights and the routers, which are replaced."""
    eager, ours = make(name)
    integration.replace_routers(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    for model in (eager, compiled):
        model(TEXT, labels=TEXT, use_cache=False).loss.backward()
    close_gradients(ours, eager, 1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("weights", "inside"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", None)])
def test_mixed_precision_is_within_its_rounding(weights, inside, grad):
    eager, ours = make("qwen3-moe")
    integration.replace_routers(ours)
    inside = None if inside is None else getattr(torch, inside)
    results = []
    for model in (eager, ours):
        model.to(getattr(torch, weights))
        with torch.set_grad_enabled(grad), torch.autocast("cpu", inside, enabled=inside is not None):
            results.append(model(TEXT).logits)
    assert results[0].dtype == results[1].dtype
    close(results[1].float(), results[0].float(), 5e-2)


def test_inference_mode():
    eager, ours = make("qwen3-moe")
    integration.replace_routers(ours)
    with torch.inference_mode():
        close(ours(TEXT).logits, eager(TEXT).logits, 1e-6)


def test_compiles_as_one_graph():
    """With a graph break nowhere; Transformers' own eager loop cannot be compiled whole."""
    _, ours = make("qwen3-moe")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(TEXT, use_cache=False).logits, ours(TEXT, use_cache=False).logits, 1e-6)


# ---- modules by themselves: what the interface may ask for -----------------------------------------------------------


class Config:
    _experts_implementation = "moealign"
    _experts_implementation_internal = "moealign"


def experts_of(**layout):
    """An experts module as Transformers' models write them, of the given layout."""
    gated = layout.get("has_gate", True)
    transposed, biased = layout.get("is_transposed", False), layout.get("has_bias", False)

    @moe.use_experts_implementation(**layout)
    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, hidden, inner = 5, 12, 8
            wide = inner * (2 if gated else 1)
            first = (5, hidden, wide) if transposed else (5, wide, hidden)
            second = (5, inner, hidden) if transposed else (5, hidden, inner)
            generator = torch.Generator().manual_seed(3)
            name = "gate_up_proj" if gated else "up_proj"
            self.register_parameter(name, torch.nn.Parameter(torch.randn(first, generator=generator) / 4))
            self.down_proj = torch.nn.Parameter(torch.randn(second, generator=generator) / 3)
            if biased:
                bias = torch.nn.Parameter(torch.randn(5, wide, generator=generator))
                self.register_parameter(name + "_bias", bias)
                self.down_proj_bias = torch.nn.Parameter(torch.randn(5, hidden, generator=generator))
            self.act_fn = torch.nn.SiLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("not through the interface")

    return Experts(Config())


def routes():
    """(hidden states, ids, weights) of six tokens for the experts of :func:`experts_of`."""
    generator = torch.Generator().manual_seed(4)
    x, weights = torch.randn(6, 12, generator=generator), torch.rand(6, 2, generator=generator)
    return x, torch.randint(0, 5, (6, 2), generator=generator), weights


LAYOUTS = {
    "concatenated": {},
    "llama-4": {"is_transposed": True},
    "biased": {"has_bias": True},
    "transposed, biased": {"is_transposed": True, "has_bias": True},
    "no gate": {"has_gate": False},
    "no gate, biased": {"has_gate": False, "has_bias": True},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_weights_equals_transformers_own(name):
    module = experts_of(**LAYOUTS[name])
    x, ids, weights = routes()
    close(module(x, ids, weights), moe.batched_mm_experts_forward(module, x, ids, weights), 1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_sentinel_of_expert_parallelism_is_dropped(name):
    """Masked routing writes the number of local experts, and a weight of zero."""
    module = experts_of(**LAYOUTS[name])
    x, ids, weights = routes()
    foreign = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [0, 0], [1, 0]], dtype=torch.bool)
    want = moe.batched_mm_experts_forward(module, x, ids, weights.masked_fill(foreign, 0))
    ids, weights = ids.masked_fill(foreign, 5), weights.masked_fill(foreign, 0)
    close(module(x, ids, weights), want, 1e-6)
    assert not module(x, ids, weights)[2].any()
    dispatched = module(x[:1], torch.tensor([[5]]), torch.ones(1, 1))  # an empty rank's dummy row
    assert not dispatched.any()


def test_an_own_gate_or_norm_is_called():
    module = experts_of()
    x, ids, weights = routes()
    plain = module(x, ids, weights)
    module._apply_gate = lambda rows: torch.tanh(rows[:, :8]) * rows[:, 8:]  # of this object alone
    assert not torch.allclose(module(x, ids, weights), plain)
    close(module(x, ids, weights), moe.batched_mm_experts_forward(module, x, ids, weights), 1e-6)
    del module._apply_gate
    module.has_post_expert_norm, module.post_expert_norm = True, lambda rows: 2 * rows
    close(module(x, ids, weights), 2 * plain, 1e-6)
    module._apply_post_norm = lambda rows: 3 * rows
    close(module(x, ids, weights), 3 * plain, 1e-6)


def test_the_switch_for_batch_invariance():
    module, (x, ids, weights) = experts_of(), routes()
    integration.install(batch_invariant=True)
    try:
        whole = module(x, ids, weights)
        for token in range(len(x)):
            one = slice(token, token + 1)
            assert torch.equal(module(x[one], ids[one], weights[one]), whole[one])
    finally:
        integration.install()


def test_an_activation_that_is_not_known_is_called():
    module = experts_of()
    module.act_fn = torch.nn.Softplus()
    x, ids, weights = routes()
    close(module(x, ids, weights), moe.batched_mm_experts_forward(module, x, ids, weights), 1e-6)


def test_every_named_activation_is_what_it_is_called():
    from transformers.activations import ACT2CLS, ACT2FN

    known = 0
    for name in ACT2CLS:
        function = ACT2FN[name]
        said = integration._ACTIVATIONS.get(type(function).__name__)
        if said is None:
            continue
        known += 1
        rows = torch.linspace(-4, 4, 50)
        if integration._activation(type("M", (), {"act_fn": function})(), False) is not function:
            close(function_of(said, False)(rows), function(rows), 1e-6)
    assert known >= 5


class Marked(torch.Tensor):
    """A tensor that stands for others, as quantised and sharded ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(each.inner if isinstance(each, cls) else each for each in args), **(kwargs or {}))


def of_dtype(dtype):
    return lambda module: vars(module)["_parameters"].update(
        down_proj=torch.nn.Parameter(module.down_proj.data.to(dtype), requires_grad=False)
    )


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (of_dtype(torch.float8_e4m3fn), "down_proj in bfloat16, .* got torch.float8_e4m3fn"),
        (of_dtype(torch.int8), "got torch.int8"),
        (of_dtype(torch.uint8), "got torch.uint8"),
        (lambda module: delattr(module, "gate_up_proj"), "a parameter gate_up_proj in Experts, got none"),
        (lambda module: module.register_parameter("down_proj", None), "a parameter down_proj in Experts, got none"),
        (
            lambda module: vars(module)["_parameters"].update(down_proj=Marked(module.down_proj.data)),
            "down_proj to be an ordinary tensor in Experts, got Marked",
        ),
    ],
    ids=["FP8", "int8", "packed", "no first", "no second", "a subclass"],
)
def test_experts_with_other_weights_are_refused_with_the_way_out(change, got):
    module = experts_of()
    change(module)
    with pytest.raises(moealign.BackendUnavailable, match=rf"{got}.*; set another by .*'grouped_mm'.*dequantised"):
        module(*routes())


def fp8_experts(block, **sizes):
    """An FP8Experts module, and rows and routes for it."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    with torch.device("meta"):
        config = CONFIGS["qwen3-moe"]()
        for name, value in sizes.items():
            setattr(config, name, value)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moealign")
    quantization = transformers.FineGrainedFP8Config(weight_block_size=block)
    model = fp8.replace_with_fp8_linear(model, quantization_config=quantization)
    experts = model.model.layers[0].mlp.experts.to_empty(device="cpu").requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, config.hidden_size, generator=g)
    ids = torch.randint(0, config.num_experts, (5, 2), generator=g)
    return experts, x, ids, torch.rand(5, 2, generator=g)


def test_fp8_experts_of_transformers_are_computed_in_fp8():
    from cases.experts import quantized_loop, random_quantized, relative_error

    experts, x, ids, weights = fp8_experts((128, 128), hidden_size=256, moe_intermediate_size=128)
    both = (
        random_quantized(len(experts.down_proj), 256, 256),
        random_quantized(len(experts.down_proj), 256, 128, seed=1),
    )
    for name, one in zip(("gate_up_proj", "down_proj"), both, strict=True):
        getattr(experts, name).data.copy_(one.data)
        getattr(experts, name + "_scale_inv").data.copy_(one.scales)
    ids[2, 1] = len(experts.down_proj)  # expert parallelism's mark
    want = quantized_loop(x, *both, weights, ids)
    assert relative_error(experts(x, ids, weights), want) < 2e-6
    assert integration.explain(torch.nn.ModuleList([experts]))["0"].startswith("fused")
    with pytest.raises(moealign.InvalidInput, match=r"expected a call without gradients.*no_grad"):
        experts(x.requires_grad_(), ids, weights)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda one: setattr(one, "activation_scheme", "static"), "expected blocks of 128 x 128 .*got .*'static'"),
        (lambda one: setattr(one, "block_size", None), "expected blocks of 128 x 128 .*got block_size=None"),
        (
            lambda one: setattr(one, "gate_up_proj", torch.nn.Parameter(torch.ones(1))),
            "gate_up_proj .*got torch.float32",
        ),
        (lambda one: delattr(one, "down_proj_scale_inv"), "down_proj_scale_inv .*float32 in FP8Experts, got none"),
        (
            lambda one: setattr(one, "down_proj_scale_inv", torch.nn.Parameter(torch.ones(4, 1, 1))),
            r"down_proj_scale_inv \[\d+, 2, 1\] in FP8Experts, got \[4, 1, 1\]",
        ),
    ],
    ids=["static", "per tensor", "float32", "no scales", "scales"],
)
def test_other_fp8_experts_are_refused_with_the_way_out(change, got):
    experts, *call = fp8_experts((128, 128), hidden_size=256, moe_intermediate_size=128)
    change(experts)
    with pytest.raises(moealign.BackendUnavailable, match=rf"{got}.*; set another by .*'grouped_mm'.*dequantised"):
        experts(*call)


def test_fp8_experts_in_other_blocks_are_refused_with_the_way_out():
    experts, x, ids, _ = fp8_experts((16, 16))
    with pytest.raises(moealign.BackendUnavailable, match=r"in FP8Experts, got block_size=.16, 16.*; set another by"):
        experts(x, ids, torch.empty(5, 2))
    integration.uninstall()
    with pytest.raises(KeyError, match="not a valid experts implementation"):
        experts(x, ids, torch.empty(5, 2))


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", None)
    with pytest.raises(moealign.BackendUnavailable, match="moealign's extra 'transformers'"):
        integration.install()


# ---- capture ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_capture_records_what_was_routed_and_changes_nothing(name, tmp_path):
    eager, ours = make(name)
    for model in (eager, ours):
        want = model(TEXT).logits
        with moealign.capture(model) as seen:
            got = model(TEXT).logits
            first = seen.trace().tokens
            model(TEXT[:1])
        assert torch.equal(got, want)
        trace = seen.trace(source="nothing", revision="0")
        assert (first, trace.tokens) == (22, 33)
        assert trace.layers == (1 if name == "deepseek-v3" else 2)
        assert trace.top_k == 2
        assert torch.equal(trace.topk_ids[:, :11], trace.topk_ids[:, 22:])
        save_trace(tmp_path / "trace.safetensors", trace)
        assert torch.equal(load_trace(tmp_path / "trace.safetensors").topk_ids.int(), trace.topk_ids)
        model(TEXT)
        assert seen.trace().tokens == 33, "nothing is recorded after the block"
    other = moealign.align(trace.topk_ids[0], block_size=4, num_experts=trace.num_experts, expert_counts=True)
    assert int(other.expert_counts.sum()) == 66


def test_capture_reads_routers_that_give_scores():
    config = transformers.Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=48,
        num_local_experts=4,
        head_dim=8,
        interleave_moe_layer_step=1,
        attention_chunk_size=32,
    )
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    chosen = []
    router = model.model.layers[0].feed_forward.router
    router.register_forward_hook(lambda module, args, output: chosen.append(output[0].topk(2, 1).indices.sort().values))
    with moealign.capture(model) as seen:
        model(TEXT)
    trace = seen.trace()
    assert (trace.layers, trace.tokens, trace.top_k, trace.num_experts) == (2, 22, 2, 4)
    assert torch.equal(trace.topk_ids[0].sort(1).values, chosen[0].int())


def test_capture_says_what_is_wrong():
    with (
        pytest.raises(moealign.InvalidInput, match="expected a Mixture-of-Experts model, got Linear"),
        moealign.capture(torch.nn.Linear(2, 2)),
    ):
        pass
    _, ours = make("mixtral")
    with moealign.capture(ours) as seen:
        pass
    for asked in (seen.trace, seen.traces):
        with pytest.raises(moealign.InvalidInput, match="at least one call"):
            asked()
    with pytest.raises(moealign.InvalidInput, match="padding: expected one of drop, keep, got 'no'"):
        moealign.capture(ours, padding="no").__enter__()
    for wrong, got in ((torch.ones(3), r"\[3\]"), ([[1]], "list")):
        with pytest.raises(
            moealign.InvalidInput, match=rf"attention_mask: expected a tensor \[batch, length\], got {got}"
        ):
            moealign.capture(ours, attention_mask=wrong).__enter__()


@pytest.mark.parametrize(
    ("how", "implementation"),
    [
        *(("whole", name) for name in ("batched_mm", "grouped_mm", "moealign")),
        *((how, "moealign") for how in ("in place", "a layer", "warmed up inside")),
    ],
)
def test_capture_misses_no_call_of_a_compiled_model(how, implementation):
    _, model = make("qwen3-moe")
    model.set_experts_implementation(implementation)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if how in ("whole", "warmed up inside") else model
    if how == "in place":
        model.compile(backend="eager")
    if how == "a layer":
        model.model.layers[1].compile(backend="eager")
    with torch.no_grad():
        if how != "warmed up inside":
            want = run(TEXT).logits
            run(TEXT[:, :7])
        with moealign.capture(run) as seen:
            got = run(TEXT).logits
            run(TEXT[:, :7])
            run(TEXT[:, :4])
        assert seen.layers == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        assert seen.trace().calls == (22, 14, 8)
        after = run(TEXT).logits
    assert seen.trace().tokens == 44
    close(got, after, 1e-6)
    if how != "warmed up inside":
        close(got, want, 1e-6)


def test_blocks_of_capture_end_in_any_order_and_compiled_models_are_compiled_again():
    _, model = make("qwen3-moe")
    other = copy.deepcopy(model)
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    first, second = moealign.capture(compiled), moealign.capture(other)
    one, two = first.__enter__(), second.__enter__()
    with torch.no_grad():
        first.__exit__(None, None, None)
        compiled(TEXT), other(TEXT)
        second.__exit__(None, None, None)
        assert not graphs, "still eager inside the second block"
        compiled(TEXT)
    assert graphs
    assert (one.layers, two.trace().tokens) == ([], 22)


def test_capture_does_not_begin_inside_a_compiled_function():
    model = Calls(a=Named())

    @torch.compile(backend="eager")
    def inside(x):
        x = x + 1
        torch._dynamo.graph_break()
        with moealign.capture(model):
            return x

    with pytest.raises(moealign.InvalidInput, match="expected to begin outside a compiled function, got one that runs"):
        inside(torch.ones(2))
    assert captured(model, ("a", ids_of([0, 1]))).layers == ["a"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_capture_does_not_count_what_gradient_checkpointing_computes_again(name, reentrant):
    _, model = make(name)
    model.train()
    with moealign.capture(model) as plain:
        model(TEXT, labels=TEXT).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with moealign.capture(model) as seen:
        model(TEXT, labels=TEXT).loss.backward()
        model(TEXT[:1], labels=TEXT[:1]).loss.backward()
    assert seen.trace().calls == (22, 11)
    assert torch.equal(seen.trace().topk_ids[:, :22], plain.trace().topk_ids)


PADDED = torch.ones(2, 11, dtype=torch.long)
PADDED[0, :7] = 0


@pytest.mark.parametrize(
    "mask",
    ["long", "bool", "positional", "four dimensions", "added to scores", "given", "a model of its own"],
)
def test_capture_leaves_padding_out(mask):
    _, model = make("qwen3-moe")
    causal = torch.ones(11, 11, dtype=torch.bool).tril() & PADDED.bool()[:, None, None, :]
    call = {
        "long": lambda: model(TEXT, attention_mask=PADDED),
        "bool": lambda: model(input_ids=TEXT, attention_mask=PADDED.bool()),
        "positional": lambda: model(TEXT, PADDED),
        "four dimensions": lambda: model(TEXT, attention_mask=causal),
        "added to scores": lambda: model(TEXT, attention_mask=torch.where(causal, 0.0, -1e30)),
        "given": lambda: model(TEXT),
        "a model of its own": lambda: model.model(TEXT, attention_mask=PADDED),
    }[mask]
    given = PADDED if mask == "given" else None
    with (
        torch.no_grad(),
        moealign.capture(model, padding="keep") as all_,
        moealign.capture(model, attention_mask=given) as seen,
    ):
        call()
    assert all_.trace().tokens == 22
    assert torch.equal(seen.trace().topk_ids, all_.trace().topk_ids[:, PADDED.flatten().bool()])
    assert seen.trace().calls == (15,)


@pytest.mark.parametrize("cache", [None, "static"])
def test_capture_knows_prefill_and_decode_of_a_padded_batch(cache):
    _, model = make("mixtral")
    with moealign.capture(model) as seen:
        model.generate(TEXT, attention_mask=PADDED, max_new_tokens=4, do_sample=False, cache_implementation=cache)
    assert seen.trace().calls == (15, 2, 2, 2)


def test_capture_of_an_encoder_and_a_decoder_whose_routers_give_masks():
    config = transformers.SwitchTransformersConfig(
        vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    chosen = []
    router = next(module for module in model.encoder.modules() if type(module).__name__.endswith("Top1Router"))
    router.classifier.register_forward_hook(lambda module, args, output: chosen.append(output.argmax(-1)))
    with torch.no_grad(), moealign.capture(model) as seen:
        model(input_ids=TEXT, attention_mask=PADDED, decoder_input_ids=TEXT[:, :5])
    assert [trace.tokens for trace in seen.traces()] == [15, 10]
    (first, ids), _ = seen.topk_ids.items()
    assert first.startswith("encoder.")
    assert set(seen.num_experts.values()) == {4}
    assert torch.equal(ids[ids[:, 0] >= 0, 0], chosen[0].flatten()[PADDED.flatten().bool()][ids[:, 0] >= 0].int())
    with pytest.raises(moealign.InvalidInput, match=r"15 tokens to 1 of 4 experts in 1 calls; decoder.* traces"):
        seen.trace()


# ---- capture: modules by themselves ----------------------------------------------------------------------------------


class Named(torch.nn.Module):
    """Experts that compute nothing."""

    def __init__(self, num_experts=4):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, hidden_states, top_k_index, top_k_weights=None):
        return hidden_states


class Calls(torch.nn.Module):
    """A model that calls its experts as it is told: names and ids."""

    def __init__(self, **experts):
        super().__init__()
        for name, module in experts.items():
            setattr(self, name, module)

    def forward(self, *calls):
        for name, ids in calls:
            if name == "fail":
                raise RuntimeError("half way")
            rows = torch.zeros(*ids.shape[:-1], 3)
            getattr(self, name)(rows, ids)


def ids_of(*rows):
    return torch.tensor(rows)


def captured(model, *calls):
    """What :func:`moealign.capture` saw of one call of `model`."""
    with moealign.capture(model) as seen:
        model(*calls)
    return seen


def test_layers_of_several_kinds_give_a_trace_each():
    model = Calls(text=Named(), more=Named(), vision=Named(), large=Named(9), wide=Named())
    seen = captured(
        model,
        ("text", ids_of([0, 1], [2, 3])), ("more", ids_of([3, 1], [2, 0])), ("vision", ids_of([1, 2])),
        ("large", ids_of([8, 0], [1, 2])), ("wide", ids_of([0, 1, 2], [1, 2, 3])),
    )  # fmt: skip
    assert {name: ids.tolist() for name, ids in seen.topk_ids.items()}["vision"] == [[1, 2]]
    assert seen.num_experts["large"] == 9
    assert [trace.details["layers"] for trace in seen.traces()] == [["text", "more"], ["vision"], ["large"], ["wide"]]
    with pytest.raises(moealign.InvalidInput, match=r"text and 1 more: .*; vision and 0 more: 1 tokens .* topk_ids"):
        seen.trace()


def test_layers_that_saw_other_tokens_are_not_laid_side_by_side():
    """As many tokens, but of other calls: one layer was skipped in the first call, the other in the second."""
    model = Calls(a=Named(), b=Named())
    with moealign.capture(model) as seen:
        model(("a", ids_of([0, 1])))
        model(("b", ids_of([1, 2])))
        model(("a", ids_of([2, 3])), ("b", ids_of([3, 0])))
    assert len(seen.traces()) == 2
    assert seen.calls == {"a": (1, 1), "b": (1, 1)}


def test_a_module_that_is_used_twice_is_recorded_twice_under_its_first_name():
    shared = Named()
    model = Calls(first=shared, second=shared)
    seen = captured(model, ("first", ids_of([0, 1])), ("second", ids_of([2, 3], [1, 0])))
    assert seen.layers == ["first"]
    assert seen.trace().calls == (1, 2)
    assert seen.trace().topk_ids.tolist() == [[[0, 1], [2, 3], [1, 0]]]


def test_a_call_that_raises_leaves_nothing():
    model = Calls(a=Named(), b=Named())
    with moealign.capture(model) as seen:
        with pytest.raises(RuntimeError, match="half way"):
            model(("a", ids_of([0, 1])), ("fail", None))
        model(("a", ids_of([2, 3])), ("b", ids_of([1, 0])))
    assert seen.trace().topk_ids.tolist() == [[[2, 3]], [[1, 0]]]
    with pytest.raises(ZeroDivisionError), moealign.capture(model) as seen:
        raise ZeroDivisionError
    model(("a", ids_of([2, 3])))
    assert seen.layers == []


def test_threads_keep_their_calls_together():
    model = Calls(a=Named(16), b=Named(16))

    def work(number):
        for _ in range(20):
            model(("a", ids_of([number, 8])), ("b", ids_of([number, 9])))

    with moealign.capture(model) as seen:
        in_threads(work, 4)
    ids = seen.trace().topk_ids
    assert ids.shape == (2, 80, 2)
    assert torch.equal(ids[0, :, 0], ids[1, :, 0])


def test_blocks_may_be_nested_and_parts_captured():
    model = Calls(a=Named(), inner=Calls(b=Named()))
    with moealign.capture(model) as whole, moealign.capture(model.inner) as part:
        model(("a", ids_of([0, 1])))
        model.inner(("b", ids_of([2, 3])))
        model.a(torch.zeros(1, 3), ids_of([1, 0]))
    assert (whole.layers, part.layers) == (["a", "inner.b"], ["b"])
    assert whole.topk_ids["a"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("ids", "want"),
    [
        (ids_of([0, 4], [-1, 3]), [[0, -1], [-1, 3]]),
        (ids_of([[0, 1], [2, 3]], [[1, 0], [3, 2]]).to(torch.uint8), [[0, 1], [2, 3], [1, 0], [3, 2]]),
        (ids_of([0, 1, 0, 1], [1, 0, 0, 0]), [[1, 3], [0, -1]]),
        (ids_of([0, 1, 0, 1], [1, 0, 0, 0]).bool(), [[1, 3], [0, -1]]),
        (ids_of([1, 1], [2, 2]), [[1, 1], [2, 2]]),
    ],
    ids=["sentinels", "a batch", "a mask of integers", "a mask", "an expert twice"],
)
def test_ids_and_masks_are_understood(ids, want):
    assert captured(Calls(a=Named()), ("a", ids)).topk_ids["a"].tolist() == want


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.rand(2, 2), "InvalidType", r"expected the choice that a gets to be integer ids .* got torch.float32"),
        (torch.ones(2, 2, dtype=torch.bool), "InvalidInput", r"expected a mask \[tokens, 4\] of zeros and ones in a"),
        (ids_of([0, 5]), "InvalidInput", r"expected ids in \[0, 4\) .* got \[0, 5\] for one"),
        (ids_of([0, -2]), "InvalidInput", r"-1 or 4 for none, in a, got \[0, -2\]"),
        (ids_of([7, 0, 0, 0]), "InvalidInput", r"expected a mask \[tokens, 4\] of zeros and ones in a"),
        (ids_of([0, 1]).to("meta"), "InvalidInput", "expected ids with values in a"),
        (torch.tensor(3), "InvalidInput", r"expected ids \[tokens, k\] in a, got a single number"),
    ],
)
def test_what_is_no_choice_is_refused(ids, error, message):
    with pytest.raises(getattr(moealign, error), match=message):
        captured(Calls(a=Named()), ("a", ids))


def test_a_choice_that_is_not_of_the_tokens_is_refused():
    model = Calls(a=Named())
    fake = FakeTensorMode().from_tensor(ids_of([0, 1]))
    with moealign.capture(model), pytest.raises(moealign.InvalidInput, match="values in a, got a FakeTensor without"):
        model.a(torch.zeros(1, 3), fake)
    with moealign.capture(model) as seen:
        with pytest.raises(moealign.InvalidInput, match=r"a to get the choice of each of its 5 tokens, got .* 4"):
            model.a(torch.zeros(5, 3), ids_of(*[[0, 1]] * 4))
        with pytest.raises(moealign.InvalidType, match="got NoneType"):
            model.a(torch.zeros(5, 3), None)
    assert seen.layers == []


def test_a_mask_of_other_tokens_is_refused():
    model = Calls(a=Named())
    mask = torch.tensor([[0, 1, 1]])
    with moealign.capture(model, attention_mask=mask) as seen:
        model(("a", ids_of([0, 1], [1, 2], [2, 3])))
        with pytest.raises(moealign.InvalidInput, match=r"a to route the 1 x 3 tokens .* \[1, 3\] .* got 2 .*'keep'"):
            model(("a", ids_of([0, 1], [1, 2])))
    assert seen.topk_ids["a"].tolist() == [[1, 2], [2, 3]]


class Attends(Calls):
    """A model that takes any mask."""

    def forward(self, input_ids, attention_mask=None):
        super().forward(("a", torch.stack((input_ids, input_ids + 1), -1)))


@pytest.mark.parametrize("numbers", [torch.bool, torch.long, torch.float32])
def test_a_mask_of_attention_says_who_attends_to_itself(numbers):
    model, rows = Attends(a=Named()), torch.tensor([[0, 1, 2]])
    mask = torch.ones(3, 3, dtype=torch.bool).tril() & torch.tensor([False, True, True])
    given = torch.where(mask, 0.0, -torch.inf) if numbers is torch.float32 else mask.to(numbers)
    with moealign.capture(model) as seen:
        model(rows, attention_mask=given[None])
        model(rows, attention_mask={"sliding_attention": None, "full_attention": given[None, None]})
    assert seen.topk_ids["a"].tolist() == [[1, 2], [2, 3]] * 2


@pytest.mark.parametrize(("mask", "got"), [(torch.ones(3), r"\[3\]"), (object(), "object")])
def test_a_mask_that_does_not_tell_padding_is_refused(mask, got):
    model, rows = Attends(a=Named()), torch.tensor([[0, 1, 2]])
    with (
        moealign.capture(model),
        pytest.raises(moealign.InvalidInput, match=rf"attention_mask: .* got {got}; .*'keep'"),
    ):
        model(rows, attention_mask=mask)
    with moealign.capture(model, padding="keep") as seen:
        model(rows, attention_mask=mask)
    assert seen.trace().tokens == 3


class SomeRouter(torch.nn.Module):
    """A router whose experts tell nothing, and which returns what it is given."""

    def __init__(self, top_k=2):
        super().__init__()
        self.num_experts, self.top_k = 4, top_k

    def forward(self, *given):
        return given


def test_a_router_is_recorded_only_where_its_experts_tell_nothing():
    model = Calls(one=torch.nn.Module(), two=torch.nn.Module())
    for part, experts in ((model.one, True), (model.two, False)):
        part.mlp = torch.nn.Module()
        part.mlp.gate = torch.nn.Module()
        part.mlp.gate.router = SomeRouter()
        if experts:
            part.mlp.experts = Named()
    ids = ids_of([0, 1])
    with moealign.capture(model) as seen:
        for part in (model.one, model.two):
            part.mlp.gate.router(ids)
        model.one.mlp.experts(torch.zeros(1, 3), ids)
    assert seen.layers == ["two.mlp.gate.router", "one.mlp.experts"]


SCORES = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.1, 0.1, 0.3]])


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ((SCORES, ids_of([1, 2], [0, 3])), [[1, 2], [0, 3]]),
        ((SCORES.topk(2).indices[..., :1], SCORES), [[1, 2], [0, 3]]),
        ((torch.tensor([[0, 0.4, 0.3, 0], [0.5, 0, 0, 0.3]]), -SCORES), [[1, 2], [0, 3]]),
        ((SCORES, SCORES.log()), [[1, 2], [0, 3]]),
        ((SCORES, -SCORES), "expected .* to return its choice, or scores that it chooses by, got .* do not agree"),
        ((SCORES > 0.25,), [[1, 2], [0, 3]]),
        (((SCORES > 0.25).long(), SCORES), [[1, 2], [0, 3]]),
        ((SCORES[:, :3],), r"expected router to return ids \[tokens, k\], or a mask or scores \[tokens, 4\]"),
        ((ids_of([1, 1], [0, 3]),), "expected different ids"),
    ],
    ids=[
        "ids", "ids of another width", "sparse scores", "scores and logits", "scores that disagree", "a mask",
        "a mask of integers", "nothing", "positions",
    ],
)  # fmt: skip
def test_what_a_router_returns_is_understood_or_refused(given, want):
    model = torch.nn.Sequential()
    model.router = SomeRouter()
    refused = (
        pytest.raises((moealign.InvalidInput, moealign.InvalidType), match=want) if isinstance(want, str) else None
    )
    with moealign.capture(model) as seen, refused or contextlib.nullcontext():
        model.router(*given)
    if refused is None:
        assert seen.topk_ids["router"].tolist() == want


def test_scores_that_a_bias_shifts_are_refused():
    model = torch.nn.Sequential()
    model.router = SomeRouter()
    model.router.register_buffer("e_score_correction_bias", torch.zeros(4))
    with (
        moealign.capture(model),
        pytest.raises(moealign.InvalidType, match="choice that e_score_correction_bias shift"),
    ):
        model.router(SCORES)


# ---- routers ---------------------------------------------------------------------------------------------------------


def routers_of(model):
    return [module for module in model.modules() if type(module).__name__.endswith(("TopKRouter", "TopkRouter"))]


@pytest.mark.parametrize("name", CONFIGS)
def test_routers_choose_by_the_kernel_and_logits_stay(name):
    eager, ours = make(name)
    layers = len(routers_of(ours))
    assert layers > 0
    count = integration.replace_routers(ours)
    assert (count, count.reasons) == (layers, {})
    again = integration.replace_routers(ours)  # twice is as good as once
    assert again == 0
    assert set(again.reasons.values()) == {"it is replaced already"}
    with torch.no_grad():
        want, got = eager(TEXT).logits, ours(TEXT).logits
        again = copy.deepcopy(ours)(TEXT).logits
    close(got, want, 1e-6)
    assert torch.equal(again, got)
    assert integration.restore_routers(ours) == layers
    assert not any("forward" in vars(module) for module in ours.modules())


def test_training_through_a_replaced_router():
    eager, ours = make("qwen3-moe")
    integration.replace_routers(ours)
    for model in (eager, ours):
        model.train()
        model(TEXT, labels=TEXT, output_router_logits=True).loss.backward()  # with the auxiliary loss
    close_gradients(ours, eager, 1e-5)


ROWS = torch.randn(40, 32, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def runs(monkeypatch):
    """The plans that were run, one after the other."""
    ran, run = [], router_forms.RouterForm.run
    monkeypatch.setattr(router_forms.RouterForm, "run", lambda self, *args: ran.append(self) or run(self, *args))
    return ran


# Every router of Transformers that computes one of the forms, by its module and class; each is made small.
ROUTERS = [
    ("afmoe", "AfmoeTokenChoiceRouter"), ("aria", "AriaTextTopKRouter"), ("axk1", "AXK1TopkRouter"),
    ("bailing_hybrid", "BailingHybridTopkRouter"), ("beam", "BeamTopKRouter"),
    ("cohere2_moe", "Cohere2MoeTopKRouter"), ("deepseek_v2", "DeepseekV2TopkRouter"),
    ("deepseek_v3", "DeepseekV3TopkRouter"), ("deepseek_v32", "DeepseekV32TopkRouter"), ("dots1", "Dots1TopkRouter"),
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter"), ("ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter"),
    ("exaone_moe", "ExaoneMoeTopkRouter"), ("flex_olmo", "FlexOlmoTopKRouter"), ("flint", "FlintTopKRouter"),
    ("glm4_moe", "Glm4MoeTopkRouter"), ("glm4_moe_lite", "Glm4MoeLiteTopkRouter"),
    ("glm4v_moe", "Glm4vMoeTextTopkRouter"), ("glm_moe_dsa", "GlmMoeDsaTopkRouter"), ("gpt_oss", "GptOssTopKRouter"),
    ("granitemoe", "GraniteMoeTopKRouter"), ("granitemoehybrid", "GraniteMoeHybridTopKRouter"),
    ("granitemoeshared", "GraniteMoeSharedTopKRouter"), ("hunyuan_v1_moe", "HunYuanMoEV1Gate"),
    ("hy_v3", "HYV3TopKRouter"), ("jamba", "JambaTopKRouter"), ("kimi_linear", "KimiLinearTopkRouter"),
    ("laguna", "LagunaTopKRouter"), ("lara_mini", "LaraMiniTopKRouter"),
    ("longcat_flash", "LongcatFlashTopkRouter"), ("mellum", "MellumTopKRouter"),
    ("mimo_v2_flash", "MiMoV2FlashTopkRouter"), ("minimax", "MiniMaxTopKRouter"),
    ("minimax_m2", "MiniMaxM2TopKRouter"), ("minimax_m3_vl", "MiniMaxM3VLTopKRouter"),
    ("mistral_large4", "MistralLarge4TextTopkRouter"), ("mixtral", "MixtralTopKRouter"),
    ("nemotron_h", "NemotronHTopkRouter"), ("olmoe", "OlmoeTopKRouter"),
    ("openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter"), ("qwen2_moe", "Qwen2MoeTopKRouter"),
    ("qwen3_5_moe", "Qwen3_5MoeTopKRouter"), ("qwen3_moe", "Qwen3MoeTopKRouter"),
    ("qwen3_next", "Qwen3NextTopKRouter"), ("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter"),
    ("solar_open", "SolarOpenTopkRouter"), ("step3p7", "Step3p7TopKRouter"),
]  # fmt: skip


class Sizes:
    """Whatever a router asks its configuration for."""

    hidden_size = width = hidden_dim = emb_dim = 32
    num_experts = num_local_experts = n_routed_experts = moe_num_experts = num_routed_experts = 16
    num_experts_per_tok = top_k = moe_topk = num_experts_per_token = moe_k = experts_per_token = moe_top_k = 3
    n_group = num_expert_group = num_expert_groups = num_group = 4
    topk_group = num_limited_groups = 2
    norm_topk_prob = True
    routed_scaling_factor = moe_router_scaling_factor = router_scaling_factor = route_scale = 2.5
    router_logit_softcapping = moe_router_logit_softcapping = 0.0
    moe_norm_min, zero_expert_num = 1e-12, 2
    expert_selection_fn, topk_method, scoring_func = "softmax", "group_limited_greedy", "sigmoid"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def router_of(module, name, dtype=torch.float32):
    try:
        home = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name])
        made = getattr(home, name)(Sizes()).to(dtype).eval()
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this Transformers has no {name}: {error}")
    generator = torch.Generator().manual_seed(5)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return made


def asked(router, rows):
    """What the router gets: some want the rows of a batch, or a bias besides."""
    bias = torch.linspace(-0.3, 0.3, 16)
    name = type(router).__name__
    if name == "AfmoeTokenChoiceRouter":
        return rows[None], bias
    return (rows, bias) if name in ("HYV3TopKRouter", "MiniMaxM2TopKRouter") else (rows,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("module", "name"), ROUTERS, ids=[name for _, name in ROUTERS])
def test_every_router_of_a_known_form_is_replaced(module, name, dtype, runs):
    router = router_of(module, name, dtype)
    rows = ROWS.to(dtype)
    with torch.no_grad():
        want = router(*asked(router, rows))
        if not isinstance(want, tuple) or len(want) != 3:
            pytest.skip(f"this Transformers' {name} does not return logits, weights and ids")
        count = integration.replace_routers(torch.nn.Sequential(router))
        assert count == 1, count.reasons
        runs.clear()
        got = router(*asked(router, rows))
    assert len(runs) == 1, "it is the kernel that chose"
    equal_choices(got, want)


@pytest.mark.parametrize(
    ("module", "name", "form"),
    [
        ("deepseek_v4", "DeepseekV4TopKRouter", {"scoring": "sqrtsoftplus", "zero_bias": False, "num_groups": 1}),
        ("mistral4", "Mistral4TopkRouter", {"scoring": "softmax", "zero_bias": True, "num_groups": 4}),
    ],
)
def test_a_router_that_scores_in_the_model_s_precision_is_replaced_in_float32(module, name, form, runs, monkeypatch):
    monkeypatch.setattr(Sizes, "scoring_func", "sqrtsoftplus")
    router = router_of(module, name)
    with torch.no_grad():
        want = router(ROWS)
        assert integration.replace_routers(router) == 1
        runs.clear()
        equal_choices(router(ROWS), want)
    assert {each: getattr(runs[0], each) for each in form} == form
    with pytest.warns(UserWarning, match=r"expected scores in float32, got torch.bfloat16"):
        assert integration.replace_routers(router_of(module, name, torch.bfloat16)) == 0


def equal_choices(got, want):
    """The same dtypes and logits, and to each token the same experts with the same weights, in any order."""
    assert [(each.dtype, each.shape) for each in got] == [(each.dtype, each.shape) for each in want]
    if not want[0].is_floating_point():  # ids first, logits last
        got, want = got[::-1], want[::-1]
    assert torch.equal(got[0], want[0])
    most = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[want[1].dtype]
    order, ours = (each[2].argsort(1) for each in (want, got))
    torch.testing.assert_close(
        got[1].gather(1, ours).float(), want[1].gather(1, order).float(), rtol=most, atol=most / 4
    )
    assert torch.equal(got[2].gather(1, ours), want[2].gather(1, order))


class Chooser(torch.nn.Module):
    """A router of a user's own, with names of its own."""

    def __init__(self, kind="softmax"):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.matrix = torch.nn.Parameter(torch.randn(16, 32, generator=generator) / 4)
        self.register_buffer("shift", torch.randn(16, generator=generator) / 4)
        self.how_many, self.kind, self.factor = 3, kind, 1.5

    def forward(self, x):
        scores = torch.nn.functional.linear(x, self.matrix)
        probabilities = scores.float().softmax(-1) if "softmax" in self.kind else scores.float().sigmoid()
        if "softplus" in self.kind:
            probabilities = torch.nn.functional.softplus(scores.float())
        if "sqrt" in self.kind:
            probabilities = probabilities.sqrt()
        if "shifted" in self.kind:
            ids = (probabilities + self.shift).topk(self.how_many).indices
            values = probabilities.gather(-1, ids)
        else:
            values, ids = probabilities.topk(self.how_many, dim=-1)
        if self.kind == "root":
            values = values.sqrt()
        if self.kind == "noise" and self.training:
            values = values + torch.rand_like(values)
        if self.kind == "least":
            values, ids = probabilities.topk(self.how_many, dim=-1, largest=False)
        if self.kind == "of others":
            values = values.flip(-1)
        if self.kind == "flat":
            values = values / (values.sum(-1, keepdim=True) + 1e-2)
        if self.kind == "bent":
            scores = scores * 1.0001
        return scores, values * self.factor, ids


class Other(Chooser):
    """A subclass with the same forward."""


KNOWN = ["softmax", "sigmoid", "shifted", "noise", "shifted softmax", "sqrtsoftplus", "shifted sqrtsoftplus"]


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("router", [Chooser, Other])
def test_a_router_of_any_class_and_names_is_replaced(router, kind, runs):
    module = router(kind).eval()
    want = module(ROWS)
    assert integration.replace_routers(module) == 1
    runs.clear()
    equal_choices(module(ROWS), want)
    assert len(runs) == 1
    module.train()
    module(ROWS)
    assert len(runs) == (1 if kind == "noise" else 2), "noise that training adds is its own forward's"


@pytest.mark.parametrize("kind", ["root", "least", "of others", "flat", "bent", "softplus", "sqrt"])
def test_a_router_that_computes_something_else_is_left_alone_with_a_reason(kind):
    module = torch.nn.Sequential(Chooser(kind))
    with pytest.warns(UserWarning, match=r"expected a router that moealign.route can stand for .* got 0: expected"):
        count = integration.replace_routers(module)
    assert count == 0
    assert list(count.reasons) == ["0"]
    assert "forward" not in vars(module[0])


class HashRouter(torch.nn.Module):
    """Chooses by the token's id, as the first layers of DeepSeek-V4 do."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 32))
        self.register_buffer("tid2eid", torch.randint(0, 16, (100, 4)))

    def forward(self, hidden_states, input_ids):
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        ids = self.tid2eid[input_ids.reshape(-1)]
        return logits, logits.softmax(-1).gather(1, ids), ids


def test_a_router_of_other_arguments_is_left_alone_and_the_reason_names_them():
    with pytest.warns(UserWarning, match="moealign.route can stand for"):
        count = integration.replace_routers(torch.nn.Sequential(HashRouter()))
    assert count == 0
    assert count.reasons["0"].startswith("its forward did not run with random rows and a bias as its input_ids (")


class Sparse(torch.nn.Module):
    """Attention that looks at the best tokens: no router."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(32, 32)

    def forward(self, hidden_states, cos, sin):
        return self.proj(hidden_states).topk(4).indices


class Decorated(Chooser):
    """A router whose forward is wrapped by a decorator."""

    @torch.inference_mode(False)
    def forward(self, x):
        return super().forward(x)


class Cut(Chooser):
    """A router whose weights pass no gradient on."""

    def forward(self, x):
        scores, values, ids = super().forward(x)
        return scores, values.detach(), ids


class Halved(Chooser):
    """A router through whose rows half of the gradient goes."""

    def forward(self, x):
        scores, values, ids = super().forward(x)
        return scores, Half.apply(values), ids


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (Cut, "expected its forward to pass a gradient on, got none"),
        (Halved, "expected the gradient of moealign.route"),
    ],
)
def test_a_router_with_a_gradient_of_its_own_is_left_alone(router, message):
    with torch.inference_mode(), pytest.warns(UserWarning, match=message):
        assert integration.replace_routers(router()) == 0


def test_only_what_routes_is_looked_at():
    model = torch.nn.ModuleDict({"sparse": Sparse(), "router": Decorated(), "plain": torch.nn.Linear(32, 16)})
    count = integration.replace_routers(model)
    assert (count, count.reasons) == (1, {})
    assert "forward" in vars(model["router"])


def test_where_nothing_is_replaced_a_warning_says_why():
    with pytest.warns(UserWarning, match="in Linear, got no module that routes by itself"):
        assert integration.replace_routers(torch.nn.Linear(2, 2)) == 0
    double = Chooser().double()
    with pytest.warns(UserWarning, match="Chooser: InvalidType: router_logits: expected float32, bfloat16 or float16"):
        integration.replace_routers(double)
    wrapped = Chooser()
    wrapped.forward = lambda rows: Chooser.forward(wrapped, rows)
    with pytest.warns(UserWarning, match="its forward is another library's; replace routers before it is wrapped"):
        integration.replace_routers(wrapped)


@pytest.mark.parametrize(
    ("change", "value"), [("how_many", 2), ("factor", 3.0), ("kind", "sigmoid"), ("kind", "root"), ("kind", "shifted")]
)
def test_a_replaced_router_follows_later_changes(change, value):
    module, own = Chooser(), Chooser()
    integration.replace_routers(module)
    for each in (module, own):
        setattr(each, change, value)
    equal_choices(module(ROWS), own(ROWS))
    module.shift.add_(1), own.shift.add_(1)
    module.matrix.data.mul_(2), own.matrix.data.mul_(2)
    equal_choices(module(ROWS), own(ROWS))


def test_a_replaced_router_is_converted_copied_pickled_and_compiled(runs):
    module = Chooser("shifted")
    integration.replace_routers(module)
    runs.clear()
    for number, each in enumerate((copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module), 1):
        equal_choices(each(ROWS), Chooser.forward(each, ROWS))
        assert len(runs) == number
    assert each.state_dict().keys() == Chooser().state_dict().keys()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module.to(dtype)
        runs.clear()
        got, want = module(ROWS.to(dtype)), Chooser.forward(module, ROWS.to(dtype))
        assert len(runs) >= 1
        assert [each.dtype for each in got] == [each.dtype for each in want]
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(module, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    with torch.no_grad():
        equal_choices(compiled(ROWS), Chooser.forward(module, ROWS))
        module.how_many = 2
        equal_choices(compiled(ROWS), Chooser.forward(module, ROWS))
    assert "moealign.route" in graphs[0].code
    with torch.autocast("cpu", torch.bfloat16):
        equal_choices(module(ROWS), Chooser.forward(module, ROWS))
    module.to("meta")
    assert [each.shape for each in module(ROWS.to("meta"))] == [(40, 16), (40, 2), (40, 2)]


def test_a_replaced_router_inside_transforms_of_torch_func():
    module, own = Chooser(), Chooser()
    with torch.device("meta"):  # what the context makes is not what recognises
        assert integration.replace_routers(module) == 1

    def total(router):
        return lambda rows: router(rows)[1].square().sum()

    for transform in (
        lambda router: torch.func.grad(total(router))(ROWS),
        lambda router: torch.vmap(total(router))(ROWS[None]),
        lambda router: torch.func.jvp(total(router), (ROWS,), (ROWS,))[1],
    ):
        torch.testing.assert_close(transform(module), transform(own), rtol=1e-4, atol=1e-5)


def test_a_router_under_accelerate_s_hooks_is_replaced(runs):
    hooks = pytest.importorskip("accelerate.hooks")
    module = Chooser()
    want = module(ROWS)

    class Doubled(hooks.ModelHook):
        def pre_forward(self, module, rows):
            return (rows * 2,), {}

    hooks.add_hook_to_module(module, Doubled())
    assert integration.replace_routers(module) == 1
    runs.clear()
    equal_choices(module(ROWS / 2), want)
    assert len(runs) == 1
    assert integration.restore_routers(module) == 1
    equal_choices(module(ROWS / 2), want)
    assert len(runs) == 1
    integration.replace_routers(module)
    hooks.remove_hook_from_module(module)
    equal_choices(module(ROWS), want)
    assert integration.restore_routers(module) == 1
    equal_choices(module(ROWS), want)


def test_a_router_under_fsdp_is_replaced(tmp_path, runs):
    """Its parameters are shards when it is replaced, and whole when it runs."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    want = Chooser()(ROWS)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for before in (True, False):
            module = Chooser()
            if before:
                integration.replace_routers(module)
            fsdp.fully_shard(module, mesh=mesh)
            assert integration.replace_routers(module) == (0 if before else 1)
            runs.clear()
            got = module(ROWS)
            equal_choices(got, want)
            assert len(runs) >= 1
            got[1].sum().backward()
            assert module.matrix.grad is not None
    finally:
        dist.destroy_process_group()
