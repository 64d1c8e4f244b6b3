"""The plug-ins' own logic, on engines made for the test; tests/real_engines.py runs them inside the real ones."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest
import torch

import moealign
from moealign.integrations import describe, sglang, vllm
from moealign.testing import assert_same_layout, oracle_align

FIELDS = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
IDS = torch.tensor([[0, 2], [2, 1], [3, -1]], dtype=torch.int32)


@pytest.fixture
def engine(monkeypatch):
    """Modules that look like vLLM's, whose functions note that they were called."""
    called = []

    def moe_align_block_size(
        topk_ids,
        block_size,
        num_experts,
        expert_map=None,
        pad_sorted_ids=False,
        ignore_invalid_experts=False,
        return_scatter_idx=False,
    ):
        called.append("align")
        return "theirs"

    def batched_moe_align_block_size(max_tokens_per_batch, block_size, expert_num_tokens):
        called.append("batched")

    def in_place(
        topk_ids,
        num_experts,
        block_size,
        sorted_token_ids,
        experts_ids,
        num_tokens_post_pad,
        expert_map=None,
        scatter_idx=None,
    ):
        called.append("in place")

    def batched_in_place(
        max_tokens_per_batch, block_size, expert_num_tokens, sorted_ids, expert_ids, num_tokens_post_pad
    ):
        called.append("batched in place")

    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.fused_moe"):
        module(name, __path__=[])
    home = module(
        vllm.HOME,
        moe_align_block_size=moe_align_block_size,
        batched_moe_align_block_size=batched_moe_align_block_size,
    )
    ops = module(vllm.OPS, moe_align_block_size=in_place, batched_moe_align_block_size=batched_in_place)
    user = module("vllm.model_executor.layers.fused_moe.user", another_name=moe_align_block_size, size=3)
    stranger = module("elsewhere", moe_align_block_size=moe_align_block_size)
    yield types.SimpleNamespace(home=home, ops=ops, user=user, stranger=stranger, called=called)
    vllm.uninstall()


def test_every_binding_in_the_package_is_replaced_and_restored(engine):
    theirs = engine.home.moe_align_block_size
    vllm.install()
    ours = engine.home.moe_align_block_size
    assert ours is not theirs
    assert engine.user.another_name is ours
    assert engine.stranger.moe_align_block_size is theirs
    vllm.install()
    assert engine.home.moe_align_block_size is ours
    late = types.ModuleType("vllm.late")
    late.align = ours  # imported while the plug-in was on
    sys.modules["vllm.late"] = late
    try:
        vllm.uninstall()
        vllm.uninstall()
        assert engine.home.moe_align_block_size is engine.user.another_name is late.align is theirs
    finally:
        del sys.modules["vllm.late"]
    assert vllm.status() is None


def test_calls_are_answered_and_counted(engine, caplog):
    with caplog.at_level(logging.INFO, "moealign"):
        vllm.install()
        for _ in range(3):
            got = engine.user.another_name(IDS, 4, 5)
    assert_same_layout(dict(zip(FIELDS, got, strict=True)), oracle_align(IDS, block_size=4, num_experts=5))
    assert vllm.status().taken == {"moe_align_block_size": 3}
    assert engine.called == []
    (line,) = [record.getMessage() for record in caplog.records if "answers vLLM" in record.getMessage()]
    assert "user.another_name" in line


def test_what_is_refused_goes_to_the_engine_and_is_counted_and_logged_once(engine, caplog):
    vllm.install()
    with caplog.at_level(logging.INFO, "moealign"):
        for _ in range(3):
            assert engine.user.another_name(IDS.float(), 4, 5) == "theirs"
    assert engine.called == ["align"] * 3
    assert list(vllm.status().refused.values()) == [3]
    assert len(caplog.records) == 1
    assert vllm.status().taken == {}


def test_another_error_is_not_hidden(engine, monkeypatch):
    monkeypatch.setattr(moealign.integrations.vllm, "align", lambda *_, **__: 1 / 0)
    vllm.install()
    buffers = [torch.empty(size, dtype=torch.int32) for size in (21, 6, 1)]
    with pytest.raises(ZeroDivisionError):
        engine.ops.moe_align_block_size(IDS, 5, 4, *buffers)
    assert engine.called == []


@pytest.mark.parametrize("more", [0, 3, 9])
def test_the_operator_s_form_fills_what_it_was_given(engine, more):
    vllm.install()
    want = oracle_align(IDS, block_size=4, num_experts=5)
    rows, blocks = len(want["sorted_token_ids"]), len(want["expert_ids"])
    buffers = [torch.full((size,), -9, dtype=torch.int32) for size in (rows + more, blocks + more, 1)]
    engine.ops.moe_align_block_size(IDS, 5, 4, *buffers)
    assert buffers[0].tolist() == want["sorted_token_ids"] + [6] * more
    assert buffers[1].tolist() == want["expert_ids"] + [-1] * more
    assert buffers[2].tolist() == want["num_tokens_post_padded"]
    engine.ops.moe_align_block_size(IDS, 5, 4, buffers[0][:3], *buffers[1:])
    assert engine.called == ["in place"]  # too small a buffer is the engine's own affair


def test_other_arguments_are_refused_and_nothing_is_replaced(engine):
    engine.home.batched_moe_align_block_size = lambda block_size, counts: None
    theirs = engine.home.moe_align_block_size
    with pytest.raises(RuntimeError, match=r"expected vLLM 0\.33's arguments .* nothing was replaced"):
        vllm.install()
    assert engine.home.moe_align_block_size is theirs
    assert vllm.status() is None


@pytest.mark.parametrize("value", [None, "0", "yes", ""])
def test_off_unless_switched_on(engine, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("MOEALIGN_VLLM", raising=False)
    else:
        monkeypatch.setenv("MOEALIGN_VLLM", value)
    vllm.plugin()
    assert vllm.status() is None
    monkeypatch.setenv("MOEALIGN_VLLM", "1")
    vllm.plugin()
    assert vllm.status() is not None


@pytest.mark.parametrize("experts", [3, 8, 64])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_sglang_s_conventions(experts, tokens):
    ids = torch.randint(-1, experts, (tokens, 3), dtype=torch.int64)
    rows, names, total = sglang._align_for_sglang(ids, 16, experts)
    want = oracle_align(ids + 1, block_size=16, num_experts=experts + 1, pad_sorted_ids=True)
    used = want["num_tokens_post_padded"][0] // 16
    assert rows.tolist() == want["sorted_token_ids"][: len(rows)]
    assert names.tolist()[:used] == [name - 1 for name in want["expert_ids"][:used]]
    assert set(names.tolist()[used:]) <= {-1}
    assert total.tolist() == want["num_tokens_post_padded"]
    assert len(rows) % 4 == 0
    rows, names, _ = sglang._align_for_sglang(ids, 16, experts, ignore_invalid_expert=True)
    want = oracle_align(ids, block_size=16, num_experts=experts + 1, pad_sorted_ids=True)
    assert rows.tolist() == want["sorted_token_ids"][: len(rows)]
    assert names.tolist() == want["expert_ids"]


@pytest.mark.parametrize(
    "given", [{"return_inactive_prefix_count": True}, {"pad_expert_ids": True}, {"block_size": 18}]
)
def test_what_sglang_alone_can_do_is_refused(given):
    with pytest.raises(moealign.InvalidInput):
        sglang._align_for_sglang(IDS, **{"block_size": 16, "num_experts": 5, **given})


def test_engines_are_described():
    said = describe()
    assert set(said) == {"vllm", "sglang"}
    assert all(text == "not installed" or " o" in text for text in said.values())


def test_the_entry_points_lead_to_the_plug_ins():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for group, module in (("vllm.general_plugins", vllm), ("sglang.srt.plugins", sglang)):
        target = f'[project.entry-points."{group}"]\nmoealign = "{module.__name__}:plugin"'
        assert target in text
        assert callable(module.plugin)
