"""Convert OpenVINO graphs to 8 bits: weights and activations of the layers that have weights."""

import importlib
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .graphs import REDUCER, openvino_core, quietly


PACKAGES = ("nncf",)
MOST_IMAGES = 300


def quantize(graph_file: Path, inputs: Tensor, batch_size: int | None = None) -> None:
    """Replace a graph by one in 8 bits, with ranges from inputs (n, ...), run `batch_size` at once.

    Products without weights stay in float: the products of attention, and those with which methods compare and choose
    tokens. The networks with which a method decides stay in float too.
    """
    nncf, openvino = importlib.import_module("nncf"), importlib.import_module("openvino")
    graph = openvino_core().read_model(graph_file)
    in_float = [node.get_friendly_name() for node in graph.get_ops() if _stays_in_float(node)]
    size = batch_size or 1
    parts = [part for part in inputs.split(size) if len(part) == size]
    with quietly():
        small = nncf.quantize(
            graph,
            nncf.Dataset([part.float().cpu().numpy() for part in parts]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(parts),
            ignored_scope=nncf.IgnoredScope(names=in_float, validate=False),
            # On processors without VNNI, sums of full 8-bit products overflow. The graph may be run on one.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    # Write another file first: both graphs still read weights from the file of the one that was read.
    beside = graph_file.with_name("small.xml")
    openvino.save_model(small, beside, compress_to_fp16=False)
    del graph, small  # Windows replaces no file that is still being read
    for suffix in (".xml", ".bin"):
        os.replace(beside.with_suffix(suffix), graph_file.with_suffix(suffix))


def _stays_in_float(node: Any) -> bool:
    """Return whether a node is a product without weights, or a product in a method's own network."""
    if node.get_type_name() != "MatMul":
        return False
    sources = [place.get_source_output().get_node() for place in node.inputs()]
    return node.get_friendly_name().startswith(REDUCER) or not any(
        source.get_type_name() == "Constant" for source in sources
    )
