"""vLLM's layer of experts by its Triton kernel, taken out of the released wheel."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Shape

from moealign.layout import cdiv

PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 34, 35)]
KERNEL = "vllm_fused_moe.py"
QUANTISING = "vllm/model_executor/layers/quantization/utils/fp8_utils.py"
GROUP = 128  # columns of a row, and outputs and inputs of weights, that share a scale


def fetch(folder: Path) -> None:
    """Download the wheel and extract vLLM's Triton kernel, its default configuration and its tuned ones."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", "--implementation", "cp", "-d", scratch, "vllm==0.33.0"]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        subprocess.run(command, check=True)
        extract(next(Path(scratch).glob("*.whl")), folder)


def extract(wheel: Path, folder: Path) -> None:
    base = "vllm/model_executor/layers/fused_moe/"
    with zipfile.ZipFile(wheel) as archive:
        sources = [archive.read(base + "fused_moe.py").decode(), archive.read(QUANTISING).decode()]
        configs = {}
        for name in archive.namelist():
            match = re.fullmatch(
                re.escape(base)
                + r"configs/E=(\d+),N=(\d+),device_name=([^,]+)(,dtype=fp8_w8a8,block_shape=\[128,128\])?\.json",
                name,
            )
            if match:
                *names, fp8 = match.groups()
                configs["/".join(names) + "/fp8" * bool(fp8)] = json.loads(archive.read(name))
    functions = {"write_zeros_to_output", "fused_moe_kernel", "get_default_config", "_per_token_group_quant_fp8"}
    parts = ["import types", "import triton", "import triton.language as tl"]
    parts.append("envs = types.SimpleNamespace(VLLM_BATCH_INVARIANT=False)")
    parts.append("current_platform = types.SimpleNamespace(is_rocm=lambda: False)")
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                parts.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    parts.append(f"CONFIGS = {configs!r}")
    (folder / KERNEL).write_text("\n\n".join(parts) + "\n")
    print(f"{folder / KERNEL}: {len(configs)} tuned configurations")


def load_kernel(folder: Path) -> types.ModuleType | None:
    path = folder / KERNEL
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("vllm_fused_moe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(
    module: types.ModuleType, shape: Shape, tokens: int, device: str, tuned: bool, fp8: bool = False
) -> dict[str, int] | None:
    """The default configuration, or the one that the wheel ships for `device`; None if it ships none."""
    experts, top_k, hidden, inner = shape
    if not tuned:
        scheme = ("fp8_w8a8", [GROUP, GROUP]) if fp8 else (None,)
        config: dict[str, int] = module.get_default_config(tokens, experts, inner, hidden, top_k, *scheme)
        return config
    configs = module.CONFIGS.get(f"{experts}/{inner}/{device.replace(' ', '_')}{'/fp8' * fp8}")
    if configs is None:
        return None
    sizes = {int(key): value for key, value in configs.items() if key.isdigit()}
    nearest: dict[str, int] = sizes[min(sizes, key=lambda size: abs(size - tokens))]
    return nearest


def launch_of(
    config: dict[str, int],
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    weights: torch.Tensor | None,
    sorted_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    total: torch.Tensor,
    top_k: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and constants of one launch, as invoke_fused_moe_triton_kernel passes them; `scales` of FP8 rows
    and weights."""
    import triton.language as tl

    tokens, size = a.shape[0], config["BLOCK_SIZE_M"]
    routes = tokens * top_k
    if sorted_ids is None:
        rows = routes * size
    else:
        rows = sorted_ids.shape[0]
        if tokens < size:
            rows = min(rows, routes * size)
    grid = (cdiv(rows, size) * cdiv(b.shape[1], config["BLOCK_SIZE_N"]),)
    of_rows, of_weights = scales or (None, None)
    steps: tuple[int, ...] = (0,) * 9
    if of_rows is not None and of_weights is not None:
        expert, outputs, inputs = of_weights.stride()
        steps = (*of_rows.stride(), expert, inputs, outputs, 0, 0, GROUP, GROUP)
    # fmt: off
    arguments = (
        a, b, c, None, of_rows, of_weights, weights, sorted_ids, expert_ids, total,
        b.shape[1], b.shape[2], rows, routes,
        a.stride(0), a.stride(1), b.stride(0), b.stride(2), b.stride(1), c.stride(-2), c.stride(-1),
        *steps,
    )
    # fmt: on
    constants = {
        "naive_block_assignment": sorted_ids is None,
        "MUL_ROUTED_WEIGHT": weights is not None,
        "top_k": top_k,
        "compute_type": tl.bfloat16,
        "use_fp8_w8a8": scales is not None,
        "use_int8_w8a8": False,
        "use_int8_w8a16": False,
        "per_channel_quant": False,
        "HAS_BIAS": False,
        "SWAP_AB": scales is not None and size < 64 and config["BLOCK_SIZE_N"] >= 64,
        "USE_TD": False,
        "SPLIT_K": 1,
        **config,
    }
    return grid, arguments, constants


def compile_kernel(
    module: types.ModuleType, config: dict[str, int], shape: Shape, tokens: int, fp8: bool = False
) -> None:
    """Compile both products into Triton's cache."""
    experts, top_k, hidden, inner = shape
    routes = tokens * top_k

    def new(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    sorted_ids = None if naive(routes, experts) else new(routes * config["BLOCK_SIZE_M"], dtype=torch.int32)
    expert_ids, total = new(routes, dtype=torch.int32), new(1, dtype=torch.int32)
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    first = (new(tokens, hidden, dtype=kind), new(experts, 2 * inner, hidden, dtype=kind), None, top_k)
    factors = new(tokens, top_k, dtype=torch.float32)
    second = (new(routes, inner, dtype=kind), new(experts, hidden, inner, dtype=kind), factors, 1)
    for a, b, weights, choices in (first, second):
        c, scales = new(routes, b.shape[1]), None
        if fp8:
            groups = cdiv(a.shape[1], GROUP)
            of_weights = new(experts, cdiv(b.shape[1], GROUP), groups, dtype=torch.float32)
            scales = new(a.shape[0], groups, dtype=torch.float32), of_weights
        grid, arguments, constants = launch_of(config, a, b, c, weights, sorted_ids, expert_ids, total, choices, scales)
        module.fused_moe_kernel.warmup(*arguments, **constants, grid=grid)


def naive(routes: int, experts: int) -> bool:
    """Whether vLLM assigns each route a block of its own instead of aligning."""
    return routes * 4 <= experts


def silu_mul_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def silu_mul(x, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(x + row * 2 * width + at, mask=at < width).to(tl.float32)
        up = tl.load(x + row * 2 * width + width + at, mask=at < width).to(tl.float32)
        result = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32) * up
        tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=at < width)

    silu_mul.fn.__globals__["tl"] = tl
    return silu_mul


def quantise(module: types.ModuleType, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's per_token_group_quant_fp8: e4m3 values, and a scale for each GROUP of columns."""
    values = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows.shape[0], rows.shape[1] // GROUP, dtype=torch.float32, device=rows.device)
    module._per_token_group_quant_fp8[(scales.numel(),)](
        rows, values, scales, GROUP, rows.shape[1], rows.stride(0), 1e-10,
        fp8_min=-448.0, fp8_max=448.0, use_ue8m0=False, BLOCK=GROUP, num_warps=1, num_stages=1,
    )  # fmt: skip
    return values, scales


def vllm_layer(
    layer: Any, module: types.ModuleType, config: dict[str, int], silu_mul: Any, fp8: bool = False
) -> Callable[[int], torch.Tensor]:
    """The call of the layer's slot; `layer` is a Layer of experts.py."""
    experts, top_k, hidden, inner = layer.shape
    tokens, routes = layer.tokens, layer.tokens * top_k
    size = config["BLOCK_SIZE_M"]
    gate_up, down = [one.data for one in layer.quantized] if fp8 else layer.weights
    scales_of = {id(one.data): one.scales for one in layer.quantized} if fp8 else {}

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def call(slot: int) -> torch.Tensor:
        x, weights, ids = layer.inputs[slot]
        shared = new(routes * max(2 * inner, hidden))
        first, second = shared[: routes * 2 * inner].view(routes, -1), shared[: routes * hidden].view(routes, -1)
        activated, out = new(routes, inner), torch.empty_like(x)
        if naive(routes, experts):
            sorted_ids, expert_ids = None, ids.view(-1)
            total = torch.full((1,), routes * size, dtype=torch.int32, device="cuda")
        else:
            length = routes + experts * (size - 1)
            if routes < experts:
                length = min(routes * size, length)
            sorted_ids, total = new(length, dtype=torch.int32), new(1, dtype=torch.int32)
            expert_ids = new(cdiv(length, size), dtype=torch.int32)
            torch.ops._moe_C.moe_align_block_size(ids, experts, size, sorted_ids, expert_ids, total, None, None)
        for a, b, c, w, k in ((x, gate_up, first, None, top_k), (activated, down, second, weights, 1)):
            rows, scales = quantise(module, a) if fp8 else (a, None)
            both = None if scales is None else (scales, scales_of[id(b)])
            grid, arguments, constants = launch_of(config, rows, b, c, w, sorted_ids, expert_ids, total, k, both)
            module.fused_moe_kernel[grid](*arguments, **constants)
            if w is None:
                silu_mul[(routes, cdiv(inner, 1024))](first, activated, inner, BLOCK=1024)
        torch.ops._moe_C.moe_sum(second.view(tokens, top_k, hidden), out)
        return out

    return call
