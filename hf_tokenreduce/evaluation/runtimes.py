"""Run a model for `benchmark` in each runtime: PyTorch, eager, compiled or recorded, or a graph in ONNX Runtime or
OpenVINO."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy.exporting import Outputs
from ..deploy.graphs import FORMATS, check_format, to_openvino, trace, write
from ..deploy.quantize import PACKAGES, quantize


# Runtime -> format of its graphs. "" means that PyTorch runs the model itself.
RUNTIMES = {
    "eager": "",
    "compiled": "",
    "onnx": "onnx",
    "openvino": "openvino",
    "openvino-int8": "openvino",
    "recorded": "",
}
CALIBRATION_IMAGES = 128  # 8 bits are fitted to at most so many images


class Graphs:
    """The graphs of a benchmark. Each is written once, into a folder that is deleted after the benchmark.

    Args:
        folder: Folder for the graphs.
        inputs: Images (n, C, H, W) with which graphs are traced, and to which 8 bits are fitted.
        threads: Number of CPU threads.
    """

    def __init__(self, folder: str | Path, inputs: Tensor, threads: int):
        self.folder, self.threads = Path(folder), threads
        self.inputs = inputs.float().cpu()
        self.places: dict[str, Path] = {}  # name -> its folder; the name may have characters that a folder cannot have

    def open(
        self, name: str, module: nn.Module, runtime: str, batch_size: int, dtype: str, one_by_one: bool = False
    ) -> Callable[[Tensor], Any]:
        """Write the graph of a module that returns one tensor, if it is not there yet, and open it.

        Args:
            name: Name of the model.
            module: The module.
            runtime: One of `RUNTIMES` that needs a graph.
            batch_size: Number of images per call. OpenVINO is told this number, which makes it faster.
            dtype: Type in which the runtime computes.
            one_by_one: Make a graph that takes exactly one image.

        Returns:
            A function that runs the graph.
        """
        fixed = 1 if one_by_one else None
        onnx = self.places.setdefault(name, self.folder / str(len(self.places))) / "onnx"
        if not onnx.is_dir():
            onnx.mkdir(parents=True)
            module = _OneInput(copy.deepcopy(module).float().cpu().eval())
            inputs = self.inputs[:1].repeat(2, 1, 1, 1)  # with two images torch.export sees that their number is free
            write(trace(module, inputs, fixed), "onnx", onnx, "pixel_values", ["output"])
        place = onnx.with_name(runtime)
        if not place.is_dir():
            place.mkdir()
            file = place / FORMATS["openvino"].file
            to_openvino(onnx / FORMATS["onnx"].file, file)
            if runtime == "openvino-int8":
                quantize(file, self.inputs[:CALIBRATION_IMAGES])
        return FORMATS[RUNTIMES[runtime]].open(place, self.threads, batch_size, dtype)


def usual_device(runtimes: Sequence[str]) -> str:
    """Return the device if none is given: a GPU if there is one and no runtime needs a graph on the CPU."""
    return "cuda" if torch.cuda.is_available() and not any(map(RUNTIMES.get, runtimes)) else "cpu"


def check_runtimes(runtimes: Sequence[str], device: torch.device) -> None:
    """Raise an error unless all runtimes are known and can run here."""
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or not runtimes:
        known = ", ".join(RUNTIMES)
        raise ValueError(f"There is no runtime {', '.join(unknown) or list(runtimes)}. The runtimes are: {known}.")
    for name in runtimes:
        if name == "recorded" and device.type != "cuda":
            raise ValueError(
                f"The runtime {name} needs a CUDA GPU, but the device is {device}. Use eager or compiled."
            )
        if not RUNTIMES[name]:
            continue
        if device.type != "cpu":
            raise ValueError(f"The runtime {name} is timed on the CPU, but the device is {device}. Give device='cpu'.")
        check_format(RUNTIMES[name], True, PACKAGES if name == "openvino-int8" else ())


def why_not(runtime: str, adaptive: bool, batch_size: int, dtype: str) -> str | None:
    """Return why a model cannot run in a runtime, or None if it can."""
    if not RUNTIMES[runtime]:
        return None
    if adaptive and batch_size > 1:
        return "its graph takes one image at a time"
    if dtype != "float32" and (runtime == "onnx" or dtype != "bfloat16"):
        return f"its graph is not computed in {dtype}"
    return None


def compiled(model: nn.Module, device: torch.device, **options: Any) -> Callable[..., Any]:
    """Compile a model for batches of one shape. On a GPU its kernels become CUDA graphs, because with few images it
    takes longer to start them one by one than to run them.

    Use it inside `many_compiled`. All reduced models share one `forward`, and torch would run the ninth eagerly."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(model, dynamic=False, mode=mode, **options)


@contextmanager
def many_compiled() -> Iterator[None]:
    """Let many models be compiled for the duration of a `with` block, and free them at its end."""
    import torch._dynamo  # it takes time

    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.accumulated_recompile_limit):
        yield
    torch._dynamo.reset()


class _OneInput(nn.Module):
    """Wrap a module so that it takes exactly one tensor. Then torch.export accepts any number of images."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Any:
        return self.module(inputs)


class MainOutput(nn.Module):
    """What a model computes in a graph that is timed: the same as `export` writes, without the counts of tokens."""

    def __init__(self, model: Any):
        super().__init__()
        self.outputs = Outputs(model)
        self.outputs.tells_counts = False

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outputs(inputs)
