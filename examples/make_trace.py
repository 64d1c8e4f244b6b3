"""Train a small MoE language model on CPython's standard library, and record its routing on held-out text.

    python examples/make_trace.py [--steps 600] [--device cuda] [--output stdlib-moe.safetensors]

Takes some minutes on two CPU cores.  The model is a byte-level transformer: 4 layers of causal attention and a mixture
of 64 experts, top 8 by softmax, trained with cross-entropy and the usual load-balancing loss.  Router, experts and loss
are moealign's, with their gradients, so this is also an example of training with it.

The trace holds the top 8 experts of every byte of held-out source files, in every layer.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sys
import sysconfig
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from moealign import fused_moe, route
from moealign.balance import switch_loss
from moealign.trace import Trace, save_trace

LAYERS, EXPERTS, TOP_K = 4, 64, 8
WIDTH, HIDDEN, HEADS = 128, 32, 4
WINDOW, WINDOWS_PER_STEP = 128, 16
BLOCK_SIZE = 32
BALANCE = 0.01  # weight of the load-balancing loss
RECORDED = 8192  # bytes of held-out text
MIN_STEPS = 20  # fewer leave no step for warming up the learning rate


class Mixture(nn.Module):
    """64 small experts, 8 per byte."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / math.sqrt(WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / math.sqrt(HIDDEN * 2 * LAYERS))
        self.topk_ids: Tensor = torch.empty(0)
        self.balance: Tensor = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` ``[tokens, width]`` to the same shape; store the ids in `topk_ids` and the loss term in `balance`."""
        options = {"expert_counts": True, "mean_probability": True}
        weights, self.topk_ids, layout, mean = route(self.router(x), TOP_K, block_size=BLOCK_SIZE, **options)
        self.balance = switch_loss(mean, layout.expert_counts)
        return fused_moe(x, self.up, self.down, weights, self.topk_ids, transposed=True)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mixture = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mixture = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        windows, length, _ = x.shape
        qkv = self.to_qkv(self.before_attention(x)).view(windows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.to_out(mixed.transpose(1, 2).reshape(windows, length, WIDTH))
        return x + self.mixture(self.before_mixture(x).view(-1, WIDTH)).view_as(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Map bytes ``[windows, window]`` to logits ``[windows, window, 256]``."""
        x = self.bytes(text.to(self.positions.weight.device)) + self.positions.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def read_sources() -> tuple[Tensor, Tensor, str]:
    """Training bytes, held-out bytes (one file in ten, by the hash of its name), and a hash over all files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.glob("*.py") if path.stat().st_size > 2000)
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    everything = hashlib.sha256()
    for path in files:
        text = path.read_bytes()
        everything.update(text)
        parts[hashlib.sha256(path.name.encode()).digest()[0] % 10 == 0].append(text)
    train, held_out = (torch.frombuffer(bytearray(b"".join(parts[held])), dtype=torch.uint8) for held in (False, True))
    return train, held_out, everything.hexdigest()[:16]


def warm_up(optimiser: torch.optim.Optimizer, rate: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)


def train(model: Model, text: Tensor, steps: int, rate: float) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    schedule = warm_up(optimiser, rate, steps)
    with Progress() as progress:
        bar = progress.add_task("training", total=steps)
        for step in range(steps):
            starts = torch.randint(0, text.numel() - WINDOW - 1, (WINDOWS_PER_STEP, 1))
            window = text[starts + torch.arange(WINDOW + 1)].long()
            logits = model(window[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten().to(logits.device))
            total = loss + BALANCE * sum(layer.mixture.balance for layer in model.layers)
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress.update(bar, advance=1)
            if (step + 1) % 100 == 0 or step == 0:
                progress.console.print(f"step {step + 1:5d}  loss {loss.item():.3f} nats per byte", highlight=False)


@torch.no_grad()
def record(model: Model, text: Tensor) -> tuple[Tensor, float]:
    """Ids ``[layers, bytes, k]`` of every layer over the middle of `text`, and the loss there in nats per byte."""
    start = (text.numel() - RECORDED) // 2
    text = text[start : start + RECORDED + 1].long()
    inputs, targets = text[:-1].view(-1, WINDOW), text[1:].view(-1, WINDOW)
    logits = model(inputs).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten().to(logits.device)).item()
    return torch.stack([layer.mixture.topk_ids for layer in model.layers]).cpu(), loss


def unigram(text: Tensor, held_out: Tensor) -> float:
    """Loss on `held_out` of predicting the byte frequencies of `text`, as a baseline."""
    counts = torch.bincount(text.long(), minlength=256).double() + 1
    return -(counts / counts.sum()).log()[held_out.long()].mean().item()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help=f"training steps, at least {MIN_STEPS}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument(
        "--output", type=Path, default=Path("stdlib-moe.safetensors"), help="file to write the trace to"
    )
    return parser


def checked(arguments: list[str] | None) -> argparse.Namespace:
    """The options.  What would fail after the training is refused before it."""
    options = parser().parse_args(arguments)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser().error(f"--device: expected one that torch can use, got {options.device}: {str(error).splitlines()[0]}")
    for name, low in (("steps", MIN_STEPS), ("threads", 1)):
        if getattr(options, name) < low:
            parser().error(f"--{name}: expected at least {low}, got {getattr(options, name)}")
    if options.output.is_dir() or not options.output.parent.is_dir():
        parser().error(f"--output: expected a file in an existing folder, got {options.output}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = checked(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    text, held_out, digest = read_sources()
    baseline = unigram(text, held_out)
    print(f"{text.numel():,} bytes to train on, {held_out.numel():,} held out; unigram loss {baseline:.3f}")
    model = Model().to(options.device)
    train(model, text, options.steps, 3e-3)
    topk_ids, loss = record(model, held_out)
    print(f"held-out loss {loss:.3f} nats per byte; unigram model {baseline:.3f}")
    if loss > 0.8 * baseline:
        print(
            f"warning: the held-out loss is above 0.8 of the unigram model's, so the routing means little; train for "
            f"more than {options.steps} steps",
            file=sys.stderr,
        )
    details = {
        "made_by": "examples/make_trace.py",
        "steps": options.steps,
        "seed": options.seed,
        "tokens_a_step": WINDOW * WINDOWS_PER_STEP,
        "held_out_loss": round(loss, 4),
        "unigram_loss": round(baseline, 4),
        "sources_sha256": digest,
        "torch": torch.__version__,
        "hidden": WIDTH,
        "intermediate": HIDDEN,
        "device": torch.cuda.get_device_name() if model.head.weight.is_cuda else "cpu",
    }
    trace = Trace(
        topk_ids,
        EXPERTS,
        f"byte-level transformer, {LAYERS} layers, {EXPERTS} experts of {HIDDEN}, width {WIDTH}",
        f"CPython {platform.python_version()} standard library, {RECORDED} bytes of files held out of training",
        f"CPython {platform.python_version()}",
        details,
    )
    save_trace(options.output, trace)
    print(f"{options.output}: topk_ids {list(topk_ids.shape)}, {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
