"""Models as graphs that a runtime serves: `export` writes them, `load_exported` runs them."""

from .export import export
from .exported import ExportedModel, is_exported, load_exported


__all__ = ["ExportedModel", "export", "is_exported", "load_exported"]
