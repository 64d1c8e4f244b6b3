"""Every backend against the plain-loop oracle, element for element, on buffers poisoned with two different values."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import POISONS, SIGNED, UNSIGNED, draw, in_threads

import moealign
from moealign import (
    align,
    align_batched,
    batched_moe_align_block_size,
    capacity,
    capacity_batched,
    moe_align_block_size,
)
from moealign.backend import TABLE, load
from moealign.calls import prepared
from moealign.layout import EXTRAS
from moealign.testing import assert_same_layout, check_backend, oracle_align, oracle_align_batched, poisoned


def verify(place, ids, *, block_size, num_experts, extras=EXTRAS, error=None, **call):
    """One call under each poison, all extras, against the oracle; also the error word."""
    name, device = place
    if call.get("expert_map") is not None and not call.get("ignore_invalid_experts"):
        extras = tuple(extra for extra in extras if extra != "scatter_idx")
    sizes = {"block_size": block_size, "num_experts": num_experts}
    expected = oracle_align(ids, **sizes, **call)
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    room = capacity(ids.numel(), **sizes, pad_sorted_ids=call.get("pad_sorted_ids", False))
    on_device = keep_strides(ids, device)
    for poison in POISONS:
        out = poisoned(room, extras, device, poison)
        word = moealign.new_error_word(device)
        layout = align(
            on_device, **sizes, **moved, **dict.fromkeys(extras, True), out=out, error_word=word, backend=name
        )
        assert layout.sorted_token_ids is out.sorted_token_ids
        assert_same_layout(layout, expected)
        assert word.tolist() == expected["error_word"]
    if error is not None:
        assert expected["error_word"] == [error]
    return layout


def keep_strides(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same view of the same storage, on another device."""
    if device.type == "cpu":
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


# The sizes that break things, each with the reason why it is kept.
AWKWARD = [
    (0, 2, 4, "no token at all"),
    (1, 1, 1, "one route, one expert"),
    (1, 8, 256, "decode: fewer routes than experts"),
    (7, 1, 3, "odd everything"),
    (33, 2, 60, "one past a warp, experts no power of two"),
    (911, 3, 160, "a prime number of tokens"),
    (1025, 1, 257, "one past 1,024 routes, one past 256 experts"),
    (128, 8, 256, "exactly 1,024 routes"),
    (64, 1, 64, "exactly the largest pairwise size"),
    (65, 1, 64, "one past it"),
    (5, 2, 1500, "more experts than a CTA has threads"),
    (2100, 8, 256, "past 16,384 routes"),
]


@pytest.mark.parametrize("block_size", [1, 3, 16, 48, 64, 128, 1000, 1024])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [case[:3] for case in AWKWARD], ids=[c[3] for c in AWKWARD])
def test_awkward_sizes(place, tokens, top_k, experts, block_size):
    if tokens > 2000 and block_size not in (16, 128):
        pytest.skip("the large size is tried with two block sizes")
    verify(place, draw(0, experts, (tokens, top_k)), block_size=block_size, num_experts=experts)


@pytest.mark.parametrize("experts", [1, 2, 31, 512, 896, 1024, 1025, 4096, 65_536])
def test_any_number_of_experts(place, experts):
    verify(place, draw(-1, experts + 1, (61, 4)), block_size=16, num_experts=experts)


@pytest.mark.parametrize("size", range(1, 40))
def test_any_block_size(place, size):
    verify(place, draw(0, 9, (30, 2), seed=size), block_size=size, num_experts=9)


@pytest.mark.parametrize("routes", [5, 100, 3000, 20_000])
@pytest.mark.parametrize(
    "kind", ["one expert", "all dropped", "an empty expert", "half dropped", "last expert", "sorted"]
)
def test_skew(place, kind, routes):
    experts = 64
    ids = draw(0, experts, (routes, 1), seed=3)
    if kind == "one expert":
        ids[:] = 17
    elif kind == "all dropped":
        ids[:] = -1
    elif kind == "an empty expert":
        ids[ids == 5] = 6
    elif kind == "half dropped":
        ids[::2] = -1
    elif kind == "last expert":
        ids[:] = experts - 1
    else:
        ids = ids.sort(0).values
    verify(place, ids, block_size=16, num_experts=experts, error=0)


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
@pytest.mark.parametrize("tokens", [3, 40, 700])
def test_every_dtype_on_the_value_as_given(place, dtype, tokens):
    info = torch.iinfo(dtype)
    values = [0, 1, 99, 5, info.max, info.min, 100, 127, 64]
    if info.bits == 64:
        values += [2**32 + 3, 2**32, 2**31 + 3, -(2**32) + 3 if info.min < 0 else 2**63 + 3]
    fits = [value for value in values if info.min <= value <= info.max]
    wanted = [fits[i % len(fits)] for i in range(tokens)]
    signed = [value - 2**info.bits if value >= 2 ** (info.bits - 1) else value for value in wanted]
    same = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[info.bits]
    ids = torch.tensor(signed, dtype=same).view(dtype)
    assert ids.tolist() == wanted
    verify(place, ids, block_size=16, num_experts=100)


def views() -> dict[str, torch.Tensor]:
    base = draw(0, 10, (24, 6))
    return {
        "transposed": base.T,
        "every other row": base[::2],
        "every other column": base[:, ::2],
        "column slice": base[:, 1:4],
        "expanded rows": base[:1].expand(7, 6),
        "expanded columns": base[:, :1].expand(24, 5),
        "0-d": base[3, 2],
        "1-d": base[:, 0],
        "1-d step": base.reshape(-1)[::3],
        "3-d": base.view(2, 12, 6),
        "3-d permuted": base.view(2, 12, 6).permute(1, 0, 2),
        "4-d permuted": base.view(2, 3, 4, 6).permute(3, 1, 0, 2),
        "empty last": base[:, :0],
        "offset": base.reshape(-1)[1:].view(-1),
    }


@pytest.mark.parametrize("kind", views())
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_any_strides_and_shapes(place, kind, dtype):
    view = views()[kind]
    base = view._base if view._base is not None else view
    ids = base.to(dtype).as_strided(view.shape, view.stride(), view.storage_offset())
    verify(place, ids, block_size=4, num_experts=10)
    verify(place, ids, block_size=4, num_experts=10, num_valid_tokens=torch.tensor([2], dtype=torch.int32))


MAPS = {
    "all foreign": lambda experts: torch.full((experts,), -1),
    "identity": torch.arange,
    "reversed": lambda experts: torch.arange(experts).flip(0),
    "every other": lambda experts: torch.where(torch.arange(experts) % 2 == 0, torch.arange(experts) // 2, -1),
    "two to one": lambda experts: torch.arange(experts) // 2,
    "out of range": lambda experts: torch.arange(experts) * 3 - 5,
    "far out": lambda experts: torch.where(torch.arange(experts) % 2 == 0, 2**40, -(2**40)),
}


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("tokens", [2, 60, 2500])
def test_expert_maps(place, kind, ignore, tokens):
    experts = 24
    expert_map = MAPS[kind](experts)
    call = {"block_size": 8, "num_experts": experts, "ignore_invalid_experts": ignore}
    ids = draw(-2, experts + 2, (tokens, 2))
    verify(place, ids, expert_map=expert_map, **call)
    if kind != "far out":
        verify(place, ids, expert_map=expert_map.to(torch.int8), **call)
        verify(place, ids, expert_map=expert_map.repeat_interleave(2).to(torch.int32)[::2], **call)


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
def test_expert_map_dtypes(place, dtype):
    values = torch.arange(20).flip(0).to(dtype)
    verify(place, draw(0, 20, (30, 2)), block_size=8, num_experts=20, expert_map=values, ignore_invalid_experts=True)


def test_ignoring_without_a_map_changes_nothing(place):
    verify(place, draw(-1, 12, (30, 2)), block_size=8, num_experts=12, ignore_invalid_experts=True)


@pytest.mark.parametrize("valid", [0, 1, 17, 29, 30, 31, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("tokens", [30, 3000])
def test_valid_count_on_the_device(place, valid, tokens):
    count = torch.tensor([valid], dtype=torch.int32)
    verify(place, draw(0, 12, (tokens, 2)), block_size=8, num_experts=12, num_valid_tokens=count)
    verify(place, draw(0, 12, (tokens, 2)), block_size=8, num_experts=12, num_valid_tokens=count.reshape(()))


@pytest.mark.parametrize("routes", [3, 11, 12, 13, 500])
def test_padded_length(place, routes):
    layout = verify(place, draw(0, 12, (routes,)), block_size=7, num_experts=12, pad_sorted_ids=True)
    assert layout.sorted_token_ids.numel() % 7 == 0


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_extra_alone(place, extra):
    layout = verify(place, draw(-1, 12, (50, 2)), block_size=8, num_experts=12, extras=(extra,))
    assert [name for name in EXTRAS if getattr(layout, name) is not None] == [extra]


def test_error_word_bits(place):
    sizes = {"block_size": 8, "num_experts": 12}
    good = draw(-1, 12, (30, 2))
    verify(place, good, **sizes, error=0)
    bad = good.clone()
    bad[29, 1] = 12
    verify(place, bad, **sizes, error=1)
    # Beyond the valid rows nobody looks.
    verify(place, bad, **sizes, num_valid_tokens=torch.tensor([29], dtype=torch.int32), error=0)
    verify(place, good, **sizes, expert_map=torch.full((12,), -2), error=2)
    verify(place, good, **sizes, num_valid_tokens=torch.tensor([31], dtype=torch.int32), error=4)
    name, device = place
    word = moealign.new_error_word(device)
    word.fill_(2)
    align(bad.to(device), **sizes, error_word=word, backend=name)
    assert word.item() == 3, "bits are added, never cleared"
    with pytest.raises(moealign.InvalidInput, match=r"topk_ids held an id outside.*expert_map held a value"):
        moealign.raise_for_errors(word)
    moealign.raise_for_errors(word)


BATCHES = [
    (0, 8, 4, "no batch"),
    (1, 0, 4, "a batch that can hold nothing"),
    (5, 8, 4, "the documented example's shape"),
    (3, 7, 16, "blocks longer than a batch"),
    (33, 100, 48, "one past a warp, no powers of two"),
    (300, 20, 8, "more batches than a small CTA has threads"),
    (1100, 3, 2, "more batches than a CTA has threads"),
    (32, 512, 64, "a served model's shape"),
]


@pytest.mark.parametrize(("batches", "most", "size"), [case[:3] for case in BATCHES], ids=[case[3] for case in BATCHES])
@pytest.mark.parametrize("kind", ["uniform", "empty", "full", "out of range"])
def test_batched(place, batches, most, size, kind):
    name, device = place
    counts = draw(0, most + 1, (batches,))
    if kind == "empty":
        counts[:] = 0
    elif kind == "full":
        counts[:] = most
    elif kind == "out of range":
        counts = draw(-5, most + 50, (batches,))
    extras = tuple(extra for extra in EXTRAS if extra != "scatter_idx")
    expected = oracle_align_batched(counts, max_tokens_per_batch=most, block_size=size)
    for poison in POISONS:
        out = poisoned(capacity_batched(most, block_size=size, num_batches=batches), extras, device, poison)
        word = moealign.new_error_word(device)
        align_batched(
            counts.to(device),
            max_tokens_per_batch=most,
            block_size=size,
            **dict.fromkeys(extras, True),
            out=out,
            error_word=word,
            backend=name,
        )
        assert_same_layout(out, expected)
        assert word.tolist() == expected["error_word"]


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
def test_batched_dtypes(place, dtype):
    name, device = place
    wrap = torch.tensor([2, 3, 0, -1, 8, 100, 7, 1]).to(torch.int64)
    counts = wrap.to({8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[torch.iinfo(dtype).bits])
    counts = counts.view(dtype)[::2]
    expected = oracle_align_batched(counts, max_tokens_per_batch=9, block_size=4)
    layout = align_batched(
        keep_strides(counts, device), max_tokens_per_batch=9, block_size=4, expert_counts=True, backend=name
    )
    assert_same_layout(layout, expected)


def test_random_cases_of_the_shipped_check(place):
    name, device = place
    wrong = [(said, found) for said, found in check_backend(name, device, cases=150, seed=7) if found is not None]
    assert wrong == []


def test_documented_examples(place):
    name, device = place
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], device=device)
    got = [part.tolist() for part in moe_align_block_size(ids, 4, 5, backend=name)]
    assert got == [[3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12] + [12] * 11, [1, 2, 3, 4, -1, -1, -1], [16]]
    got = [part.tolist() for part in moe_align_block_size(ids, 4, 4, backend=name)]
    assert got == [[3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12] + [12] * 12, [1, 2, 3, -1, -1, -1], [12]]
    counts = torch.tensor([2, 3, 0, 6, 8], device=device)
    sorted_ids, owners, total = batched_moe_align_block_size(8, 4, counts, backend=name)
    assert owners.tolist() == [0, 1, 3, 3, 4, 4, -1, -1, -1, -1]
    assert (total.item(), sorted_ids.numel()) == (24, 40)


def test_the_drop_in_takes_vllm_s_arguments_by_position(place):
    name, device = place
    ids = draw(-1, 6, (20, 2)).to(device)
    expert_map = torch.tensor([0, -1, 1, -1, 2, -1], device=device)
    four = moe_align_block_size(ids, 4, 6, expert_map, True, True, True, backend=name)
    expected = oracle_align(
        ids.cpu(), block_size=4, num_experts=6, expert_map=expert_map, pad_sorted_ids=True, ignore_invalid_experts=True
    )
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "scatter_idx")
    assert_same_layout(dict(zip(names, four, strict=True)), expected)


def test_layout_unpacks_like_the_tuple(place):
    name, device = place
    ids = draw(0, 6, (20, 2)).to(device)
    layout = align(ids, block_size=4, num_experts=6, positions=True, backend=name)
    three = moe_align_block_size(ids, 4, 6, backend=name)
    assert all(torch.equal(a, b) for a, b in zip(layout, three, strict=True))
    assert len(layout) == 3
    assert layout[0] is layout.sorted_token_ids
    assert layout[-1] is layout.num_tokens_post_padded
    assert layout[1:] == (layout.expert_ids, layout.num_tokens_post_padded)
    with pytest.raises(IndexError):
        layout[3]
    assert (layout.block_size, layout.num_experts, layout.num_routes) == (4, 6, 40)


def test_canaries_around_the_buffers_stay(place):
    name, device = place
    extras = EXTRAS
    for routes, experts in itertools.product((1, 40, 900, 20_000), (8, 300)):
        room = capacity(routes, block_size=16, num_experts=experts)
        slabs, out = [], {}
        for field in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *extras):
            size = getattr(room, field)
            slab = torch.full((size + 26,), -99, dtype=torch.int32, device=device)
            slabs.append((slab, size))
            out[field] = slab[13 : 13 + size].view(-1, 1) if field == "scatter_idx" else slab[13 : 13 + size]
        ids = draw(-1, experts + 1, (routes, 1))
        sizes = {"block_size": 16, "num_experts": experts}
        align(ids.to(device), **sizes, **dict.fromkeys(extras, True), out=out, backend=name)
        assert_same_layout(out, oracle_align(ids, **sizes))
        for slab, size in slabs:
            assert (slab[:13] == -99).all()
            assert (slab[13 + size :] == -99).all()


def test_repeats_are_identical(place):
    name, device = place
    ids = draw(-1, 256, (3000, 8)).to(device)
    call = {"block_size": 64, "num_experts": 256, **dict.fromkeys(EXTRAS, True), "backend": name}
    first = align(ids, **call)
    for _ in range(20):
        again = align(ids, **call)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(first.positions, again.positions)


def test_threads_at_once(place):
    name, device = place
    cases = [draw(-1, 64, (tokens, 4), seed=tokens) for tokens in (3, 100, 900, 9000)]
    expected = [oracle_align(ids, block_size=16, num_experts=64) for ids in cases]

    def work(number: int) -> None:
        ids, want = cases[number % 4], expected[number % 4]
        for _ in range(15):
            got = align(ids.to(device), block_size=16, num_experts=64, positions=True, backend=name)
            assert_same_layout(got, want)

    in_threads(work, 8)


@pytest.mark.parametrize("name", TABLE)
def test_the_backend_asked_for_is_the_one_that_runs(name, monkeypatch):
    if moealign.backends()[name] is not None:
        with pytest.raises(moealign.BackendUnavailable, match=name):
            align(torch.zeros(1, 2, dtype=torch.int32), block_size=4, num_experts=2, backend=name)
        return
    device = "cuda" if name in ("cuda", "triton") else "cpu"
    calls = dict.fromkeys(TABLE, 0)
    for each in TABLE:
        module = load(each)

        def counting(problem, each=each, real=module.prepare):
            calls[each] += 1
            return real(problem)

        monkeypatch.setattr(module, "prepare", counting)
    monkeypatch.setattr(prepared, "cached", {})
    align(torch.zeros(1, 2, dtype=torch.int32, device=device), block_size=4, num_experts=2, backend=name)
    assert calls == {each: int(each == name) for each in TABLE}


def test_explain_names_the_chosen_one_and_every_reason():
    ids = torch.zeros(1, 2, dtype=torch.int32)
    told = moealign.explain(ids, block_size=4, num_experts=2)
    assert list(told.reasons) == list(TABLE)
    first = next(name for name in TABLE if told.reasons[name] is None)
    assert told.backend == first
    assert f"{first}" in str(told)
    assert "chosen" in str(told)
    for name, reason in told.reasons.items():
        if reason is not None:
            assert reason in str(told), name
    told = moealign.explain(ids, block_size=4, num_experts=2, backend="reference")
    assert told.backend == "reference"
    assert "by name" in str(told)
    told = moealign.explain(torch.zeros(3, dtype=torch.int32), block_size=4, max_tokens_per_batch=5)
    assert told.backend == first
    with pytest.raises(moealign.InvalidInput, match="num_experts, max_tokens_per_batch: expected one"):
        moealign.explain(ids, block_size=4)


def test_without_numba_the_reference_takes_over_and_explain_says_so(monkeypatch):
    import importlib.util

    cpu = load("cpu")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else real(name, *rest))
    cpu.unavailable.cache_clear()
    try:
        told = moealign.explain(torch.zeros(1, 2, dtype=torch.int32), block_size=4, num_experts=2)
    finally:
        cpu.unavailable.cache_clear()
    assert told.backend == "reference"
    assert "numba" in told.reasons["cpu"]
    assert "pip install" in told.reasons["cpu"]
