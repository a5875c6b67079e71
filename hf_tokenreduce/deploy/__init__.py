"""Deploy models as graphs for a runtime: `export` writes graphs, `load_exported` loads them."""

from .exported import ExportedModel, is_exported, load_exported
from .exporting import export


__all__ = ["ExportedModel", "export", "is_exported", "load_exported"]
