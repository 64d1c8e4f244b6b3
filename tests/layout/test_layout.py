"""BlockLayout as an object: immutable, short to print, and movable like a tensor."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch.utils import _pytree

import moealign
from moealign import BlockLayout, align, align_batched
from moealign.layout import EXTRAS, OUTPUTS, frozen

IDS = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])


def same(one: BlockLayout, other: BlockLayout) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in OUTPUTS]
    tensors = all(a is b is None or torch.equal(a, b) for a, b in pairs)
    return tensors and (one.block_size, one.num_experts, one.num_routes) == (
        other.block_size,
        other.num_experts,
        other.num_routes,
    )


@pytest.fixture(params=[(), ("positions",), EXTRAS], ids=["required", "one more", "all"])
def layout(request):
    return align(IDS, block_size=4, num_experts=5, **dict.fromkeys(request.param, True))


def test_it_is_immutable(layout):
    for name in (*OUTPUTS, "block_size", "something"):
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError, AttributeError)):
            setattr(layout, name, 3)
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError, AttributeError)):
        del layout.expert_ids


def test_it_prints_sizes_and_no_values():
    layout = align(IDS, block_size=4, num_experts=5, positions=True)
    want = "BlockLayout(block_size=4, num_experts=5, num_routes=12, rows=27, blocks=7, device='cpu', positions)"
    assert repr(layout) == want
    batched = align_batched(torch.tensor([3, 1]), max_tokens_per_batch=4, block_size=4)
    assert repr(batched) == "BlockLayout(block_size=4, num_experts=2, num_routes=8, rows=8, blocks=2, device='cpu')"


def test_copies_hold_the_same_and_share_nothing(layout):
    buffer = io.BytesIO()
    torch.save(layout, buffer)
    buffer.seek(0)
    leaves, spec = _pytree.tree_flatten(layout)
    copies = {
        "clone": layout.clone(),
        "deepcopy": copy.deepcopy(layout),
        "pickle": pickle.loads(pickle.dumps(layout)),
        "torch.load": torch.load(buffer, weights_only=True),
        "pytree": _pytree.tree_unflatten([x.clone() if isinstance(x, torch.Tensor) else x for x in leaves], spec),
    }
    for name, each in copies.items():
        assert type(each) is BlockLayout, name
        assert same(each, layout), name
        assert each.sorted_token_ids.data_ptr() != layout.sorted_token_ids.data_ptr(), name
        with pytest.raises(dataclasses.FrozenInstanceError):
            each.block_size = 3


def test_it_moves_like_a_tensor(layout):
    assert layout.device == torch.device("cpu")
    assert layout.to("meta").device.type == "meta"
    assert layout.cpu().sorted_token_ids is layout.sorted_token_ids
    if torch.cuda.is_available():
        there = layout.to("cuda")
        assert there.device.type == "cuda"
        assert same(there.cpu(), layout)


def test_the_fast_constructor_is_the_constructor(layout):
    values = [getattr(layout, each.name) for each in dataclasses.fields(BlockLayout)]
    made = frozen(*values)
    assert type(made) is BlockLayout
    assert all(getattr(made, each.name) is value for each, value in zip(dataclasses.fields(made), values, strict=True))


def test_it_is_made_and_used_inside_compiled_code():
    def function(ids):
        layout = align(ids, block_size=4, num_experts=5, positions=True)
        return layout.clone(), layout.to("cpu").positions + 1

    clone, positions = torch.compile(function, backend="eager", fullgraph=True)(IDS)
    want = align(IDS, block_size=4, num_experts=5, positions=True)
    assert same(clone, want)
    assert torch.equal(positions, want.positions + 1)


def test_a_router_s_results_have_names():
    result = moealign.route(torch.randn(4, 8), 2, block_size=4, positions=True)
    weights, ids, layout = result
    assert (result.topk_weights, result.topk_ids, result.layout) == (weights, ids, layout)
    assert layout.positions is not None
    with_mean = moealign.route(torch.randn(4, 8), 2, block_size=4, mean_probability=True)
    assert with_mean.mean_probability is with_mean[3]
    with pytest.raises(TypeError, match="position"):
        moealign.route(torch.randn(4, 8), 2, block_size=4, position=True)
