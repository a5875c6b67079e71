"""How `benchmark` runs a model in each runtime: eager or compiled PyTorch, or a graph in ONNX Runtime or OpenVINO."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy.exporting import Outputs
from ..deploy.graphs import FORMATS, check_format, trace, write
from ..deploy.quantize import PACKAGES, quantize


# Runtime -> the format of its graphs; "" where PyTorch runs the model itself.
RUNTIMES = {"eager": "", "compiled": "", "onnx": "onnx", "openvino": "openvino", "openvino-int8": "openvino"}
CALIBRATION_IMAGES = 128  # that 8 bits are fitted to, at most


class Graphs:
    """The graphs of a benchmark, each written once, into a folder that lives as long as the benchmark."""

    def __init__(self, folder: str | Path, inputs: Tensor, threads: int):
        self.folder, self.threads = Path(folder), threads
        self.inputs = inputs.float().cpu()

    def open(self, name: str, module: nn.Module, runtime: str, batch_size: int, dtype: str) -> Callable[[Tensor], Any]:
        """Write the graph of a module that gives one tensor, if it is not written yet, and return how to run it.

        The number of images is fixed in the graph that runs, for runtimes are faster if they know it.
        """
        format = RUNTIMES[runtime]
        place = self.folder / f"{name.replace('/', '-')} {runtime} {batch_size}"
        if not place.is_dir():
            place.mkdir()
            module = copy.deepcopy(module).float().cpu().eval()
            inputs = self.inputs.repeat(-(-batch_size // len(self.inputs)), 1, 1, 1)
            write(trace(module, inputs, batch_size), format, place, "pixel_values", ["output"])
            if runtime == "openvino-int8":
                quantize(place / FORMATS[format].file, self._calibration(batch_size), batch_size)
        return FORMATS[format].open(place, self.threads, batch_size, dtype)

    def _calibration(self, batch_size: int) -> Tensor:
        count = max(min(len(self.inputs), CALIBRATION_IMAGES) // batch_size, 1) * batch_size
        return self.inputs.repeat(-(-count // len(self.inputs)), 1, 1, 1)[:count]


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
        check_format(RUNTIMES[name], PACKAGES if name == "openvino-int8" else ())


def why_not(model: Any, runtime: str, adaptive: bool, batch_size: int, dtype: str) -> str | None:
    """Why a model does not run there. None: it does."""
    if not RUNTIMES[runtime]:
        return None
    if adaptive and batch_size > 1:
        return "its graph takes one image at a time"
    if dtype != "float32" and (runtime == "onnx" or dtype != "bfloat16"):
        return f"its graph is not computed in {dtype}"
    return None


class MainOutput(nn.Module):
    """A model's graph for the clock: what `export` writes, without the counts of tokens."""

    def __init__(self, model: Any):
        super().__init__()
        self.outputs = Outputs(model)
        self.outputs.tells_counts = False

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outputs(inputs)
