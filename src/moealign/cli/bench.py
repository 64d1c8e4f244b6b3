"""`moealign bench`."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import __version__
from .. import bench as benchmark
from ..calls.dispatch import backends
from . import checks

__all__ = ["bench"]

ON = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}  # the one device of a backend; reference runs on both
PICTURES = (".png", ".svg")


def _names(text: str | None, device: str) -> list[str]:
    """The backends in `text`, each of which must run on `device`."""
    if text is None:
        return []
    names = text.split(",")
    if unknown := [name for name in names if name not in backends()]:
        checks.fail(f"--backend: expected one of {', '.join(backends())}, got {', '.join(unknown) or 'nothing'}")
    for name in names:
        if ON.get(name, device) != device:
            checks.fail(f"--backend: expected backends that run on --device {device}, got {name}")
        if reason := backends()[name]:
            checks.fail(f"--backend: expected backends that are available here, got {name}: {reason}")
    return names


def _device(name: str | None) -> str:
    if name not in (None, "cuda", "cpu"):
        checks.fail(f"--device: expected cuda or cpu, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        checks.fail("--device: expected a GPU that torch can use, found none")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def bench(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV to write (default: ./moealign_bench_DEVICE.csv).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", hidden=True)] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Picture to write: .png or .svg (default: ./moealign_bench_DEVICE.png).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and replays.")] = False,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--bench",
            help=f"Run only this part; may be repeated: {', '.join(benchmark.BENCHES)}. On a CPU, only align.",
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backends of moealign, separated by commas (default: all that are available).")
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(help="Folder of the peers' libraries (default: the installed ones).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu (default: cuda if torch has it).")] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which only fast candidates are timed.")] = 200.0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON; write only the files that are named. docs/cli.md lists the keys."),
    ] = False,
) -> None:
    """Time moealign and the installed peers; print a table, and write a CSV and a picture to the current folder."""
    target = _device(device)
    if unknown := set(part or ()) - set(benchmark.BENCHES):
        checks.fail(f"--bench: expected one of {', '.join(benchmark.BENCHES)}, got {', '.join(sorted(unknown))}")
    if target == "cpu" and set(part or ("align",)) != {"align"}:
        checks.fail(f"--bench: expected align, the only part on a CPU, got {', '.join(part or ())}")
    names = _names(backend, target)
    if peers is not None and not peers.is_dir():
        checks.fail(f"--peers: expected a folder, got {peers}")
    if not (math.isfinite(budget) and budget >= 0):
        checks.fail(f"--budget: expected seconds of at least 0, got {budget}")
    slug = benchmark.gpu_slug(torch.cuda.get_device_name()) if target == "cuda" else "cpu"
    table, picture = output or out, figure
    if not as_json:
        table, picture = table or Path(f"moealign_bench_{slug}.csv"), figure or Path(f"moealign_bench_{slug}.png")
    if table is not None:
        checks.output("--output", table)
    if picture is not None:
        checks.output("--figure", picture, PICTURES)
    if table is not None and picture is not None:
        checks.distinct([("--output", table), ("--figure", picture)])
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        session = benchmark.measure(
            device=target, benches=part or (), quick=quick, names=names, peers=peers, budget=budget
        )
        status = benchmark.publish(session, table, picture)
    if as_json:
        answer = {
            "moealign": __version__,
            "torch": torch.__version__,
            "device": session.gpu,
            "complete": session.ended is None,
            "wrong": session.failures,
            "rows": [{name: _number(name, value) for name, value in row.items()} for row in session.rows],
        }
        print(json.dumps(answer, indent=2))
    if session.ended:
        raise session.ended
    if status:
        raise typer.Exit(status)


def _number(name: str, value: object) -> object:
    return float(str(value)) if name.endswith("_us") else value
