"""`moealign tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import __version__
from ..diagnosis import tuning_problem
from ..experts import tune as tuning
from ..experts.launch import refuses
from ..experts.tiles import Tile, target_of, tuning_path
from ..terminal import escape, paragraph, table
from . import checks

__all__ = ["tune"]

MAX_COUNT = 1_048_576  # experts, columns, tokens
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
Size = typer.Option(min=1, max=MAX_COUNT, help="Columns of down_proj: half of the rows of gate_up_proj.")


def describe(tile: Tile) -> str:
    """A tile by the names of its fields; those that are off are left out."""
    parts = [
        f"{tile.m} rows",
        f"{tile.n} columns",
        f"steps of {tile.k}",
        f"groups of {tile.group}",
        f"{tile.warps} warps",
        f"{tile.stages} stages",
    ]
    if tile.tma:
        parts.append("TMA for weights" if tile.tma == 1 else "TMA for weights and rows")
    if tile.ctas:
        parts.append(f"persistent, {tile.ctas} per SM")
    if tile.swap:
        parts.append("weights on the left")
    if tile.half_tile_rows:
        parts.append(f"{tile.half_tile_rows} rows for blocks with few routes")
    return ", ".join(parts)


def tune(
    experts: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Experts of the layer.")],
    top_k: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Experts per token.")],
    hidden: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Columns of the hidden states.")],
    intermediate: Annotated[int | None, Size] = None,
    inner: Annotated[int | None, typer.Option(min=1, max=MAX_COUNT, hidden=True)] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,4,16,64,256,1024,4096",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: bfloat16, float16, float32, or fp8 with bfloat16 rows.")
    ] = "bfloat16",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to add to (default: the one that fused_moe reads).")
    ] = None,
) -> None:
    """Find fast tiles for fused_moe on this GPU, and write them to a file that other machines can use."""
    counts = checks.ints("--tokens", tokens, MAX_COUNT)
    if dtype not in DTYPES:
        checks.fail(f"--dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    if top_k > experts:
        checks.fail(f"--top-k: expected at most --experts = {experts}, got {top_k}")
    width = intermediate or inner
    if width is None or (intermediate and inner and intermediate != inner):
        checks.fail(f"--intermediate: expected one width inside an expert, got {'two' if width else 'none'}")
    shape = tuning.Shape(experts, top_k, hidden, width, DTYPES[dtype])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    target = target_of(device)
    path = output or tuning_path(target)
    if path is None:
        checks.fail("--output: expected a file, as the cache folder cannot be used; pass one or set MOEALIGN_TUNING")
    if path.exists() and (wrong := tuning_problem(str(path))):
        checks.fail(f"--output: {wrong}")
    if output is None and refuses(torch.empty(0, dtype=shape.rows, device=device)) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    if output is not None or path.parent.is_dir():
        checks.output("--output", path)
    _check_memory(shape, counts, device)
    about = {"device": target.name, "torch": torch.__version__, "moealign": __version__}
    rows = []
    for one in tuning.tune(shape, counts, device):
        tuning.write(path, shape, [one], about)  # at once: an interrupted search keeps what it has
        rule, best, gain = f"{one.by_rule:,.1f}", f"{one.microseconds:,.1f}", f"{one.by_rule / one.microseconds:.2f}x"
        rows.append([f"{one.tokens:,}", str(one.tried), rule, best, gain])
        print(f"{one.tokens:,} tokens: {best} us, by the rule {rule} us ({gain}), {one.tried} plans tried")
        block = f"{one.tiles.block_size} rows" if one.tiles.block_size else "none, each route is a tile"
        lines = {"blocks": block, "gate_up_proj": describe(one.tiles.first), "down_proj": describe(one.tiles.second)}
        for name, text in lines.items():
            print(paragraph(f"  {name:<12}  {text}", indent=16))
    print()
    print(table(["tokens", "plans", "rule us", "best us", "gain"], rows, title=shape.key, left=0))
    print(paragraph(f"Written: {escape(path)}; set MOEALIGN_TUNING to its path to use it elsewhere"))


def _check_memory(shape: tuning.Shape, counts: list[int], device: torch.device) -> None:
    """Refuse a layer whose weights and rows do not fit."""
    if device.type != "cuda":
        return
    weights = 3 * shape.experts * shape.hidden * shape.inner * shape.dtype.itemsize
    of_token = shape.top_k * (shape.hidden + 3 * shape.inner) + tuning.SLOTS * shape.hidden
    rows = max(counts) * of_token * shape.rows.itemsize
    free = torch.cuda.mem_get_info(device)[0]
    if weights + rows > 0.8 * free:
        checks.fail(
            f"expected a layer that fits in 0.8 of the free {free / 2**30:.1f} GiB, got {weights / 2**30:.1f} GiB of "
            f"weights and {rows / 2**30:.1f} GiB of rows; lower --experts, --tokens or the widths"
        )
