"""The drop-ins inside the released vLLM, and SGLang: run by run_engines.py, in an environment that has them.

On the CPU there is no compiled library of vLLM's: what is checked are its wrappers, its import structure and its
plug-in loader.  On a GPU with the library in MOEALIGN_VLLM_LIBRARY, vLLM's own results are compared with ours too.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cases.engines import LORA, assert_lora, lora_case, rows_of, sglang_oracle

from moealign.integrations import vllm as drop_in

LAYER = "vllm.model_executor.layers.fused_moe"
IMPORTERS = [
    f"{LAYER}.fused_moe",
    *(
        f"{LAYER}.experts.{name}"
        for name in (
            "triton_moe",
            "marlin_moe",
            "fused_humming_moe",
            "nvfp4_emulation_moe",
            "mxfp8_native_moe",
            "rdna3_moe",
        )
    ),
]
LIBRARY = os.environ.get("MOEALIGN_VLLM_LIBRARY")
GPU = torch.cuda.is_available() and LIBRARY is not None
DEVICE = "cuda" if GPU else "cpu"
SGLANG = importlib.util.find_spec("sglang") is not None
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU, and vLLM's compiled library in MOEALIGN_VLLM_LIBRARY")
with_sglang = pytest.mark.skipif(not SGLANG, reason="SGLang's files are not here")


@pytest.fixture(scope="session", autouse=True)
def vllm():
    """vLLM and its fused layer; on a GPU its own import of a compiled library brings vllm_parts."""
    importlib.import_module(f"{LAYER}.fused_moe")
    return importlib.import_module("vllm")


@pytest.fixture
def installed(vllm):
    drop_in.call_counts.clear()
    places = drop_in.install()
    yield places
    drop_in.uninstall()


def own(name):
    return importlib.import_module(f"{LAYER}.moe_align_block_size").__dict__[name]


def test_the_release_is_the_one_meant(vllm):
    from importlib.metadata import version

    assert version("vllm").startswith("0.33."), version("vllm")
    assert not drop_in.installed()
    if GPU:
        from vllm.platforms import current_platform

        assert current_platform.is_cuda(), f"{current_platform}; is libnvidia-ml.so.1 in LD_LIBRARY_PATH?"
        assert torch.ops._moe_C.moe_align_block_size


def test_all_seven_importers_and_the_operators_are_replaced_and_put_back(vllm):
    for name in IMPORTERS:
        importlib.import_module(name)
    align, batched = own("moe_align_block_size"), own("batched_moe_align_block_size")
    before = {name: sys.modules[name].__dict__["moe_align_block_size"] for name in IMPORTERS}
    assert all(function is align for function in before.values())
    ops = dict(vars(sys.modules["vllm._custom_ops"]))
    places = drop_in.install()
    try:
        assert {f"{name}.moe_align_block_size" for name in IMPORTERS} <= set(places)
        assert f"{LAYER}.experts.marlin_moe.batched_moe_align_block_size" in places
        assert {place for place in places if place.startswith("vllm._custom_ops.")} == {
            f"vllm._custom_ops.{name}"
            for name in (
                "moe_align_block_size",
                "batched_moe_align_block_size",
                "moe_lora_align_block_size",
                "fused_globalize_align_block_size",
            )
        }
        ours = own("moe_align_block_size")
        assert ours is not align
        assert all(sys.modules[name].moe_align_block_size is ours for name in IMPORTERS)
        assert sys.modules[f"{LAYER}.experts.marlin_moe"].batched_moe_align_block_size is not batched
        assert drop_in.install() == []
    finally:
        drop_in.uninstall()
    assert {name: sys.modules[name].moe_align_block_size for name in IMPORTERS} == before
    assert own("batched_moe_align_block_size") is batched
    assert dict(vars(sys.modules["vllm._custom_ops"])) == ops


PROCESS = """
import importlib, json, sys
import vllm.plugins as plugins
{before}
plugins.load_general_plugins()
plugins.plugins_loaded = False
plugins.load_general_plugins()          # a second time: nothing may change
from moealign.integrations import vllm as drop_in
names = {names}
bound = [importlib.import_module(name).moe_align_block_size for name in names]
import torch
if bound[0].__module__.startswith("vllm") and drop_in.installed():
    assert bound[0](torch.zeros(2, 1, dtype=torch.int32), 4, 3)[2].item() == 4
print(json.dumps([drop_in.installed(), len(set(map(id, bound))), drop_in.calls()]))
"""


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs the entry points installed")
@pytest.mark.parametrize("variable", ["1", "0"])
@pytest.mark.parametrize("first", ["the plug-in", "the layers"])
def test_the_entry_point_in_a_process_of_vllm_s(variable, first):
    from importlib.metadata import entry_points

    if not any(each.name == "moealign" for each in entry_points(group="vllm.general_plugins")):
        pytest.skip("moealign is on a path here, not installed")
    before = "" if first == "the plug-in" else "\n".join(f"import {name}" for name in IMPORTERS)
    code = PROCESS.format(before=before, names=[f"{LAYER}.moe_align_block_size", *IMPORTERS])
    environment = {**os.environ, "MOEALIGN_VLLM": variable}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    on, bindings, calls = json.loads(done.stdout.splitlines()[-1])
    assert bindings == 1, "one function, everywhere"
    assert on is (variable == "1")
    assert calls == ({"moe_align_block_size": {"moealign": 1, "vllm": 0}} if on else {})


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_the_fused_layer_gets(installed, mapped, ignore, dtype):
    from vllm.model_executor.layers.fused_moe.fused_moe import _prepare_expert_assignment

    torch.manual_seed(0)
    ids = torch.randint(-1, 9, (33, 2), dtype=dtype)
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, -1, 3], dtype=torch.int32) if mapped else None
    got = _prepare_expert_assignment(
        ids.to(DEVICE), {"BLOCK_SIZE_M": 16}, 33, 2, 8,
        None if expert_map is None else expert_map.to(DEVICE), ignore_invalid_experts=ignore,
    )  # fmt: skip
    rows, experts, total = rows_of(ids, 16, 8, expert_map=expert_map, ignore_invalid_experts=ignore)
    assert [got[0].tolist(), got[1].tolist(), got[2].item()] == [rows, experts, total]
    assert got[0].data_ptr() % 16 == 0
    assert drop_in.calls() == {"moe_align_block_size": {"moealign": 1, "vllm": 0}}


@pytest.mark.parametrize("case", [case for case in LORA if case[0]])
def test_lora_through_vllm_s_wrapper(installed, case):
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    tokens, top_k, experts, block_size, slots, _, mapped = case
    arguments, _, _ = lora_case(tokens, top_k, experts, block_size, slots, 0, mapped, device=DEVICE)
    ids, mapping = arguments[:2]
    enabled, listed, expert_map = arguments[-3:]
    wrapper = types.SimpleNamespace(
        token_mapping_meta=types.SimpleNamespace(
            meta_args=lambda *given: (mapping, None, None, None, listed, None, None)
        ),
        lora_config=types.SimpleNamespace(specialize_active_lora=False),
    )
    result = PunicaWrapperGPU.moe_lora_align_block_size(
        wrapper, ids, tokens, block_size, experts, slots, enabled, expert_map
    )
    expected = lora_case(tokens, top_k, experts, block_size, slots, 0, mapped)[2]
    assert_lora(result[1:], expected, poisoned=False)
    assert drop_in.calls() == {"_custom_ops.moe_lora_align_block_size": {"moealign": 1, "vllm": 0}}


@pytest.mark.parametrize("scatter", [False, True])
def test_globalize_through_vllm_s_wrapper(installed, scatter):
    from vllm.model_executor.layers.fused_moe.fused_globalize_align_block_size import fused_globalize_align_block_size

    torch.manual_seed(0)
    ids = torch.randint(-1, 28, (37, 6))
    alive = ids.clone()
    alive[30:] = -1
    psum = torch.tensor([4, 9, 30], dtype=torch.int32, device=DEVICE)
    found = fused_globalize_align_block_size(ids.to(DEVICE), psum, 56, 112, 28, 16, scatter)
    assert [found[1].tolist(), found[2].tolist(), found[3].item()] == rows_of(alive, 16, 28)
    assert torch.equal(found[0].cpu(), torch.where(alive >= 0, alive + 56, -1))
    if scatter:
        assert (found[4].cpu().flatten() >= 0).tolist() == (alive.flatten() >= 0).tolist()
    assert drop_in.calls() == {"_custom_ops.fused_globalize_align_block_size": {"moealign": 1, "vllm": 0}}


def test_a_refused_call_reaches_vllm_s_own(installed):
    with pytest.raises((AttributeError, RuntimeError, NotImplementedError)):  # its operator takes no float ids
        own("moe_align_block_size")(torch.zeros(2, 2, device=DEVICE), 4, 3)
    assert drop_in.calls()["moe_align_block_size"] == {"moealign": 0, "vllm": 1}


def test_the_session_of_the_page_runs(vllm):
    page = pytest.importorskip("test_docs").ROOT / "docs" / "integrations.md"
    drop_in.call_counts.clear()
    outcome = sys.modules["test_docs"].run_page(page)
    assert outcome.failed == 0
    assert outcome.attempted > 8
    assert not drop_in.installed()


# ---- with vLLM's compiled library --------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("tokens", [1, 16, 100, 1000, 4096])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_fused_experts_gives_the_same_with_and_without(vllm, tokens, expert_parallel):
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    torch.manual_seed(tokens)
    experts, hidden, inner, top_k = 32, 256, 128, 4
    local = experts // 2 if expert_parallel else experts

    def drawn(*shape, scale):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

    states = drawn(tokens, hidden, scale=1)
    w1, w2 = drawn(local, 2 * inner, hidden, scale=0.06), drawn(local, hidden, inner, scale=0.09)
    weights, ids = torch.rand(tokens, experts, device="cuda").softmax(-1).topk(top_k)
    ids = ids.int()
    ids[torch.rand(ids.shape, device="cuda") < 0.05] = -1 if expert_parallel else 0
    named = {}
    if expert_parallel:
        expert_map = torch.full((experts,), -1, device="cuda", dtype=torch.int32)
        expert_map[::2] = torch.arange(local, device="cuda", dtype=torch.int32)
        named = {"expert_map": expert_map}

    def run():
        return fused_experts(states, w1, w2, weights, ids, global_num_experts=experts, **named)

    without = run()
    assert without.abs().max() > 0.01, "an output worth comparing"
    drop_in.call_counts.clear()
    drop_in.install()
    try:
        with_ours = run()
        calls = drop_in.calls()
    finally:
        drop_in.uninstall()
    assert torch.equal(with_ours, without)
    used = calls.get("moe_align_block_size", {"moealign": 0, "vllm": 0})
    # With so few routes vLLM aligns nothing at all, except where there is a map.
    assert used == {"moealign": int(expert_parallel or tokens * top_k * 4 > experts), "vllm": 0}


@on_gpu
@pytest.mark.parametrize("tokens", [1, 100, 4096])
@pytest.mark.parametrize("mapped", [False, True])
def test_in_place_as_vllm_s_operator(vllm, tokens, mapped):
    from vllm import _custom_ops as ops

    torch.manual_seed(tokens)
    ids = torch.randint(-1, 64, (tokens, 6), device="cuda", dtype=torch.int32)
    expert_map = torch.randperm(64, device="cuda", dtype=torch.int32) if mapped else None
    if expert_map is not None:
        expert_map[expert_map >= 40] = -1
    length = tokens * 6 + 64 * 15
    results = []
    for ours in (False, True):
        out = [torch.full((size,), -7, device="cuda", dtype=torch.int32) for size in (length, -(-length // 16), 1)]
        scatter = torch.full((tokens * 6, 1), -7, device="cuda", dtype=torch.int32)
        if ours:
            drop_in.install()
        try:
            ops.moe_align_block_size(ids, 64, 16, *out, expert_map, scatter)
        finally:
            drop_in.uninstall()
        total = out[2].item()
        rows = out[0][:total].view(-1, 16).sort(1).values  # vLLM's order inside an expert is its own affair
        grouped = {}
        for block, expert in zip(rows.tolist(), out[1][: total // 16].tolist(), strict=True):
            grouped.setdefault(expert, []).extend(block)
        results.append(
            (
                {expert: sorted(block) for expert, block in grouped.items()},
                out[0][total:].tolist(),
                out[1].tolist(),
                total,
                scatter.tolist(),
            )
        )
    assert results[0] == results[1]


@on_gpu
@pytest.mark.parametrize("tokens", [3, 100, 1024])
@pytest.mark.parametrize("experts", [8, 128])
def test_lora_as_vllm_s_operator(vllm, tokens, experts):
    from vllm import _custom_ops as ops

    top_k, slots, block_size = 6, 5, 16
    results = []
    for ours in (False, True):
        arguments, out, _ = lora_case(tokens, top_k, experts, block_size, slots, 0, False, device="cuda", seed=tokens)
        if ours:
            drop_in.install()
        try:
            ops.moe_lora_align_block_size(*arguments[:-1])
        finally:
            drop_in.uninstall()
        enabled, listed = arguments[-3].tolist(), arguments[-2].tolist()[: slots + 1]
        rows, blocks = out[0].view(slots, -1).tolist(), out[1].view(slots, -1).tolist()
        found = {}
        for slot in range(slots):
            if slot in listed and enabled[slot]:
                total = out[2][slot].item()
                groups = {}
                for at in range(total // block_size):
                    block = rows[slot][at * block_size : (at + 1) * block_size]
                    groups.setdefault(blocks[slot][at], []).extend(block)
                found[slot] = (total, {e: sorted(g) for e, g in groups.items()}, rows[slot][total:], blocks[slot])
        results.append(found)
    assert results[0] == results[1]
    assert results[0], "an active slot"


@on_gpu
@pytest.mark.parametrize("tokens", [1, 37, 500])  # one program and many, in vLLM
@pytest.mark.parametrize("given", ["none", "some", "all"])
def test_globalize_as_vllm_s_operator(vllm, tokens, given):
    from vllm.model_executor.layers.fused_moe.fused_globalize_align_block_size import fused_globalize_align_block_size

    torch.manual_seed(tokens)
    ids = torch.randint(-1, 30, (tokens, 6), device="cuda")  # 28 and 29 are no experts of this rank
    number = {"none": 0, "some": (tokens + 1) // 2, "all": tokens}[given]
    psum = torch.tensor([0, number // 2, number], device="cuda", dtype=torch.int32)
    results = []
    for ours in (False, True):
        if ours:
            drop_in.install()
        try:
            made, rows, blocks, total, scatter = fused_globalize_align_block_size(
                ids.clone(), psum, 56, 112, 28, 16, return_scatter_idx=True
            )
        finally:
            drop_in.uninstall()
        used = total.item()
        grouped = {}
        for block, expert in zip(rows[:used].view(-1, 16).tolist(), blocks[: used // 16].tolist(), strict=True):
            grouped.setdefault(expert, []).extend(block)
        results.append(
            (
                {expert: sorted(routes) for expert, routes in grouped.items()},
                rows[used:].tolist(),
                blocks.tolist(),
                used,
                made.tolist(),
                scatter.tolist(),
            )
        )
    assert results[0] == results[1]


@on_gpu
@pytest.mark.parametrize("batches", [1, 32, 300])
def test_batched_as_vllm_s_operator(vllm, batches):
    counts = torch.randint(0, 65, (batches,), device="cuda", dtype=torch.int32)
    results = []
    for ours in (False, True):
        if ours:
            drop_in.install()
        try:
            results.append([tensor.tolist() for tensor in own("batched_moe_align_block_size")(64, 16, counts)])
        finally:
            drop_in.uninstall()
    assert results[0] == results[1]


# ---- SGLang ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sglang():
    """The real module and hook registry.  Its parent packages import every model's processors: they are not run."""
    from moealign.integrations import sglang as hooks

    importlib.import_module("sglang.srt.plugins")
    root = Path(importlib.util.find_spec("sglang").origin).parent
    home = hooks._HOMES[0]
    layers = importlib.import_module("sglang.srt.layers")
    parent = layers
    for name in home.split(".")[3:-1]:
        package = types.ModuleType(f"{parent.__name__}.{name}")
        package.__path__ = [str(root.joinpath(*package.__name__.split(".")[1:]))]
        sys.modules[package.__name__] = package
        setattr(parent, name, package)
        parent = package
    module = importlib.import_module(home)
    importer = types.ModuleType("sglang.importer")
    importer.align = module.moe_align_block_size
    sys.modules["sglang.importer"] = importer
    hooks.call_counts.clear()
    yield types.SimpleNamespace(
        module=module, importer=importer, hooks=hooks, plugins=sys.modules["sglang.srt.plugins"]
    )
    hooks.uninstall()


@with_sglang
def test_sglang_loads_the_entry_point_and_its_function_comes_back(sglang, monkeypatch):
    from importlib.metadata import entry_points, version

    assert version("sglang").startswith("0.5."), version("sglang")
    if not any(each.name == "moealign" for each in entry_points(group="sglang.srt.plugins")):
        pytest.skip("moealign is on a path here, not installed")
    theirs = sglang.module.moe_align_block_size
    monkeypatch.setattr(sglang.plugins, "_plugins_loaded", False)
    monkeypatch.setenv("MOEALIGN_SGLANG", "0")
    sglang.plugins.load_plugins()
    assert sglang.importer.align is theirs
    for _ in range(2):
        monkeypatch.setattr(sglang.plugins, "_plugins_loaded", False)
        monkeypatch.setenv("MOEALIGN_SGLANG", "1")
        sglang.plugins.load_plugins()
        assert sglang.importer.align is sglang.module.moe_align_block_size is not theirs
        assert sglang.importer.align.__wrapped__ is theirs
    assert sglang.hooks.uninstall()
    assert sglang.importer.align is sglang.module.moe_align_block_size is theirs


@with_sglang
@pytest.mark.parametrize("ignore", [False, True])
def test_sglang_s_own_call(sglang, ignore):
    theirs = sglang.module.moe_align_block_size
    sglang.hooks.install()
    torch.manual_seed(0)
    for tokens, top_k, experts, block_size in [(1, 8, 256, 16), (64, 6, 33, 64), (5, 3, 5, 4)]:
        ids = torch.randint(-1, experts, (tokens, top_k), dtype=torch.int32)
        rows, of, total = sglang.importer.align(ids, block_size, experts, ignore)
        assert (rows.tolist(), of.tolist(), total.item()) == sglang_oracle(ids, block_size, experts, ignore)
        # The lengths are what the release's own code allocates.
        seen = {}
        sglang.module.sgl_moe_align_block_size = lambda *given, seen=seen: seen.update(rows=given[3], of=given[4])
        theirs(ids, block_size, experts, ignore)
        assert (seen["rows"].shape, seen["of"].shape) == (rows.shape, of.shape)
    totals = sglang.importer.align(ids, block_size, experts, return_inactive_prefix_count=True)[2]
    assert totals.tolist() == [sglang_oracle(ids, block_size, experts, False)[2], -(-(ids < 0).sum().item() // 4)]
    with pytest.raises(ValueError, match="Padding expert IDs requires CUDA"):  # SGLang's words, not ours
        sglang.importer.align(ids, block_size, experts, ignore, pad_expert_ids=True)
    assert sglang.hooks.calls() == {"moe_align_block_size": {"moealign": 4, "sglang": 1}}
