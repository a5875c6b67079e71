"""How `benchmark` runs a model in each runtime: eager or compiled PyTorch, or a graph in ONNX Runtime or OpenVINO."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy.exporting import Outputs
from ..deploy.graphs import FORMATS, check_format, to_openvino, trace, write
from ..deploy.quantize import PACKAGES, quantize


# Runtime -> the format of its graphs; "" where PyTorch runs the model itself.
RUNTIMES = {"eager": "", "compiled": "", "onnx": "onnx", "openvino": "openvino", "openvino-int8": "openvino"}
CALIBRATION_IMAGES = 128  # that 8 bits are fitted to, at most


class Graphs:
    """The graphs of a benchmark, each written once, into a folder that lives as long as the benchmark."""

    def __init__(self, folder: str | Path, inputs: Tensor, threads: int):
        self.folder, self.threads = Path(folder), threads
        self.inputs = inputs.float().cpu()
        self.places: dict[str, Path] = {}  # of each name a folder of its own, whatever signs the name has

    def open(
        self, name: str, module: nn.Module, runtime: str, batch_size: int, dtype: str, one_by_one: bool = False
    ) -> Callable[[Tensor], Any]:
        """Write the graph of a module that gives one tensor, if it is not written yet, and return how to run it on
        `batch_size` images at once, which OpenVINO is told beforehand.

        one_by_one: the graph takes one image and no more
        """
        fixed = 1 if one_by_one else None
        onnx = self.places.setdefault(name, self.folder / str(len(self.places))) / "onnx"
        if not onnx.is_dir():
            onnx.mkdir(parents=True)
            module = _OneInput(copy.deepcopy(module).float().cpu().eval())
            inputs = self.inputs[:1].repeat(2, 1, 1, 1)  # two, from which torch.export sees that their number is free
            write(trace(module, inputs, fixed), "onnx", onnx, "pixel_values", ["output"])
        place = onnx.with_name(runtime)
        if not place.is_dir():
            place.mkdir()
            file = place / FORMATS["openvino"].file
            to_openvino(onnx / FORMATS["onnx"].file, file)
            if runtime == "openvino-int8":
                quantize(file, self.inputs[:CALIBRATION_IMAGES])
        return FORMATS[RUNTIMES[runtime]].open(place, self.threads, batch_size, dtype)


def check_runtimes(runtimes: Sequence[str], device: torch.device) -> None:
    """Raise an error unless all of them are known, and can run here."""
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or not runtimes:
        known = ", ".join(RUNTIMES)
        raise ValueError(f"There is no runtime {', '.join(unknown) or list(runtimes)}. The runtimes are: {known}.")
    for name in runtimes:
        if not RUNTIMES[name]:
            continue
        if device.type != "cpu":
            raise ValueError(f"The runtime {name} is timed on the CPU, and the device is {device}. Give device='cpu'.")
        check_format(RUNTIMES[name], True, PACKAGES if name == "openvino-int8" else ())


def why_not(runtime: str, adaptive: bool, batch_size: int, dtype: str) -> str | None:
    """Why a model does not run there. None: it does."""
    if not RUNTIMES[runtime]:
        return None
    if adaptive and batch_size > 1:
        return "its graph takes one image at a time"
    if dtype != "float32" and (runtime == "onnx" or dtype != "bfloat16"):
        return f"its graph is not computed in {dtype}"
    return None


class _OneInput(nn.Module):
    """A module of any arguments, as one of one tensor, whose number of images is free."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Any:
        return self.module(inputs)


class MainOutput(nn.Module):
    """A model's graph for the clock: what `export` writes, without the counts of tokens."""

    def __init__(self, model: Any):
        super().__init__()
        self.outputs = Outputs(model)
        self.outputs.tells_counts = False

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outputs(inputs)
