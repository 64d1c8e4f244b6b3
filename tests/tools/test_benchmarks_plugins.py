"""What benchmarks/plugins.py compares and how, without a GPU and without vLLM."""

from __future__ import annotations

import types

import plugins
import pytest
import torch
from cases.experts import expert_loop

from moealign.integrations import vllm as drop_in
from moealign.integrations import vllm_ops

SIZE = (9, 2, 8, 4)  # tokens, top_k, num_experts, block size


def case_of(**named):
    torch.manual_seed(0)
    inputs = [torch.rand(SIZE[0], SIZE[2]).topk(SIZE[1]).indices.int() for _ in range(2)]
    return plugins.bench.Case("plugin", "case", SIZE, inputs, **named)


@pytest.mark.parametrize("mapped", [False, True])
def test_alignments_are_compared_with_the_oracle(mapped):
    expert_map = torch.tensor([0, -1, -1, -1, 1, -1, -1, -1], dtype=torch.int32) if mapped else None
    case = case_of(expert_map=expert_map, ignore=True)
    candidate = plugins.align_candidate(plugins.OURS, drop_in._align, case)
    for slot in (0, 1):
        candidate.call(slot)
        assert candidate.check(slot) is None
    assert candidate.check(0) is not None, "the latest result is that of slot 1"


def test_each_adapter_is_compared_with_the_oracle():
    mapping = torch.arange(SIZE[0], dtype=torch.int32) % plugins.ADAPTERS
    candidate = plugins.lora_candidate(plugins.OURS, vllm_ops.align_lora, case_of(), mapping)
    for slot in (0, 1):
        candidate.poison(slot)
        assert "adapter 0" in candidate.check(slot)
        candidate.call(slot)
        assert candidate.check(slot) is None
    candidate.buffers[0][0].view(plugins.ADAPTERS, -1)[3, 0] = SIZE[0] * SIZE[1]  # a route lost
    assert "adapter 3" in candidate.check(0)


def test_layers_are_compared_with_float64_and_with_each_other():
    torch.manual_seed(0)
    tokens, top_k, experts, hidden, inner = 3, 2, 4, 8, 6
    gate_up, down = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    layer = plugins.experts.Layer((experts, top_k, hidden, inner), tokens, [gate_up, down])
    for _ in range(2):
        scores, ids = torch.rand(tokens, experts).topk(top_k)
        layer.inputs.append((torch.randn(tokens, hidden), scores, ids.int()))
    layer.reference = lambda: ([0, 1, 2], right(*layer.inputs[0]).double())

    def right(x, weights, ids):
        return expert_loop(x, gate_up, down, weights, ids)

    fused = types.SimpleNamespace()
    fused.fused_experts = lambda x, w1, w2, weights, ids: right(x, weights, ids) * fused.moe_align_block_size()
    scales = {"": lambda: 1.0, "little": lambda: 1.00001, "much": lambda: 2.0}
    for ours, message in (("", None), ("little", "expected the bits"), ("much", "relative error")):
        functions = {plugins.VLLM: scales[""], plugins.OURS: scales[ours]}
        for candidate in plugins.layer_candidates(functions, fused, layer):
            candidate.call(0)
            wrong = candidate.check(0)
            assert wrong is None if candidate.impl == plugins.VLLM or message is None else message in wrong
    candidate.call(1)
    with pytest.raises(KeyError):
        candidate.check(1)  # nothing to compare with yet


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine can run it")
    assert plugins.main([]) == 2
    assert "found none" in capsys.readouterr().out
