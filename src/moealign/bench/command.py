"""The command line of ``python -m moealign.bench`` and of ``benchmarks/align.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import measure, publish
from .benches import BENCHES
from .peers import probe_sglang
from .progress import log


def parse(arguments: Sequence[str] | None, peers: Path | None = None, device: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time moealign, its peers, the torch formulation and the floors side by side in one process."
    )
    parser.add_argument("--bench", action="append", choices=BENCHES, help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a few sizes, fewer replays")
    parser.add_argument(
        "--backend", "--backends", dest="backends", help="of moealign, joined by commas (default: all on the device)"
    )
    parser.add_argument("--peers", type=Path, default=peers, help="folder of the peers' libraries")
    parser.add_argument("-o", "--output", "--out", dest="out", type=Path, help="CSV to write")
    parser.add_argument("--figure", type=Path, help="figure to draw, .png or .svg")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which only the fast ones are timed")
    parser.add_argument("--probe-sglang", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str] | None = None,
    *,
    peers: Path | None = None,
    device: str | None = None,
    tracked: Path | None = None,
    program: str = "moealign.bench",
) -> int:
    """Measure and publish; returns the exit status.

    Args:
        arguments: of the command line.
        peers: default of ``--peers``.
        device: default of ``--device``.
        tracked: folder that receives ``align_<gpu>.csv`` from a complete run on a GPU.
        program: name in the messages.
    """
    args = parse(arguments, peers, device)
    if args.device == "cuda" and not torch.cuda.is_available():
        hint = "; benchmarks/align_cpu.py is for the CPU" if tracked else "; --device cpu needs none"
        log(f"{program}: expected a GPU that torch can use, found none{hint}")
        return 2
    if args.probe_sglang:
        return probe_sglang(args.probe_sglang)
    session = measure(
        device=args.device,
        benches=args.bench or (),
        quick=args.quick,
        names=args.backends.split(",") if args.backends else (),
        peers=args.peers,
        budget=args.budget,
    )
    complete = session.device.type == "cuda" and not (args.quick or args.bench or args.backends or session.ended)
    out = args.out or (tracked / f"align_{session.gpu}.csv" if tracked and complete else None)
    if tracked and out is None:
        log("an incomplete run: the tracked CSV stays as it is (--output writes another)")
    status = publish(session, out, args.figure)
    if session.ended:
        raise session.ended
    return status
