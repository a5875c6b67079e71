"""Deploy models: `export` writes graphs for a runtime, `load_exported` loads them, `record` records one for a GPU."""

from .exported import ExportedModel, is_exported, load_exported
from .exporting import export
from .recorded import record


__all__ = ["ExportedModel", "export", "is_exported", "load_exported", "record"]
