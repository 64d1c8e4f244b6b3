"""Tile configurations for the fused MoE kernels of vLLM and SGLang, with the block sizes that a study advises.

Both engines look for ``E=<experts>,N=<intermediate>,device_name=<device>.json``: an object from numbers of tokens to
the tile of a batch of about that size.  A trace decides ``BLOCK_SIZE_M`` alone; the other entries are defaults.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..costs import Experts
from ..errors import InvalidInput
from ..trace import Trace
from .analysis import Study

__all__ = [
    "BLOCK_SIZES",
    "check_configuration",
    "configuration",
    "configuration_paths",
    "device_name",
    "write_configuration",
]

BLOCK_SIZES = (16, 32, 64, 128, 256)  #: that the engines' kernels take
_STAGES_BYTES = 96 * 1024  # of shared memory; small GPUs have 99 KiB


def check_configuration(trace: Trace, sizes: Sequence[int], experts_source: str, device: str) -> None:
    """Refuse what no file can be written for, before there is a study; the arguments are those of a study.

    Raises:
        InvalidInput: `device` is empty, the trace has no routes or no sizes, or a block size is none that the engines
            take.
    """
    if not device.strip():
        raise InvalidInput(
            "engine configuration: expected the name of the GPU, which names the file, got none; pass --device-name, "
            "as in 'NVIDIA H100 80GB HBM3'"
        )
    if not bool((trace.topk_ids >= 0).any()):
        raise InvalidInput("engine configuration: expected a trace with routes, got one without")
    if experts_source == "assumed":
        raise InvalidInput(
            "engine configuration: expected the sizes of an expert, which name the file, got a trace without; pass "
            "--hidden and --intermediate"
        )
    invalid = [size for size in sizes if size not in BLOCK_SIZES]
    if invalid:
        raise InvalidInput(
            f"engine configuration: expected block sizes among {', '.join(map(str, BLOCK_SIZES))}, got "
            f"{', '.join(map(str, invalid))}; pass other --block-size"
        )


def configuration(study: Study) -> dict[str, dict[str, int]]:
    """For each number of tokens, as a string, the tile of a batch."""
    advised = {row.tokens: row.block_size for row in study.by_tokens}
    advised |= {each.tokens: each.block_size for each in study.advice}  # measured, on a GPU
    return {str(tokens): _tile(tokens, size, study.trace.num_experts) for tokens, size in sorted(advised.items())}


def _tile(tokens: int, block_size: int, num_experts: int) -> dict[str, int]:
    """A tile of `block_size` rows that fits any GPU; everything else as in the engines' own defaults for 16-bit
    weights: few tokens wait for weights, so they get deep tiles, many get wide ones."""
    few = tokens <= 64
    columns, depth = (64, 128) if few else (128, 64)
    stage = 2 * depth * (block_size + columns)
    return {
        "BLOCK_SIZE_M": block_size,
        "BLOCK_SIZE_N": columns,
        "BLOCK_SIZE_K": depth,
        "GROUP_SIZE_M": 16 if tokens > 128 * num_experts else 1,
        "num_warps": 4 if tokens <= 128 and block_size < 128 else 8,
        "num_stages": min(4, max(2, _STAGES_BYTES // stage)),
    }


def device_name(name: str) -> str:
    """The name of a device in file names of vLLM, which has one for all H200."""
    escaped = re.sub(r"[\s/]+", "_", name.strip())
    return "NVIDIA_H200" if "H200" in escaped.split("_") else escaped


def configuration_paths(trace: Trace, experts: Experts, folder: Path, device: str) -> list[Path]:
    """The files of :func:`write_configuration`."""
    start = f"E={trace.num_experts},N={experts.intermediate},device_name="
    paths = [folder / f"{start}{device_name(device)}.json"]
    try:
        version = importlib.metadata.version("triton").split("+")[0].replace(".", "_")
        paths.append(folder / "configs" / f"triton_{version}" / f"{start}{device.strip().replace(' ', '_')}.json")
    except importlib.metadata.PackageNotFoundError:
        pass
    return paths


def write_configuration(study: Study, folder: Path, device: str) -> list[Path]:
    """Write the configuration for vLLM into `folder`.  If Triton is installed here, also write it for SGLang, into
    ``folder/configs/triton_<version>``.

    vLLM reads it with ``VLLM_TUNED_CONFIG_FOLDER=folder``, SGLang with ``SGLANG_MOE_CONFIG_DIR=folder``.

    Raises:
        InvalidInput: as :func:`check_configuration`.
    """
    check_configuration(study.trace, study.sizes, study.experts_source, device)
    text = json.dumps(configuration(study), indent=4) + "\n"
    paths = configuration_paths(study.trace, study.experts, folder, device)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return paths
