"""Models as graphs that a runtime serves: `export` writes them, `load_exported` runs them."""

from .exported import ExportedModel, is_exported, load_exported
from .exporting import export


__all__ = ["ExportedModel", "export", "is_exported", "load_exported"]
