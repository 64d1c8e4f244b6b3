"""Names of the implementations, as they stand in the CSV files; those of peers end with a version."""

from __future__ import annotations

import re
from collections.abc import Iterable

VLLM, SGLANG, ARGSORT = "vllm-0.33.0", "sglang-kernel-0.4.4", "torch-argsort"
MOEALIGN = ["moealign-cuda", "moealign-triton", "moealign-cpu", "moealign-reference"]
PEER_KINDS = ("vllm", "sglang-kernel")
FLOORS = ["floor-empty", "floor-chain", "floor-bytes"]


def peer_kind(impl: str) -> str | None:
    """The library behind the name, None if it is no peer: ``vllm-0.33.0`` -> ``vllm``."""
    return next((kind for kind in PEER_KINDS if impl.startswith(f"{kind}-")), None)


def is_peer(impl: str) -> bool:
    return peer_kind(impl) is not None


def find_peer(impls: Iterable[str], kind: str) -> str | None:
    """The implementation of that kind, whatever its version."""
    return next((impl for impl in sorted(impls) if peer_kind(impl) == kind), None)


def in_order(impls: Iterable[str]) -> list[str]:
    """Sorted: moealign, the peers, argsort in torch, the floors, and then the rest."""
    known = [*MOEALIGN, *PEER_KINDS, ARGSORT, *FLOORS]

    def rank(impl: str) -> tuple[int, str]:
        name = peer_kind(impl) or impl
        return (known.index(name) if name in known else len(known), impl)

    return sorted(set(impls), key=rank)


def short_name(impl: str) -> str:
    """The heading of a column."""
    kind = peer_kind(impl)
    return kind.removesuffix("-kernel") if kind else impl.replace("moealign-", "").replace("torch-", "")


def gpu_slug(name: str) -> str:
    """``NVIDIA H200`` -> ``h200``, ``NVIDIA H100 80GB HBM3`` -> ``h100``, ``NVIDIA H100 PCIe`` -> ``h100-pcie``"""
    name = re.sub(r"nvidia|geforce|\b\d+gb\b|\bhbm\w*", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
