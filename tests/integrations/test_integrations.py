"""The drop-ins on stand-in engines: what is replaced, counted, refused and put back; and vLLM's operators' values.

The engines themselves, as released, are tested by tests/engines/run_engines.py.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from enum import Enum

import processes
import pytest
import torch
from cases.engines import LORA, assert_lora, lora_case, rows_of, sglang_oracle
from helpers import ROOT, TARGETS, WORKERS, assert_passes, compile_ahead, cut, specialisation

from moealign.errors import BackendUnavailable, InvalidInput, InvalidType
from moealign.integrations import engines, sglang, vllm, vllm_ops
from moealign.layout import BlockLayout, capacity

LAYERS, OPS = vllm._LAYERS, vllm._OPS


@pytest.fixture
def engine(monkeypatch):
    """A vLLM of six functions that only say they were called, and a module that imported two of them by name."""
    for counts in (engines.call_counts, engines.left_counts, engines.layer_counts):
        counts.clear()
    said: list[str] = []

    def own(name, parameters):
        scope = {"said": said}
        exec(f"def {name}({parameters}):\n    said.append('{name}')\n    return 'own'", scope)
        return scope[name]

    layers, ops, importer = (types.ModuleType(name) for name in (LAYERS, OPS, "vllm.importer"))
    layers.moe_align_block_size = own(
        "moe_align_block_size",
        "topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False, "
        "return_scatter_idx=False",
    )
    layers.batched_moe_align_block_size = own(
        "batched_moe_align_block_size", "max_tokens_per_batch, block_size, expert_num_tokens"
    )
    ops.moe_align_block_size = own(  # as an older vLLM has it, without the last two
        "moe_align_block_size", "topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad"
    )
    ops.batched_moe_align_block_size = own("batched_moe_align_block_size", "somebody, changed, this")
    importer.renamed = layers.moe_align_block_size
    importer.batched = layers.batched_moe_align_block_size
    for module in (layers, ops, importer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield types.SimpleNamespace(layers=layers, ops=ops, importer=importer, said=said)
    vllm.uninstall()


def test_every_binding_is_replaced_once_and_put_back(engine, caplog):
    own = dict(vars(engine.layers)), dict(vars(engine.ops)), dict(vars(engine.importer))
    with caplog.at_level(logging.INFO, logger="moealign"):
        places = vllm.install()
        assert sorted(places) == sorted(
            [
                f"{LAYERS}.batched_moe_align_block_size",
                f"{LAYERS}.moe_align_block_size",
                f"{OPS}.moe_align_block_size",
                "vllm.importer.batched",
                "vllm.importer.renamed",
            ]
        )
        assert vllm.install() == []
    assert vllm.installed()
    assert engine.importer.renamed is engine.layers.moe_align_block_size is not own[0]["moe_align_block_size"]
    assert engine.ops.batched_moe_align_block_size is own[1]["batched_moe_align_block_size"], "another call: not ours"
    said = [record.message for record in caplog.records]
    assert sum("moealign replaces" in message for message in said) == 1
    assert any("keeps its own _custom_ops.batched" in message and "somebody" in message for message in said)

    late = types.ModuleType("vllm.late")
    late.align = engine.layers.moe_align_block_size  # imported by name after install
    sys.modules["vllm.late"] = late
    try:
        assert len(vllm.uninstall()) == 6
        assert late.align is own[0]["moe_align_block_size"]
    finally:
        del sys.modules["vllm.late"]
    assert (vars(engine.layers), vars(engine.ops), vars(engine.importer)) == own
    assert not vllm.installed()
    assert vllm.uninstall() == []


def test_a_name_bound_while_it_was_importing_is_rebound_by_the_next_call(engine):
    own = engine.layers.moe_align_block_size
    vllm.install()
    engine.importer.stale = own
    assert vllm.install() == ["vllm.importer.stale"]


def test_calls_go_to_us_and_refusals_to_the_engine(engine, caplog):
    vllm.install()
    ids = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
    rows, experts, total, scatter = engine.importer.renamed(
        topk_ids=ids, block_size=4, num_experts=3, return_scatter_idx=True
    )
    assert rows[:4].tolist() == [1, 4, 4, 4]
    assert (experts.tolist(), total.item(), scatter.flatten().tolist()) == ([0, 1, 2, -1], 12, [0, 1, 2, -1])
    assert rows.data_ptr() % 16 == 0
    assert engine.importer.batched(8, 4, torch.tensor([3, 0]))[2].item() == 4
    assert engine.said == []
    for _ in range(2):
        assert engine.importer.renamed(ids.float(), 4, 3) == "own"
    assert engine.said == ["moe_align_block_size"] * 2
    assert vllm.calls() == {
        "moe_align_block_size": {"moealign": 1, "vllm": 2},
        "batched_moe_align_block_size": {"moealign": 1, "vllm": 0},
    }
    text = vllm.metrics()
    assert 'moealign_calls_total{engine="vllm",function="moe_align_block_size",by="vllm"} 2\n' in text
    left = (
        'moealign_left_total{engine="vllm",function="moe_align_block_size",reason="topk_ids: expected an integer dtype'
    )
    assert left in text
    assert "# TYPE moealign_calls_total counter\n" in text
    assert sum("leaves a call of moe_align_block_size to vLLM" in record.message for record in caplog.records) == 1


def test_an_error_of_ours_that_is_no_refusal_is_not_hidden(engine, monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("broken")

    monkeypatch.setattr(vllm, "align", broken)
    vllm.install()
    with pytest.raises(RuntimeError, match="broken"):
        engine.layers.moe_align_block_size(torch.zeros(1, 1, dtype=torch.int32), 4, 3)
    assert engine.said == []


def test_off_unless_the_variable_says_1(engine, monkeypatch):
    for value in (None, "0", "true"):
        monkeypatch.delenv("MOEALIGN_VLLM", raising=False)
        if value is not None:
            monkeypatch.setenv("MOEALIGN_VLLM", value)
        vllm.plugin()
        assert not vllm.installed()
    monkeypatch.setenv("MOEALIGN_VLLM", "1")
    vllm.plugin()
    vllm.plugin()
    assert vllm.installed()


def test_a_device_without_kernels_of_ours_is_left_to_the_engine(monkeypatch):
    monkeypatch.setattr(vllm_ops, "backends", lambda: {"cuda": "no cuda.core", "triton": "no triton"})
    vllm_ops._without_kernels.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match=r"no kernels for xpu: no cuda\.core; no triton"):
            vllm_ops.require_kernels(types.SimpleNamespace(device=types.SimpleNamespace(type="xpu")))
        vllm_ops.require_kernels(torch.zeros(1))
    finally:
        vllm_ops._without_kernels.cache_clear()


# ---- whether it is on --------------------------------------------------------------------------------------------


def point(name):
    return types.SimpleNamespace(name=name)


@pytest.mark.parametrize(
    ("version", "points", "environment", "said"),
    [
        (None, ["moealign"], {"MOEALIGN_VLLM": "1"}, "off: vllm is not installed"),
        ("0.33.0", ["other"], {"MOEALIGN_VLLM": "1"}, "off: vllm 0.33.0, but no entry point of moealign"),
        ("0.33.0", ["moealign"], {}, "off: vllm 0.33.0; MOEALIGN_VLLM=1 switches it on"),
        (
            "0.33.0",
            ["moealign"],
            {"MOEALIGN_VLLM": "1", "VLLM_PLUGINS": "a, b"},
            "VLLM_PLUGINS='a, b' does not name moealign",
        ),
        ("0.33.0", ["moealign"], {"MOEALIGN_VLLM": "1", "VLLM_PLUGINS": "a, moealign"}, "on: vllm 0.33.0"),
        ("0.33.0", ["moealign"], {"MOEALIGN_VLLM": "1"}, "on: vllm 0.33.0, MOEALIGN_VLLM=1"),
        ("0.33.0", ["moealign"], {"MOEALIGN_VLLM": "layer"}, "on: vllm 0.33.0, MOEALIGN_VLLM=layer, whole layers"),
        (
            "0.340.1",
            ["moealign"],
            {"MOEALIGN_VLLM": "layer"},
            "on: vllm 0.340.1, MOEALIGN_VLLM=layer, the alignment alone: expected vllm 0.31, 0.32, 0.33 for whole",
        ),
        ("0.33.0", ["moealign"], {"MOEALIGN_VLLM": "layers"}, "off: vllm 0.33.0; MOEALIGN_VLLM=1 switches it on"),
    ],
)
def test_status(monkeypatch, version, points, environment, said):
    def found(package):
        if version is None:
            raise engines.importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(engines.importlib.metadata, "version", found)
    monkeypatch.setattr(engines.importlib.metadata, "entry_points", lambda group: [point(name) for name in points])
    for name in ("MOEALIGN_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert said in engines.status("vllm")


def test_info_says_it():
    done = processes.run("-m", "moealign", "info")
    assert "MOEALIGN_VLLM" in done.stdout
    assert all(engines.status(name) in done.stdout for name in engines.ENGINES), done.stdout


def test_the_entry_points_name_what_is_there():
    import importlib

    text = (ROOT / "pyproject.toml").read_text()
    for name, engine in engines.ENGINES.items():
        value = f"moealign.integrations.{name}:plugin"
        assert f'[project.entry-points."{engine.group}"]\nmoealign = "{value}"' in text
        assert callable(importlib.import_module(f"moealign.integrations.{name}").plugin)


# ---- the operators' values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [0, 1, 37])
@pytest.mark.parametrize("mapped", [False, True])
def test_align_in_place(spare, mapped):
    torch.manual_seed(spare)
    ids = torch.randint(-1, 9, (11, 3))
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, 3]) if mapped else None
    rows, blocks, total = rows_of(ids, 4, 7, expert_map=expert_map, ignore_invalid_experts=True)
    length = len(rows) + spare
    sorted_ids, total_at = torch.full((length,), -7, dtype=torch.int32), torch.full((1,), -7, dtype=torch.int32)
    reach = -(-length // 4)
    expert_ids, scatter = torch.full((reach + 2,), -7, dtype=torch.int32), torch.full((33, 1), -7, dtype=torch.int32)
    vllm_ops.align(ids, 7, 4, sorted_ids, expert_ids, total_at, expert_map, scatter)
    assert sorted_ids.tolist() == rows + [33] * spare
    assert expert_ids.tolist() == blocks + [-1] * (reach - len(blocks)) + [-7, -7]
    assert total_at.item() == total
    kept = [0 <= e < 7 and (expert_map is None or expert_map[e].item() >= 0) for e in ids.flatten().tolist()]
    assert scatter.flatten().tolist() == [i if k else -1 for i, k in enumerate(kept)]


def test_align_in_place_refuses_what_does_not_fit_before_writing():
    ids = torch.zeros(4, 2, dtype=torch.int32)
    short, enough, total = (torch.full((size,), -7, dtype=torch.int32) for size in (16, 16, 1))
    with pytest.raises(InvalidInput, match="sorted_token_ids: expected room for 17 elements, the worst case, got 16"):
        vllm_ops.align(ids, 3, 4, short, enough, total)
    assert short.tolist() == enough.tolist() == [-7] * 16


def test_batched_in_place():
    out = [torch.full((size,), -7, dtype=torch.int32) for size in (16, 4, 1)]
    vllm_ops.align_batched(8, 4, torch.tensor([3, 5], dtype=torch.int32), *out)
    assert out[0].tolist() == [0, 1, 2, 16, 8, 9, 10, 11, 12, 16, 16, 16, 16, 16, 16, 16]
    assert (out[1].tolist(), out[2].item()) == ([0, 1, 1, -1], 12)


@pytest.mark.parametrize("case", LORA)
@pytest.mark.parametrize("seed", [0, 1])
def test_lora_is_a_layout_per_adapter(case, seed):
    arguments, out, expected = lora_case(*case, seed=seed)
    vllm_ops.align_lora(*arguments)
    assert_lora(out, expected)


def test_lora_refuses_buffers_that_are_too_small():
    arguments, out, _ = lora_case(40, 6, 16, 16, 4, 0, False)
    with pytest.raises(InvalidInput, match="max_num_tokens_padded, max_num_m_blocks: expected at least 480"):
        vllm_ops.align_lora(*arguments[:5], 479, *arguments[6:])
    assert out[2].tolist() == [-7] * 4


@pytest.mark.parametrize("given", [0, 3, 7, 12])
@pytest.mark.parametrize("scatter", [False, True])
def test_globalize(given, scatter):
    torch.manual_seed(given)
    tokens, top_k, local, offset = 7, 3, 5, 10
    ids = torch.randint(-1, local + 2, (tokens, top_k))
    psum = torch.tensor([0, 1, given], dtype=torch.int32)
    alive = ids.clone()
    alive[min(given, tokens) :] = -1
    rows, blocks, total = rows_of(alive, 4, local)
    kept = (alive >= 0) & (alive < local)
    out = [torch.full((size,), -7, dtype=torch.int32) for size in (len(rows), len(blocks), 1)]
    index = torch.full((21, 1), -7, dtype=torch.int32) if scatter else None
    vllm_ops.globalize_align(ids, psum, offset, 40, local, 4, *out, index)
    assert [out[0].tolist(), out[1].tolist(), out[2].item()] == [rows, blocks, total]
    assert torch.equal(ids, torch.where(kept, alive + offset, -1))
    if index is not None:
        assert index.flatten().tolist() == [i if k else -1 for i, k in enumerate(kept.flatten().tolist())]


def test_globalize_refuses_experts_that_are_not_there():
    out = [torch.zeros(size, dtype=torch.int32) for size in (8, 2, 1)]
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(InvalidInput, match="local_num_experts: expected at most 3 from expert 13 on, got 5"):
        vllm_ops.globalize_align(ids, torch.ones(1, dtype=torch.int32), 13, 16, 5, 4, *out)
    assert ids.tolist() == [[0, 0]]


def test_the_triton_steps_interpreted():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("they run on the GPU in tests/engines/engine_checks.py")
    assert_passes(WORKERS / "vllm_kernels_interpret.py", interpreted=True)


@pytest.mark.targets
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
@pytest.mark.parametrize("ids", ["i32", "i64"])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_triton_steps_compile_ahead(target, ids, mapped):
    pytest.importorskip("triton")
    from moealign.integrations import sglang_kernels
    from moealign.integrations import vllm_kernels as kernels

    word = "*i32"
    steps = [
        (
            kernels._virtual_ids,
            [f"*{ids}", word, word, word, word if mapped else "constexpr", word, *["i32"] * 5],
            {
                "MAP": mapped,
                "ROUTES": kernels._ROUTES,
                "SLOTS": kernels._SLOTS,
                **({} if mapped else {"expert_map": None}),
            },
        ),
        (kernels._segments, [word] * 8 + ["i32"] * 6, {"ROWS": kernels._ROWS, "SLOTS": kernels._SLOTS}),
        (kernels._globalize, ["*i64", word, "i32", "i32"], {"ROWS": kernels._ROWS}),
        (sglang_kernels._single_token, [word] * 4 + ["i32"] * 2, {"PREFIX": mapped, "ROUTES": 8, "ROWS": 256}),
    ]
    for function, kinds, constants in steps:
        signature = dict(zip(function.arg_names, kinds, strict=False)) | dict.fromkeys(
            (name for name in constants if name != "expert_map"), "constexpr"
        )
        assert set(signature) == set(function.arg_names)
        list(compile_ahead(function, signature, constants, targets=[(*target[:3], 64 * 1024)]))


def test_another_number_of_tokens_compiles_no_new_step(monkeypatch):
    pytest.importorskip("triton")
    from moealign.integrations import vllm_kernels as kernels

    keys = set()

    class Recorder:
        """A kernel that notes what it would be compiled for."""

        def __init__(self, name):
            self.name, self.function = name, getattr(kernels, name)

        def __getitem__(self, grid):
            return lambda *arguments, **constants: keys.add(
                specialisation(
                    self.function,
                    types.SimpleNamespace(kernel=self.name, arguments=arguments, constants=constants, num_warps=4),
                )
            )

    for name in ("_virtual_ids", "_segments", "_globalize"):
        monkeypatch.setattr(kernels, name, Recorder(name))
    slots, experts = 3, 8
    for tokens in range(1, 41):
        for shift in range(4):
            length = tokens + experts * 15
            ids, mapping, enabled, active, expert_map, rows, blocks, totals, offsets = cut(
                tokens, tokens, slots, slots + 1, experts, slots * length, slots * length, slots, 25, shift=shift
            )
            packed = types.SimpleNamespace(
                sorted_token_ids=rows, expert_ids=blocks, expert_offsets=offsets, block_size=16, num_routes=tokens
            )
            kernels.virtual_ids(ids.view(tokens, 1), mapping, enabled, active, expert_map, experts, slots)
            kernels.segments(
                packed, rows.view(slots, length), blocks.view(slots, length), totals, experts, enabled, active
            )
            kernels.globalize(ids.to(torch.int64)[shift % 2 :], mapping, 90)
    assert len(keys) == 3


# ---- SGLang ------------------------------------------------------------------------------------------------------


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    """What we use of SGLang's: tests/engines/engine_checks.py has the real one."""

    def __init__(self):
        self._hooks, self._patched = {}, set()

    def register(self, target, hook, kind):
        assert kind is HookType.AROUND
        self._hooks.setdefault(target, []).append((kind, hook, None))

    def apply_hooks(self):
        for target, hooks in self._hooks.items():
            if target not in self._patched:
                module = sys.modules[target.rpartition(".")[0]]
                own = wrapped = module.moe_align_block_size
                for _, hook, _ in hooks:
                    inner = functools.partial(hook, wrapped)
                    wrapped = functools.wraps(wrapped)(lambda *a, inner=inner, **k: inner(*a, **k))
                engines.rebind(own, wrapped)
                self._patched.add(target)


@pytest.fixture(params=[0, 1], ids=["new home", "old home"])
def sgl(request, monkeypatch):
    for counts in (engines.call_counts, engines.left_counts, engines.layer_counts):
        counts.clear()
    home = types.ModuleType(sglang._HOMES[request.param])
    home.moe_align_block_size = lambda topk_ids, block_size, num_experts, **named: "own"
    importer, hooks = types.ModuleType("sglang.importer"), types.ModuleType("sglang.srt.plugins.hook_registry")
    importer.align = home.moe_align_block_size
    hooks.HookRegistry, hooks.HookType = HookRegistry(), HookType
    for module in (home, importer, hooks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield types.SimpleNamespace(home=home, importer=importer, registry=hooks.HookRegistry)
    sglang.uninstall()


def test_sglang_is_hooked_and_restored_and_others_hooks_stay(sgl):
    own = sgl.home.moe_align_block_size
    target = f"{sgl.home.__name__}.moe_align_block_size"
    seen = []

    def other(theirs, *arguments, **named):
        seen.append("other")
        return theirs(*arguments, **named)

    sgl.registry.register(target, other, HookType.AROUND)
    assert sglang.install() == [target]
    assert sglang.install() == []
    ids = torch.tensor([[1, -1]], dtype=torch.int32)
    assert sgl.importer.align(ids, 4, 2)[1].tolist() == [-1, 1]
    assert sgl.importer.align(ids, 4, 2, pad_expert_ids=True) == "own"
    assert sgl.importer.align(ids, 4, 2, something_new=1) == "own"
    assert sglang.calls() == {"moe_align_block_size": {"moealign": 1, "sglang": 2}}
    assert sglang.uninstall() == [target]
    assert sgl.importer.align(ids, 4, 2) == "own"
    assert sgl.importer.align.__wrapped__ is own
    assert sglang.calls()["moe_align_block_size"]["moealign"] == 1
    assert (
        'moealign_left_total{engine="sglang",function="moe_align_block_size",reason="pad_expert_ids' in sglang.metrics()
    )
    assert seen, "the hook of another plug-in still runs"


def test_sglang_s_drop_in_hides_no_error_of_ours(sgl, monkeypatch):
    def broken(*arguments):
        raise TypeError("broken")

    monkeypatch.setattr(sglang, "align", broken)
    sglang.install()
    with pytest.raises(TypeError, match="broken"):
        sgl.importer.align(torch.zeros(1, 1, dtype=torch.int32), 4, 2)


def test_sglang_without_other_hooks_gets_its_very_function_back(sgl):
    own = sgl.home.moe_align_block_size
    sglang.install()
    assert sgl.importer.align is sgl.home.moe_align_block_size is not own
    sglang.uninstall()
    assert sgl.importer.align is sgl.home.moe_align_block_size is own
    assert sgl.registry._hooks == {}


def test_sglang_is_off_unless_the_variable_says_1(sgl, monkeypatch):
    monkeypatch.setenv("MOEALIGN_SGLANG", "0")
    sglang.plugin()
    assert not sglang.installed()
    monkeypatch.setenv("MOEALIGN_SGLANG", "1")
    sglang.plugin()
    assert sglang.installed()
    assert sgl.registry._patched == set(), "SGLang applies the hooks itself"
    sgl.registry.apply_hooks()
    assert sgl.importer.align(torch.tensor([[0]], dtype=torch.int32), 4, 1)[2].item() == 4


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "block_size"), [(0, 2, 4, 4), (1, 8, 256, 16), (17, 3, 5, 4), (64, 6, 33, 64)]
)
def test_sglang_s_conventions(tokens, top_k, experts, block_size, ignore):
    torch.manual_seed(tokens)
    ids = torch.randint(-2, experts + 2, (tokens, top_k), dtype=torch.int32)
    rows, of, total = sglang._align(ids, block_size, experts, ignore)
    assert (rows.tolist(), of.tolist(), total.item()) == sglang_oracle(ids, block_size, experts, ignore)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("inactive", [0, 1, 4, 9])
def test_sglang_s_count_of_inactive_blocks(inactive, buffers, monkeypatch):
    if buffers:  # as on a GPU

        def made(ids, block_size, experts, pad, scatter):
            sizes = capacity(ids.numel(), block_size=block_size, num_experts=experts, pad_sorted_ids=pad)
            new = functools.partial(torch.full, fill_value=-7, dtype=torch.int32)
            return BlockLayout(new((sizes.sorted_token_ids,)), new((sizes.expert_ids,)), new((1,)))

        monkeypatch.setattr(sglang, "separate_outputs", made)
    ids = torch.arange(24, dtype=torch.int32).reshape(8, 3) % 5
    ids.view(-1)[:inactive] = -1
    rows, of, totals = sglang._align(ids, 4, 5, return_inactive_prefix_count=True)
    wanted = sglang_oracle(ids, 4, 5, False)
    assert (rows.tolist(), of.tolist()) == wanted[:2]
    assert (totals.dtype, totals.tolist()) == (torch.int32, [wanted[2], -(-inactive // 4)])
    assert of[: -(-inactive // 4)].tolist() == [-1] * -(-inactive // 4)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("ids", [[5], [3, 0, 9, 1], [-1, 7, -1, 2], [4, 4, 1], list(range(32, 0, -1))])
def test_sglang_s_function_for_one_token(ids, prefix):
    """A block for each route, by ascending id and then by choice, as SGLang's kernel documents it."""
    given = torch.tensor([ids], dtype=torch.int32)
    rows, of, totals = sglang._align_single(given, 8, return_inactive_prefix_count=prefix)
    order = sorted(range(len(ids)), key=lambda choice: (ids[choice], choice))
    assert of.tolist() == [ids[choice] for choice in order]
    assert rows.view(-1, 8).tolist() == [[choice] + [len(ids)] * 7 for choice in order]
    assert totals.tolist() == [8 * len(ids), *[sum(each < 0 for each in ids)] * prefix]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("prefix", [False, True])
def test_gpu_sglang_s_functions_give_what_they_give_on_a_cpu(prefix):
    torch.manual_seed(0)
    for top_k in (1, 6, 8, 32):
        for block_size in (8, 48, 64):
            single = torch.randint(-1, 200, (1, top_k), dtype=torch.int32)
            several = torch.randint(-1, 200, (9, top_k), dtype=torch.int32)
            for function, ids, sizes in (
                (sglang._align_single, single, (block_size,)),
                (sglang._align, several, (block_size, 200)),
            ):
                wanted = function(ids, *sizes, return_inactive_prefix_count=prefix)
                found = function(ids.cuda(), *sizes, return_inactive_prefix_count=prefix)
                assert [each.tolist() for each in found] == [each.tolist() for each in wanted]
                assert found[2].data_ptr() % 8 == 0


@pytest.mark.parametrize(
    ("ids", "block_size", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), 8, "topk_ids: expected one contiguous row"),
        (torch.zeros(1, 2), 8, "topk_ids: expected int32, got torch.float32"),
        (torch.zeros(1, 2, dtype=torch.int32), 0, "block_size: expected an int of at least 1, got 0"),
    ],
)
def test_what_sglang_s_function_for_one_token_must_do(ids, block_size, message):
    with pytest.raises((InvalidInput, InvalidType), match=message):
        sglang._align_single(ids, block_size)


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((6, 4), {}, "block_size: expected a multiple of 4, got 6"),
        ((4, 0), {}, "num_experts: expected an int of at least 1, got 0"),
        ((4, 4), {"pad_expert_ids": True}, "pad_expert_ids: expected False"),
        (
            (4, 4, True),
            {"return_inactive_prefix_count": True},
            "ignore_invalid_expert: expected False with return_inactive_prefix_count",
        ),
    ],
)
def test_what_sglang_s_own_function_must_do(arguments, named, message):
    with pytest.raises(InvalidInput, match=message):
        sglang._align(torch.zeros(1, 2, dtype=torch.int32), *arguments, **named)
