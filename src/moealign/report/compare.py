"""Two traces side by side: of two texts, two models, or a model before and after training."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import placement
from ..errors import InvalidInput
from ..terminal import escape
from .analysis import Study
from .figures import Panel
from .page import FORMATS, document, figure_section, table_of
from .summary import as_json, context_lines, gaps_text
from .theme import ADAPTIVE, LIGHT, Theme, drawing, save_adaptive

__all__ = ["Comparison", "compare", "comparison_json", "comparison_lines", "write_comparison"]

_RANKS = 8  # of the placement that is carried over


@dataclass(frozen=True)
class Comparison:
    """Two studies, and how alike their loads are."""

    studies: tuple[Study, Study]
    overlap: npt.NDArray[np.float64] | None  # [layers] share of the routes that both spread alike
    carried: tuple[float, float] | None  # imbalance of the second under its own and under the first's placement
    ranks: int

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, value of the first, value of the second."""
        first, second = ([*_values(study)] for study in self.studies)
        names = {**dict.fromkeys(name for name, _ in first), **dict.fromkeys(name for name, _ in second)}
        values = dict(first), dict(second)
        return [(name, values[0].get(name, "-"), values[1].get(name, "-")) for name in names]

    def notes(self) -> list[str]:
        """What the traces have in common."""
        empty = [name for name, study in zip("AB", self.studies, strict=True) if not study.loads.any()]
        if empty:
            return [f"{' and '.join(empty)} {'has' if len(empty) == 1 else 'have'} no routes: nothing to compare."]
        if self.overlap is None:
            return ["The traces have different numbers of layers or experts, so their experts are not compared."]
        notes = [
            f"Expert by expert, {self.overlap.mean():.0%} of the load is the same (100% if both spread their routes "
            f"alike; lowest in layer {int(self.overlap.argmin())}, {self.overlap.min():.0%})."
        ]
        if self.carried is not None:
            own, other = self.carried
            notes.append(
                f"On {self.ranks} ranks, the busiest rank of B has {own:.2f}x the mean load if B's loads decide the "
                f"placement, and {other:.2f}x if those of A do."
            )
        return notes

    def gaps(self) -> list[str]:
        """What the traces lack."""
        texts = [gaps_text(study.trace) for study in self.studies]
        return [f"{name}: {text}" for name, text in zip("AB", texts, strict=True) if text]


def compare(first: Study, second: Study) -> Comparison:
    """Compare two studies; experts only if both have routes to equally many of them in equally many layers."""
    if first.loads.shape != second.loads.shape or not (first.loads.any() and second.loads.any()):
        return Comparison((first, second), None, None, _RANKS)
    shares = [loads / np.maximum(loads.sum(axis=1, keepdims=True), 1) for loads in (first.loads, second.loads)]
    ranks = min(_RANKS, first.trace.num_experts)
    carried = None
    if first.gains and second.gains:
        own, other = (_imbalance(study.loads, second.loads, ranks) for study in (second, first))
        carried = (own, other)
    return Comparison((first, second), np.minimum(*shares).sum(axis=1), carried, ranks)


def _imbalance(known: npt.NDArray[np.int64], judged: npt.NDArray[np.int64], ranks: int) -> float:
    """Busiest rank over the mean, over all layers, where placements follow from `known` ``[layers, experts]``."""
    busiest = [placement.rank_loads(placement.balanced(a, ranks), b).max() for a, b in zip(known, judged, strict=True)]
    return float(sum(busiest)) * ranks / float(judged.sum()) if judged.any() else 1.0


def _values(study: Study) -> list[tuple[str, str]]:
    trace = study.trace
    found = [
        ("model", trace.model),
        ("source", trace.source),
        ("layers", f"{trace.layers}"),
        ("tokens", f"{trace.tokens:,}"),
        ("experts", f"top {trace.top_k} of {trace.num_experts}"),
        ("size of an expert", f"{study.experts}, {study.experts_source}"),
        ("idle experts", f"{int((study.loads == 0).sum()):,} of {study.loads.size:,}"),
        ("imbalance", f"{study.imbalance.mean():.2f} in " + (f"{study.window:,} tokens" if study.window else "a call")),
    ]
    for each in study.advice:
        how = "measured" if each.measured else "modelled"
        found += [
            (f"{each.kind}: tokens per batch", f"{each.tokens:,}"),
            (f"{each.kind}: block size", f"{each.block_size}"),
            (f"{each.kind}: padding", f"{each.wasted:.1%}"),
            (f"{each.kind}: alignment's share of a layer, {how}", f"{each.share:.1%}"),
        ]
    for gain in study.gains:
        found.append((f"{gain.ranks} ranks: linear, balanced", f"{gain.linear:.2f}, {gain.balanced:.2f}"))
    return found


def comparison_lines(comparison: Comparison) -> list[str]:
    """The comparison for a terminal: one line for each value."""
    lines = []
    for name, first, second in comparison.rows():
        same = first == second
        lines += [f"{name}: {first}"] if same else [f"{name}:", f"  A  {first}", f"  B  {second}"]
    return [*lines, *comparison.notes(), *comparison.gaps()]


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Both studies and what the traces have in common, as JSON values."""
    overlap, carried = comparison.overlap, comparison.carried
    return {
        "A": as_json(comparison.studies[0]),
        "B": as_json(comparison.studies[1]),
        "overlap": None if overlap is None else overlap.tolist(),
        "placement": None if carried is None else {"ranks": comparison.ranks, "own": carried[0], "of_A": carried[1]},
    }


def _draw_imbalance(axis: Any, comparison: Comparison, theme: Theme) -> None:
    """Lines over layers: mean imbalance of the batches."""
    for name, study, colour in zip("AB", comparison.studies, theme.series, strict=False):
        values = study.imbalance.mean(axis=1)
        axis.plot(range(len(values)), values, marker="o", markersize=3.5, color=colour, label=name)
    axis.set(xlabel="layer", ylabel="busiest expert / mean expert")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=1)
    axis.legend(frameon=False, labelcolor=theme.ink, fontsize=8)


def _draw_overlap(axis: Any, comparison: Comparison, theme: Theme) -> None:
    """Bars over layers: the share of the load that is the same."""
    assert comparison.overlap is not None
    axis.bar(range(len(comparison.overlap)), 100 * comparison.overlap, color=theme.series[2])
    axis.set(xlabel="layer", ylabel="same load (%)", ylim=(0, 100))
    axis.xaxis.get_major_locator().set_params(integer=True)


def _panels(comparison: Comparison) -> list[Panel]:
    panels = [Panel("imbalance", "Imbalance of each layer", _draw_imbalance, (5.4, 3.3))]  # type: ignore[arg-type]
    if comparison.overlap is not None:
        panels.append(Panel("overlap", "Load that both traces spread alike", _draw_overlap, (5.4, 3.3)))  # type: ignore[arg-type]
    return panels


def write_comparison(comparison: Comparison, path: str | Path, theme: Theme = LIGHT) -> None:
    """Write the comparison; the ending of `path` decides, as in :func:`moealign.report.write`.

    Raises:
        InvalidInput: another ending.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InvalidInput(f"{path}: expected a path that ends in {', '.join(FORMATS)}, got {path.suffix or 'none'}")
    if path.suffix.lower() != ".html":
        _save_picture(comparison, path, theme)
        return
    rows = [list(row) for row in comparison.rows()]
    figures = "".join(figure_section(comparison, panel, "") for panel in _panels(comparison))
    table = table_of(["", "A", "B"], rows, "All values").replace("<details>", '<details class="words" open>', 1)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in comparison.notes())
    bases = "".join(
        f'<p class="muted">{name}: {html.escape(" ".join(context_lines(study)))}</p>'
        for name, study in zip("AB", comparison.studies, strict=True)
    )
    body = f'<h1>Two routing traces</h1>{notes}{table}<div class="pair">{figures}</div>{bases}'
    path.write_text(document("moealign report: two traces", body), encoding="utf-8")


def _save_picture(comparison: Comparison, path: Path, theme: Theme) -> None:
    adaptive = path.suffix.lower() == ".svg"
    colours = ADAPTIVE if adaptive else theme
    panels = _panels(comparison)
    with drawing(colours, "compare") as plt:
        figure, axes = plt.subplots(
            1, len(panels), figsize=(5.7 * len(panels), 4.2), squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            panel.draw(axis, comparison, colours)  # type: ignore[arg-type]
            axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
        names = [
            f"{name}: {study.trace.model}; {study.trace.source}"
            for name, study in zip("AB", comparison.studies, strict=True)
        ]
        words = [
            textwrap.fill(escape(line), 70 * len(panels)) for line in (*names, *comparison.notes(), *comparison.gaps())
        ]
        figure.suptitle("\n".join(words), color=colours.muted, fontsize=8.5, parse_math=False)
        if adaptive:
            save_adaptive(figure, path, "moealign report: two traces")
        else:
            figure.savefig(path, dpi=130, facecolor=theme.paper, metadata={"Software": None})
        plt.close(figure)
