"""The torch.library operators: opcheck, torch.compile and torch.export with dynamic token counts."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import moealign
from moealign import align, align_batched, batched_moe_align_block_size, capacity, modes, moe_align_block_size
from moealign.layout import EXTRAS
from moealign.testing import assert_same_layout, oracle_align

IDS = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, -1], [1, 2, 3]])
MAP = torch.tensor([0, -1, 1, 2, -1], dtype=torch.int32)
VALID = torch.tensor([3], dtype=torch.int32)
COUNTS = torch.tensor([2, 3, 0, 6, 8])


def named(extras=EXTRAS):
    room = capacity(12, block_size=4, num_experts=5)
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *extras)
    shapes = {name: (12, 1) if name == "scatter_idx" else (getattr(room, name),) for name in names}
    return {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("operator", "args", "kwargs"),
    [
        ("align", (IDS, 4, 5), {}),
        ("align", (IDS, 4, 5, MAP, True, True, VALID, ",".join(EXTRAS)), {}),
        ("align", (IDS, 4, 5, None, False, False, None, "positions", "reference"), {}),
        ("align.out", (IDS, 4, 5), named(())),
        ("align.out", (IDS, 4, 5, MAP, False, True, VALID, torch.zeros(1, dtype=torch.int32)), named()),
        ("align_batched", (COUNTS, 8, 4, "positions,block_rows"), {}),
    ],
)
def test_opcheck(operator, args, kwargs):
    name, _, overload = operator.partition(".")
    packet = getattr(torch.ops.moealign, name)
    torch.library.opcheck(getattr(packet, overload or "default"), args, kwargs)


def through_everything(ids, counts):
    layout = align(ids, block_size=4, num_experts=5, positions=True, expert_counts=True)
    sorted_ids, owners, total = moe_align_block_size(ids, 4, 5, pad_sorted_ids=True)
    batched = batched_moe_align_block_size(8, 4, counts)
    return layout, sorted_ids + 1, owners, total, batched[0] * 2


def same(a, b):
    flat_a, flat_b = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    assert len(flat_a) == len(flat_b)
    assert all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(flat_a, flat_b, strict=True)
    )


@pytest.mark.parametrize("engine", ["counted", "inductor"])
def test_compile_without_a_new_graph_for_each_size(engine):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(through_everything, fullgraph=True, backend=counter if engine == "counted" else engine)
    for tokens in (4, 7, 9, 30, 33, 2):
        ids = torch.randint(-1, 5, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
        counts = torch.arange(tokens) % 9
        same(compiled(ids, counts), through_everything(ids, counts))
    if engine == "counted":
        assert counter.frame_count <= 2, "once for the first size, once for all others"


def test_compile_with_buffers_and_an_error_word():
    torch._dynamo.reset()

    def fill(ids, out, word):
        align(ids, block_size=4, num_experts=5, positions=True, out=out, error_word=word)
        align(ids, block_size=4, num_experts=4, error_word=word)
        return out["positions"] + 0

    out, word = named(("positions",)), moealign.new_error_word("cpu")
    got = torch.compile(fill, fullgraph=True, backend="aot_eager")(IDS, out, word)
    expected = oracle_align(IDS, block_size=4, num_experts=5)
    assert_same_layout(out, expected)
    assert got.tolist() == expected["positions"]
    assert word.item() == 1


def test_export_with_a_dynamic_number_of_tokens(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, ids):
            return align(ids, block_size=4, num_experts=5, positions=True)

    tokens = torch.export.Dim("tokens", min=2, max=2**20)
    program = torch.export.export(Layer(), (IDS,), dynamic_shapes=({0: tokens},))
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for count in (2, 5, 77):
        ids = torch.randint(-1, 5, (count, 3))
        layout = loaded(ids)
        assert isinstance(layout, moealign.BlockLayout)
        assert_same_layout(layout, oracle_align(ids, block_size=4, num_experts=5))


def test_fake_and_meta_tensors_give_the_sizes():
    room = capacity(12, block_size=4, num_experts=5)
    with FakeTensorMode() as mode:
        layout = align(mode.from_tensor(IDS), block_size=4, num_experts=5, block_rows=True, scatter_idx=True)
        batched = align_batched(mode.from_tensor(COUNTS), max_tokens_per_batch=8, block_size=4)
    assert layout.sorted_token_ids.shape == (room.sorted_token_ids,)
    assert layout.block_rows.shape == (room.block_rows,)
    assert layout.scatter_idx.shape == (12, 1)
    assert batched.sorted_token_ids.shape == (40,)
    layout = align(IDS.to("meta"), block_size=4, num_experts=5)
    assert layout.sorted_token_ids.is_meta
    assert layout.sorted_token_ids.shape == (room.sorted_token_ids,)


def test_a_parameter_and_a_plain_subclass_are_ordinary():
    class Plain(torch.Tensor):
        pass

    for ids in (IDS.as_subclass(Plain), torch.nn.Parameter(IDS, requires_grad=False)):
        assert_same_layout(align(ids, block_size=4, num_experts=5), oracle_align(IDS, block_size=4, num_experts=5))


def test_eager_calls_do_not_pass_through_the_operator(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("an eager call went through an operator")

    monkeypatch.setattr(modes, "call", refused)
    align(IDS, block_size=4, num_experts=5)
    moe_align_block_size(IDS, 4, 5)
    batched_moe_align_block_size(8, 4, COUNTS)
    moealign.route(torch.randn(3, 5), 2, block_size=4)


def test_unknown_extras_of_the_operator_are_refused():
    with pytest.raises(moealign.InvalidInput, match=r"extras: expected names among .*got 'position'"):
        torch.ops.moealign.align(IDS, 4, 5, None, False, False, None, "position")
