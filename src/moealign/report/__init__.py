"""The report on one or two routing traces: a self-contained page, a PNG or SVG, JSON, and files for serving engines."""

from .analysis import Study, study
from .compare import Comparison, compare, comparison_json, comparison_lines, write_comparison
from .engines import check_configuration, configuration_paths, write_configuration
from .page import FORMATS, write
from .summary import as_json, lines
from .theme import ADAPTIVE, DARK, LIGHT, Theme, save_adaptive, style

__all__ = [
    "ADAPTIVE",
    "DARK",
    "FORMATS",
    "LIGHT",
    "Comparison",
    "Study",
    "Theme",
    "as_json",
    "check_configuration",
    "compare",
    "comparison_json",
    "comparison_lines",
    "configuration_paths",
    "lines",
    "save_adaptive",
    "study",
    "style",
    "write",
    "write_comparison",
    "write_configuration",
]
