"""The report on a routing trace: one self-contained page, or the same figures as one PNG or SVG."""

from .analysis import Study, study
from .page import FORMATS, write
from .theme import ADAPTIVE, DARK, LIGHT, Theme, save_adaptive, style

__all__ = ["ADAPTIVE", "DARK", "FORMATS", "LIGHT", "Study", "Theme", "save_adaptive", "study", "style", "write"]
