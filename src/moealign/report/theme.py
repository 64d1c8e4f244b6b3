"""Colours of the figures, and SVGs that follow the reader's light or dark scheme.

Figures for the page and for SVGs are drawn in placeholder colours (:data:`ADAPTIVE`), which then become CSS variables:
one drawing serves both schemes.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ADAPTIVE",
    "DARK",
    "LIGHT",
    "Theme",
    "adaptive_svg",
    "css_variables",
    "drawing",
    "pyplot",
    "save_adaptive",
    "style",
]


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb."""

    ink: str  # text and axes
    muted: str  # secondary text and lines
    rule: str  # grid lines, edges of padding
    paper: str
    series: tuple[str, ...]  # lines, bars, experts


LIGHT = Theme(
    "#1b1f24", "#59636e", "#d5dae0", "#ffffff",
    ("#1f5fa8", "#c2571a", "#2a7d4f", "#8a4fbf", "#b5453c", "#0f7f8c", "#8a6d00", "#c0418c", "#5a6b1f", "#4a5a78"),
)  # fmt: skip
DARK = Theme(
    "#e6e9ee", "#a3adb8", "#3a424c", "#14181d",
    ("#6ea8e8", "#f0955c", "#63c08d", "#bd94ea", "#ee8077", "#4fc3d0", "#d9b945", "#ee86bf", "#a9bd5f", "#9db0d3"),
)  # fmt: skip
#: Placeholders that occur nowhere else in an SVG; each is replaced by a CSS variable.
ADAPTIVE = Theme(
    "#010203", "#010204", "#010205", "#010206", tuple(f"#0103{i:02x}" for i in range(len(LIGHT.series)))
)  # fmt: skip


def _by_variable(theme: Theme) -> dict[str, str]:
    """CSS variable -> colour."""
    colours = {"--ink": theme.ink, "--muted": theme.muted, "--rule": theme.rule, "--paper": theme.paper}
    return colours | {f"--c{i}": colour for i, colour in enumerate(theme.series)}


def css_variables(selector: str) -> str:
    """A style sheet that defines the colours on `selector`, for both schemes."""

    def block(theme: Theme) -> str:
        return " ".join(f"{name}: {value};" for name, value in _by_variable(theme).items())

    dark = f"@media (prefers-color-scheme: dark) {{ {selector} {{ {block(DARK)} }} }}"
    return f"{selector} {{ color-scheme: light dark; {block(LIGHT)} }} {dark}"


def style(theme: Theme, salt: str) -> dict[str, Any]:
    """matplotlib's rcParams for figures in `theme`; `salt` keeps SVG ids of two pictures on one page distinct."""
    return {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": theme.rule, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.muted,
        "xtick.color": theme.ink, "ytick.color": theme.ink, "hatch.color": theme.muted, "hatch.linewidth": 0.5,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "svg.fonttype": "none", "svg.hashsalt": salt,
    }  # fmt: skip


def pyplot() -> Any:
    """matplotlib.pyplot, drawing without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@contextlib.contextmanager
def drawing(theme: Theme, salt: str) -> Iterator[Any]:
    """pyplot for figures in `theme`.  Characters that its font lacks are boxes in a PNG, and text in an SVG."""
    plt = pyplot()
    with warnings.catch_warnings(), plt.rc_context(style(theme, salt)):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield plt


def adaptive_svg(figure: Any) -> str:
    """A figure drawn in :data:`ADAPTIVE` as an ``<svg>`` element that takes its colours from CSS variables."""
    sink = io.StringIO()
    layout = figure.get_layout_engine()
    if layout is not None:  # once, where savefig would draw everything twice for it
        layout.execute(figure)
        figure.set_layout_engine(None)
    figure.savefig(sink, format="svg", metadata={"Date": None})
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    for variable, colour in _by_variable(ADAPTIVE).items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.S)
    # matplotlib's plain ids repeat from picture to picture, and nothing refers to them.
    svg = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend|PathCollection)_\d+"', "", svg
    )
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    return re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)


def save_adaptive(figure: Any, path: Path, title: str) -> None:
    """Write a figure drawn in :data:`ADAPTIVE` as an SVG that follows the reader's light or dark scheme."""
    ground = "svg { background: var(--paper); font-family: system-ui, sans-serif } image { image-rendering: pixelated }"
    head = f"<title>{html.escape(title)}</title><style>{css_variables('svg')} {ground}</style><defs>"
    svg = adaptive_svg(figure).replace("<defs>", head, 1).replace("<svg ", '<svg role="img" ', 1)
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{svg}', encoding="utf-8")
