"""`moealign check`: is this installation right?"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from .. import __version__
from ..calls.dispatch import backends
from ..diagnosis import device_of
from ..experts.launch import refuses
from ..experts.layer import fused_moe
from ..experts.quantized import QuantizedWeights
from ..routing import route
from ..terminal import escape, paragraph, table
from ..testing import check_backend, difference, oracle_align, oracle_route
from . import checks

__all__ = ["check", "check_experts", "check_fp8", "check_route"]

ROUTER_KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"renormalize": False},
    {"scoring": "sigmoid"},
    {"num_groups": 4, "topk_groups": 2},
    {"bias": True, "num_groups": 4, "topk_groups": 2},
    {"bias": True, "scoring": "sqrtsoftplus"},
    {"factors": True, "scale": 2.5},
    {"shared_experts": 2, "scoring": "sigmoid"},
    {"replay": True, "renormalize": False},
)
RESULTS = (
    "result",
    *(f"gradient of {name}" for name in ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")),
)
MAX_ERROR, MAX_ERROR_FP8 = 1e-4, 0.1  # relative: of float32 experts, and of those whose rows are rounded to e4m3


def check_route(name: str, device: torch.device, cases: int, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """Random routers with ties against the oracle: ids and layout exactly, weights to 2e-6.

    Yields (the case in words, None or the difference).
    """
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        experts, top_k = draw.choice((8, 64, 260)), draw.choice((1, 2, 4))
        tokens, said = draw.choice((1, 7, 33)), draw.choice(ROUTER_KINDS)
        options = dict(said)
        logits = (torch.randn(tokens, experts, generator=generator) * 8).round() / 4
        tensors: dict[str, Any] = {}
        if options.pop("bias", False):
            tensors["correction_bias"] = torch.rand(experts, generator=generator) / experts
        if options.pop("factors", False):
            tensors["expert_scale"] = torch.rand(experts, generator=generator) + 0.5
        if options.pop("replay", False):
            tensors["replay_ids"] = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
        ids, weights, _ = oracle_route(logits, top_k, **tensors, **options)
        there = {key: each.to(device) for key, each in tensors.items()}
        got_weights, got_ids, layout = route(logits.to(device), top_k, block_size=16, **there, **options, backend=name)
        every = experts + options.get("shared_experts", 0)
        wanted = oracle_align(torch.tensor(ids), block_size=16, num_experts=every, ignore_invalid_experts=True)
        problem = None
        if got_ids.tolist() != ids:
            problem = "ids differ"
        elif not torch.allclose(got_weights.cpu(), torch.tensor(weights), rtol=2e-6, atol=1e-9):
            problem = "weights differ"
        else:
            problem = difference(layout, wanted)
        yield f"route: {tokens} tokens, {experts} experts, top {top_k}, {said or 'softmax'}", problem


def check_experts(backend: str, device: torch.device, cases: int, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """Random float32 layers of experts, and their gradients, against one expert after the other in float64."""
    for name, arguments, ids in _layers(cases, seed):
        toward = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(seed))
        x, gate_up, down, weights = given = [each.to(device).requires_grad_() for each in arguments]
        out = fused_moe(x, gate_up, down, weights, ids.to(device), backend=backend)
        found = (out, *torch.autograd.grad(out, given, toward.to(device), materialize_grads=True))
        x, gate_up, down, weights = exact = [each.double().requires_grad_() for each in arguments]
        out = _loop(x, gate_up, down, weights, ids)
        wanted = (out, *torch.autograd.grad(out, exact, toward.double(), materialize_grads=True))
        errors = {what: _error(*both) for what, both in zip(RESULTS, zip(found, wanted, strict=True), strict=True)}
        wrong = [f"{what}: relative error {error:.1e}" for what, error in errors.items() if not error < MAX_ERROR]
        yield f"fused_moe: {name}", wrong[0] if wrong else None


def check_fp8(backend: str, device: torch.device, cases: int, seed: int = 0) -> Iterator[tuple[str, str | None]]:
    """The same layers with FP8 weights and blocks of scales, against the weights that these stand for."""
    for name, (x, gate_up, down, weights), ids in _layers(cases, seed):
        quantized = [_quantized(each) for each in (gate_up, down)]
        one, two = (QuantizedWeights(each.data.to(device), each.scales.to(device)) for each in quantized)
        gate_up, down = (each.data.double() * each.scales.double() for each in quantized)
        with torch.no_grad():
            out = fused_moe(x.to(device), one, two, weights.to(device), ids.to(device), backend=backend)
        error = _error(out, _loop(x.double(), gate_up, down, weights.double(), ids))
        yield f"fp8: {name}", None if error < MAX_ERROR_FP8 else f"relative error {error:.1e}"


def _layers(cases: int, seed: int) -> Iterator[tuple[str, list[torch.Tensor], torch.Tensor]]:
    """What a layer is, its tensors in float32, and ids with dropped routes."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(cases):
        tokens, top_k, experts = draw.choice((1, 7, 40)), draw.choice((1, 2, 4)), draw.choice((4, 16))
        hidden, inner = draw.choice((32, 64)), draw.choice((16, 48))
        shapes = (tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner)
        arguments = [torch.randn(*shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes]
        arguments.append(torch.rand(tokens, top_k, generator=generator))
        ids = torch.randint(-1, experts, (tokens, top_k), generator=generator)
        yield f"{tokens} x {top_k} routes, {experts} experts of {inner}, width {hidden}", arguments, ids


def _loop(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Any:
    total = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        gate, up = (x @ gate_up[expert].T).chunk(2, dim=1)
        share = (weights * (ids == expert)).sum(1, keepdim=True)
        total = total + share * ((torch.nn.functional.silu(gate) * up) @ down[expert].T)
    return total


def _quantized(weights: torch.Tensor) -> QuantizedWeights:
    """In e4m3, a scale for each expert's matrix, which is one block of 128 x 128 here."""
    scale = weights.abs().amax((1, 2), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return QuantizedWeights((weights / scale).to(torch.float8_e4m3fn), scale)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().cpu().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(
    cases: Annotated[int, typer.Option(min=1, max=1_000_000, help="Random alignments per backend.")] = 200,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the random cases.")] = 0,
    as_json: checks.Json = False,
) -> None:
    """Check alignment, router and experts on this machine against plain definitions."""
    few = max(1, cases // 10)
    results = []
    with checks.progress() as progress:

        def run(
            function: str, backend: str, device: torch.device, count: int, every: Iterator[tuple[str, str | None]]
        ) -> None:
            bar = progress.add_task(f"{function} {backend}", total=count)
            wrong = []
            try:
                for case, problem in every:
                    progress.advance(bar)
                    if problem is not None:
                        wrong.append(f"{case}: {problem}")
            except Exception as error:  # a backend that fails is wrong; the others are still checked
                wrong.append(f"{type(error).__name__}: {error}")
            results.append(
                {
                    "function": function,
                    "backend": backend,
                    "device": str(device),
                    "cases": count,
                    "wrong": len(wrong),
                    "verdict": "wrong" if wrong else "ok",
                    "detail": wrong[0] if wrong else "",
                }
            )

        unavailable = {}
        for name, reason in backends().items():
            if reason is not None:
                unavailable[name] = reason
                continue
            device = device_of(name)
            run("align", name, device, cases, check_backend(name, device, cases, seed))
            run("route", name, device, few, check_route(name, device, few, seed))
        for device in {str(each): each for each in (device_of("cuda"), torch.device("cpu"))}.values():
            for name in ("triton", "packed"):
                if name == "packed" or refuses(torch.empty(0, device=device)) is None:
                    run("fused_moe", name, device, few, check_experts(name, device, few, seed))
                    run("fp8", name, device, few, check_fp8(name, device, few, seed))
    failed = any(row["wrong"] for row in results)
    if as_json:
        answer = {
            "moealign": __version__,
            "ok": not failed,
            "seed": seed,
            "results": results,
            "unavailable": unavailable,
        }
        print(json.dumps(answer, indent=2))
    else:
        names = ("function", "backend", "device", "verdict", "cases", "wrong")
        rows = [[str(row[name]) for name in names] for row in results]
        print(table(names, rows, title=f"moealign {__version__}, random cases", left=4, repeat=2))
        print(
            paragraph(
                "align: every output against the plain-loop oracle, element for element. route: experts and layout "
                "exactly, their weights to 2e-6. fused_moe: float32 and its gradients against float64, one expert "
                "after the other. fp8: experts with FP8 weights, to the rounding of their rows."
            )
        )
        for name, reason in unavailable.items():
            print(paragraph(f"{name} is unavailable: {escape(reason)}", indent=2))
        for row in results:
            if row["detail"]:
                print(
                    paragraph(f"WRONG: {row['function']} {row['backend']} on {row['device']}: {escape(row['detail'])}")
                )
        print("WRONG." if failed else "Everything that is available here is ok.")
    if failed:
        raise typer.Exit(1)
