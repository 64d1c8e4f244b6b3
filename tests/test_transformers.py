"""Transformers' models through moealign, small and random, against their own eager experts."""

from __future__ import annotations

import copy

import pytest
import torch

import moealign
from moealign.backends import packed
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
    theirs = dict(eager.named_parameters())
    for key, parameter in ours.named_parameters():
        if theirs[key].grad is None:
            assert parameter.grad is None, key
        else:
            close(parameter.grad, theirs[key].grad, 1e-6)


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
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 12, generator=generator)
    weights = torch.rand(9, 2, generator=generator)
    ids = torch.randint(0, 5, (9, 2), generator=generator)
    close(module(x, ids, weights), moe.batched_mm_experts_forward(module, x, ids, weights), 1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_sentinel_of_expert_parallelism_is_dropped(name):
    """Masked routing writes the number of local experts, and a weight of zero."""
    module = experts_of(**LAYOUTS[name])
    x, weights = torch.randn(6, 12), torch.rand(6, 2)
    ids = torch.randint(0, 5, (6, 2))
    foreign = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [0, 0], [1, 0]], dtype=torch.bool)
    want = moe.batched_mm_experts_forward(module, x, ids, weights.masked_fill(foreign, 0))
    ids, weights = ids.masked_fill(foreign, 5), weights.masked_fill(foreign, 0)
    close(module(x, ids, weights), want, 1e-6)
    assert not module(x, ids, weights)[2].any()
    dispatched = module(x[:1], torch.tensor([[5]]), torch.ones(1, 1))  # an empty rank's dummy row
    assert not dispatched.any()


def test_an_own_gate_or_norm_is_called():
    module = experts_of()
    ids, weights, x = torch.randint(0, 5, (6, 2)), torch.rand(6, 2), torch.randn(6, 12)
    plain = module(x, ids, weights)
    module._apply_gate = lambda rows: torch.tanh(rows[:, :8]) * rows[:, 8:]  # of this object alone
    assert not torch.allclose(module(x, ids, weights), plain)
    close(module(x, ids, weights), moe.batched_mm_experts_forward(module, x, ids, weights), 1e-6)
    del module._apply_gate
    module.has_post_expert_norm, module.post_expert_norm = True, lambda rows: 2 * rows
    close(module(x, ids, weights), 2 * plain, 1e-6)
    module._apply_post_norm = lambda rows: 3 * rows
    close(module(x, ids, weights), 3 * plain, 1e-6)


def test_an_activation_that_is_not_known_is_called():
    module = experts_of()
    module.act_fn = torch.nn.Softplus()
    ids, weights, x = torch.randint(0, 5, (6, 2)), torch.rand(6, 2), torch.randn(6, 12)
    close(module(x, ids, weights), moe.batched_mm_experts_forward(module, x, ids, weights), 1e-6)


def test_every_named_activation_is_what_it_is_called():
    from transformers.activations import ACT2CLS, ACT2FN

    known = 0
    for name in ACT2CLS:
        function = ACT2FN[name]
        said = integration._NAMED.get(type(function).__name__)
        if said is None:
            continue
        known += 1
        rows = torch.linspace(-4, 4, 50)
        if integration._activation(type("M", (), {"act_fn": function})(), False) is not function:
            close(packed.ACTIVATIONS[said, False](rows), function(rows), 1e-6)
    assert known >= 5


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", None)
    with pytest.raises(moealign.BackendUnavailable, match=r"moealign\[transformers\]"):
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
    with pytest.raises(moealign.InvalidInput, match="at least one call"):
        seen.trace()


# ---- routers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_routers_choose_by_the_kernel_and_logits_stay(name):
    eager, ours = make(name)
    layers = sum(type(module).__name__ in integration._ROUTERS for module in ours.modules())
    assert layers > 0
    assert integration.replace_routers(ours) == layers
    assert integration.replace_routers(ours) == 0  # twice is as good as once
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
        model(TEXT, labels=TEXT).loss.backward()
    for (name, theirs), (_, mine) in zip(eager.named_parameters(), ours.named_parameters(), strict=True):
        if "gate.weight" in name:
            close(mine.grad, theirs.grad, 1e-5)


def test_a_router_that_chooses_otherwise_is_left_alone():
    _, ours = make("qwen3-moe")

    class Qwen3MoeTopKRouter(torch.nn.Module):
        def __init__(self, other):
            super().__init__()
            self.__dict__.update(other.__dict__)

        def forward(self, hidden_states):
            logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
            values, ids = torch.topk(-logits, self.top_k, dim=-1)
            return logits, values, ids

    mlp = ours.model.layers[0].mlp
    mlp.gate = Qwen3MoeTopKRouter(mlp.gate)
    assert integration.replace_routers(ours) == 1  # the other layer's
    assert "forward" not in vars(mlp.gate)
