#!/usr/bin/env python3
"""The plug-ins inside the real vLLM 0.33.0 and SGLang, taken from their released wheels, on a machine without a GPU.

    python tests/real_engines.py                 # fetches what it needs into out/engines, then checks both
    python tests/real_engines.py --engine vllm

vLLM's Python files and the small packages that they import are installed in an environment of their own, on top of this
one's torch; no compiled part is needed.  Its plug-in loader, its modules and its wrappers are the real ones.  SGLang's
package needs torchvision, of which there is no build for CPUs everywhere: its plug-in loader, its hook registry and the
module with the function are the real files, its settings and device queries stand-ins.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import types
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "out" / "engines"
WHEELS = {"vllm": "vllm==0.33.0", "sglang": "sglang==0.5.23"}
SMALL = [
    "psutil",
    "pyzmq",
    "cbor2",
    "aiohttp",
    "openai",
    "openai-harmony",
    "sniffio",
    "pillow",
    "pybase64",
    "cachetools",
    "msgspec",
    "cloudpickle",
    "uvloop",
    "py-cpuinfo",
    "prometheus-client",
    "apache-tvm-ffi",
    "fastapi",
    "starlette",
    "opentelemetry-api",
    "opentelemetry-sdk",
    "partial-json-parser",
    "llguidance",
    "einops",
    "regex",
    "pydantic",
    "transformers>=5.16,<5.21",
]
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64", "any")


def fetch(engine: str) -> Path:
    """The Python files of the engine's wheel, unpacked once."""
    folder = FOLDER / engine
    if not (folder / engine).exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            command += ["--python-version", "3.12", "--implementation", "cp", "-d", scratch, WHEELS[engine]]
            for platform in PLATFORMS:
                command += ["--platform", platform]
            subprocess.run(command, check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith((".py", ".json")) or ".dist-info/" in name:
                        archive.extract(name, folder)
    return folder


def environment(engine: str) -> Path:
    """A Python that has this one's packages, moealign with its entry points, and the engine."""
    home = FOLDER / f"{engine}-env"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "below.pth").write_text(sysconfig.get_path("purelib"))
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        if engine == "vllm":
            subprocess.run([*pip, *SMALL], check=True)
            subprocess.run([*pip, "--no-deps", "xgrammar"], check=True)
        subprocess.run([*pip, "hatchling"], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", str(ROOT)], check=True)
        (site / "engine.pth").write_text(str(fetch(engine)))
        (home / "ready").touch()
    else:  # as it is today
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, "--force-reinstall", "--no-build-isolation", str(ROOT)], check=True)
    return python


# --------------------------------------------------------------------------------------------------------- inside vLLM

USERS = ("fused_moe", "experts.triton_moe", "experts.marlin_moe", "experts.fused_humming_moe",
         "experts.nvfp4_emulation_moe", "experts.mxfp8_native_moe", "experts.rdna3_moe")  # fmt: skip


def inside_vllm() -> None:
    import torch

    from moealign.integrations import describe, vllm
    from moealign.testing import assert_same_layout, oracle_align, oracle_align_batched

    layers = "vllm.model_executor.layers.fused_moe"
    plugins = importlib.import_module("vllm.plugins")
    home = importlib.import_module(f"{layers}.moe_align_block_size")
    ops = importlib.import_module("vllm._custom_ops")
    names = ("moe_align_block_size", "batched_moe_align_block_size")
    before = [getattr(module, name) for module in (home, ops) for name in names]

    users = []
    for user in USERS:
        try:
            users.append(importlib.import_module(f"{layers}.{user}"))
        except ImportError as missing:
            print(f"  left out, it needs more than a CPU has: {user} ({missing})")
    assert len(users) >= 5, users

    def load(value: str | None) -> None:
        os.environ.pop("MOEALIGN_VLLM", None)
        if value is not None:
            os.environ["MOEALIGN_VLLM"] = value
        plugins.plugins_loaded = False
        plugins.load_general_plugins()

    for value in (None, "0"):
        load(value)
        assert [getattr(module, name) for module in (home, ops) for name in names] == before
        assert "off" in describe()["vllm"], describe()
    load("1")
    load("1")
    assert "on in every process" in describe()["vllm"], describe()
    patch = vllm.status()
    assert patch is not None
    replaced = [module for module in users if module.moe_align_block_size is not before[0]]
    assert replaced == users
    assert all(module.moe_align_block_size is home.moe_align_block_size for module in users)
    assert len(patch.pairs) == 4
    marlin = sys.modules[f"{layers}.experts.marlin_moe"]
    assert marlin.batched_moe_align_block_size is home.batched_moe_align_block_size
    print(f"  replaced in {len(patch.places)} places, in {len(users)} modules that use the function")

    # Through a module that imported it by name, as vLLM's layers call it.
    align = sys.modules[f"{layers}.fused_moe"].moe_align_block_size
    ids = torch.randint(-1, 64, (33, 6), dtype=torch.int32)
    local = torch.where(torch.arange(64) % 2 == 0, torch.arange(64) // 2, -1).to(torch.int32)
    fields = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
    for given in ({}, {"pad_sorted_ids": True}, {"expert_map": local},
                  {"expert_map": local, "ignore_invalid_experts": True}):  # fmt: skip
        got = align(ids, 16, 64, **given)
        assert_same_layout(
            dict(zip(fields, got, strict=True)), oracle_align(ids, block_size=16, num_experts=64, **given)
        )
    *three, scatter = align(ids, 16, 64, local, ignore_invalid_experts=True, return_scatter_idx=True)
    want = oracle_align(ids, block_size=16, num_experts=64, expert_map=local, ignore_invalid_experts=True)
    assert_same_layout({**dict(zip(fields, three, strict=True)), "scatter_idx": scatter}, want)
    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32)
    got = marlin.batched_moe_align_block_size(8, 4, counts)
    want = oracle_align_batched(counts, max_tokens_per_batch=8, block_size=4)
    assert_same_layout(dict(zip(fields, got, strict=True)), want)

    # The operators' own forms, into the caller's buffers, longer ones too.
    want = oracle_align(ids, block_size=16, num_experts=64, expert_map=local, ignore_invalid_experts=True)
    rows, blocks = len(want["sorted_token_ids"]), len(want["expert_ids"])
    for more in (0, 7, 40):
        buffers = [torch.full((size,), -9, dtype=torch.int32) for size in (rows + more, blocks + more, 1, ids.numel())]
        ops.moe_align_block_size(ids, 64, 16, *buffers[:3], local, buffers[3].view(-1, 1))
        assert buffers[0].tolist()[:rows] == want["sorted_token_ids"]
        assert set(buffers[0].tolist()[rows:]) <= {ids.numel()}
        assert buffers[1].tolist()[:blocks] == want["expert_ids"]
        assert set(buffers[1].tolist()[blocks:]) <= {-1}
        assert buffers[2].tolist() == want["num_tokens_post_padded"]
        assert buffers[3].tolist() == want["scatter_idx"]
    taken = dict(patch.taken)
    assert taken["moe_align_block_size"] == 8, taken
    assert taken["batched_moe_align_block_size"] == 1, taken

    # What moealign refuses goes to vLLM, which has no kernel here and says so; both refusals are counted.
    said = ""
    try:
        align(ids.float(), 16, 64)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        said = str(error)
    assert "_moe_C" in said or "moe_align_block_size" in said, f"vLLM's own function was not called: {said}"
    assert sum(patch.refused.values()) == 2, patch.refused
    assert dict(patch.taken) == taken

    vllm.uninstall()
    assert [getattr(module, name) for module in (home, ops) for name in names] == before
    assert all(module.moe_align_block_size is before[0] for module in users)
    assert vllm.status() is None


# ------------------------------------------------------------------------------------------------------- inside SGLang


def stand_in(name: str, **content: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


class Setting:
    """A setting of SGLang's that is not set."""

    def get(self) -> None:
        return None


class Settings:
    def __getattr__(self, name: str) -> Setting:
        return Setting()


def inside_sglang(folder: Path) -> None:
    import torch

    from moealign.integrations import describe, sglang
    from moealign.testing import oracle_align

    package = folder / "sglang"
    for name in ("", ".srt", ".srt.layers", ".srt.layers.moe", ".srt.layers.moe.moe_runner",
                 ".srt.layers.moe.moe_runner.triton_utils"):  # fmt: skip
        stand_in(f"sglang{name}", __path__=[str(package.joinpath(*name.split(".")[1:]))])
    no = dict.fromkeys(("is_cuda", "is_hip", "is_xpu", "is_musa"), lambda: False)
    stand_in("sglang.srt.utils", **no)
    stand_in("sglang.srt.environ", envs=Settings())

    home = importlib.import_module(sglang.HOMES[0])
    theirs = home.moe_align_block_size
    user = stand_in("sglang.srt.a_user", moe_align_block_size=theirs)
    plugins = importlib.import_module("sglang.srt.plugins")

    def load(value: str | None) -> None:
        os.environ.pop("MOEALIGN_SGLANG", None)
        if value is not None:
            os.environ["MOEALIGN_SGLANG"] = value
        plugins._plugins_loaded = False
        plugins.load_plugins()

    load(None)
    assert home.moe_align_block_size is theirs
    assert "off" in describe()["sglang"], describe()

    def check(align: object) -> None:
        for experts, tokens in ((8, 40), (64, 3)):
            ids = torch.randint(-1, experts, (tokens, 4), dtype=torch.int32)
            # SGLang's rule, from its own text: one bin more than experts, for -1, which comes first.
            want = oracle_align(ids + 1, block_size=16, num_experts=experts + 1, pad_sorted_ids=True)
            got = align(ids, 16, experts)
            n = ids.numel()
            length = n * 16 if n < experts + 1 else n + (experts + 1) * 15
            assert len(got[0]) == -(-length // 4) * 4
            assert len(got[1]) == -(-len(got[0]) // 16)
            assert got[0].tolist() == want["sorted_token_ids"][: len(got[0])]
            used = want["num_tokens_post_padded"][0] // 16
            assert got[1].tolist()[:used] == [name - 1 for name in want["expert_ids"][:used]]
            assert got[2].tolist() == want["num_tokens_post_padded"]
            want = oracle_align(ids, block_size=16, num_experts=experts + 1, pad_sorted_ids=True)
            got = align(ids, 16, experts, ignore_invalid_expert=True)
            assert got[0].tolist() == want["sorted_token_ids"][: len(got[0])]
            assert got[1].tolist() == want["expert_ids"]

    load("1")
    load("1")
    assert "on in every process" in describe()["sglang"], describe()
    assert home.moe_align_block_size is not theirs
    assert user.moe_align_block_size is home.moe_align_block_size
    check(user.moe_align_block_size)
    patch = sglang.status()
    assert patch is not None
    assert patch.taken["moe_align_block_size"] == 4, patch.taken
    said = ""
    try:  # refused by moealign, and then by SGLang, in its own words
        user.moe_align_block_size(torch.zeros(1, 2, dtype=torch.int32), 16, 8, pad_expert_ids=True)
    except ValueError as error:
        said = str(error)
    assert "requires CUDA" in said, said
    assert sum(patch.refused.values()) == 1

    # The other way in: install() and uninstall() by hand.
    sglang._patch = None
    home.moe_align_block_size = user.moe_align_block_size = theirs
    sglang.install()
    sglang.install()
    assert user.moe_align_block_size is home.moe_align_block_size is not theirs
    check(home.moe_align_block_size)
    sglang.uninstall()
    assert home.moe_align_block_size is user.moe_align_block_size is theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=sorted(WHEELS), action="append")
    parser.add_argument("--inside", choices=sorted(WHEELS), help="run the checks in this process")
    options = parser.parse_args()
    if options.inside:
        inside_vllm() if options.inside == "vllm" else inside_sglang(FOLDER / "sglang")
        return
    for engine in options.engine or sorted(WHEELS):
        python = environment(engine)
        print(f"{WHEELS[engine]}:", flush=True)
        subprocess.run([str(python), str(Path(__file__).resolve()), "--inside", engine], check=True)
        print("  1 passed, 0 failed", flush=True)


if __name__ == "__main__":
    main()
