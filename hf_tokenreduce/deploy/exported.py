"""`load_exported` and `is_exported`: exported models, and how to run them in their runtimes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor

from ..blame import blaming
from .graphs import FORMATS, check_format


RECORD = "export.json"
NEEDED = ("format", "batch_size", "input", "shape", "output", "tokens")  # entries without which no graph can be run


class ExportedModel:
    """An exported graph in its runtime. It takes any number of images. `load_exported` makes it.

    Attributes:
        folder: Folder of the exported model.
        config: Configuration of the stock model, with its labels.
        image_processor: Image processor of the model. None: the model was exported without it.
        record: The content of `export.json`, as `export` returned it.
        dtype: `"float32"` or `"bfloat16"`: the type in which the graph computes.
    """

    def __init__(
        self, folder: Path, config: Any, image_processor: Any, record: dict[str, Any], dtype: str, run: Any, size: Any
    ):
        self.folder, self.config, self.image_processor, self.record = folder, config, image_processor, record
        self.dtype, self._run, self._size = dtype, run, size

    def __call__(self, inputs: Tensor | np.ndarray) -> Tensor:
        """Compute logits (B, classes), or features, from pixel values (B, C, H, W)."""
        return self.with_counts(inputs)[0]

    def with_counts(self, inputs: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Compute logits or features, and the number of tokens that leave the last layer, (B,)."""
        # A program that AOTInductor compiled reads the memory as it is, whatever the order or the device.
        inputs = torch.as_tensor(inputs).float().cpu().contiguous()
        shape, given = self.record["shape"], list(inputs.shape)
        if given[1:] != shape or not len(inputs):
            raise ValueError(f"The graph takes inputs of shape (any number, {str(shape)[1:-1]}), got {given}.")
        size = self._size or len(inputs)
        found = [self._run_part(part, size) for part in inputs.split(size)]
        main = torch.cat([outputs[0] for outputs in found])
        if self.record["tokens"] is not None:
            return main, torch.full((len(main),), self.record["tokens"])
        return main, torch.cat([outputs[1][:, -1] for outputs in found])

    def _run_part(self, part: Tensor, size: int) -> list[Tensor]:
        """Run the graph on at most `size` inputs. Fewer inputs are filled up with copies of the last one."""
        if len(part) == size:
            return self._run(part)
        filled = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
        return [output[: len(part)] for output in self._run(filled)]


def is_exported(folder: str | Path) -> bool:
    """Return whether a folder holds a model that `export` wrote.

    Args:
        folder: The folder.

    Returns:
        Whether it has an `export.json`.
    """
    return (Path(folder) / RECORD).is_file()


def load_exported(
    folder: str | Path,
    *,
    threads: int | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> ExportedModel:
    """Load a model that `export` wrote.

    Args:
        folder (`str` or `Path`): Folder of the exported model.
        threads (`int`, *optional*): Number of CPU threads. By default the runtime decides. The formats torch and aoti
            always use torch's own setting.
        batch_size (`int`, *optional*): Number of images that you usually pass at once. OpenVINO is faster if it knows
            this number.
        dtype (`str`): `"float32"`, or for OpenVINO also `"bfloat16"`, which is faster and less exact.
        trust_remote_code (`bool`): Allow the formats torch and aoti. Loading such a file may run code that is in it.
            ONNX and OpenVINO graphs hold no code.

    Returns:
        `ExportedModel`: Call it with pixel values. It returns logits, or features.

    Example:
        >>> model = load_exported("vit-tome-openvino", threads=2)
        >>> logits = model(model.image_processor(images, return_tensors="pt")["pixel_values"])
    """
    folder = Path(folder)
    if not is_exported(folder):
        raise ValueError(
            f"{folder} has no {RECORD}, so it is not an exported model. Export a model with tokenreduce export."
        )
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        missing = [name for name in NEEDED if name not in record]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / RECORD} cannot be read ({error}). Export the model again.") from error
    if missing:
        raise ValueError(f"{folder / RECORD} has no entry {', '.join(missing)}. Export the model again.")
    format, size = record["format"], record["batch_size"]
    check_format(format)
    if FORMATS[format].is_code and not trust_remote_code:
        raise ValueError(
            f"{folder} has a graph of the format {format}, which may run code when it is loaded. If you trust the "
            "person who made it, pass trust_remote_code=True (--trust-remote-code)."
        )
    if dtype != "float32" and (dtype != "bfloat16" or format != "openvino"):
        raise ValueError(f"dtype={dtype!r} is not possible in the format {format}. Leave it out.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    with blaming(str(folder), "config.json"):
        config = AutoConfig.from_pretrained(folder)
    processor = None
    if (folder / "preprocessor_config.json").is_file():
        with blaming(str(folder), "preprocessor_config.json"):
            of_images = record["input"] == "pixel_values"
            processor = (AutoImageProcessor if of_images else AutoFeatureExtractor).from_pretrained(folder)
    if not (folder / FORMATS[format].file).is_file():
        raise ValueError(f"{folder} has no {FORMATS[format].file}. Export the model again.")
    if size is None and format == "openvino":
        size = batch_size
    with blaming(str(folder), FORMATS[format].file):
        run = FORMATS[format].open(folder, threads, size, dtype)
    return ExportedModel(folder, config, processor, record, dtype, run, size)
