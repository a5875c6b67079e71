"""`export`: write a model as a graph for a runtime."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import load_pixel_values
from ..convert import restore, stock_name
from ..files import check_new_folder, model_folder
from ..methods import method_of
from ..modeling.encoders import PREFIX, encoder_of, what_can_be_reduced
from ..modes import evaluating
from ..tasks import all_layers_act, image_side, is_regression, main_output, same_decisions, size_made_by
from .exported import RECORD, is_exported
from .graphs import FORMATS, OPSET, check_format, trace, write
from .quantize import MOST_IMAGES, PACKAGES, quantize
from .readme import readme


# Largest allowed difference between the runtime and PyTorch in float32, relative to the largest value.
TOLERANCE = 1e-4
LITTLE_AGREEMENT = 0.9  # export warns if fewer images get the same class in 8 bits
# Stock classes whose graph was tried and does not work, with the reason.
NO_GRAPH = {
    "LlavaModel": "its graph takes only one fixed number of images",
    "LlavaForConditionalGeneration": "its graph takes only one fixed number of images",
    "Dinov2Backbone": "torch.export cannot follow how it makes its maps",
    "Dinov2WithRegistersBackbone": "torch.export cannot follow how it makes its maps",
    "DINOv3ViTBackbone": "torch.export cannot follow how it makes its maps",
}

logger = logging.get_logger(__name__)


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    image_processor: Any = None,
    format: str = "onnx",
    batch_size: int | None = None,
    int8: bool = False,
    images: Tensor | str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model as a graph for a runtime, and check the graph there.

    The folder gets the graph, a stock configuration with the labels, the image processor, and a README that says how
    to run the graph. `load_exported` loads the folder. If the graph's outputs differ from PyTorch's by more than 1e-4
    of the largest value, nothing is written.

    Args:
        model (`PreTrainedModel`): A stock model that can be reduced, or a reduced one.
        folder (`str` or `Path`): The new folder.
        image_processor: Image processor of the model, which is saved in the folder. It is needed if `images` is a
            folder.
        format (`str`): `"onnx"` for ONNX Runtime, `"openvino"` for OpenVINO, `"torch"` for a program of torch.export,
            or `"aoti"` for such a program compiled by AOTInductor for this kind of processor.
        batch_size (`int`, *optional*): Number of images that the graph takes. By default any number. With an adaptive
            method, which decides for each image how many tokens it keeps, the graph always takes one image.
        int8 (`bool`): Compute the layers that have weights in 8 bits, with ranges from `images`. OpenVINO only.
        images (`Tensor`, `str` or `Path`, *optional*): Pixel values, or a folder of images. The graph is checked on at
            most 5 of the images, and 8 bits are fitted to at most 300. By default noise.
        overwrite (`bool`): Replace the model that is in the folder. It must not be the model that is exported.

    Returns:
        `dict`: The content of `export.json` in the folder: `format`, `output`, `batch_size` and others. The entry
            `largest_difference` is the difference to PyTorch relative to the largest value, without the images in
            which rounding decides which tokens stay: `decided_by_rounding` is their number. With `int8` there is
            `same_class` instead, the share of the images that get the same class as in float32; for a model of
            features it is `cosine`, and for a regression head `mean_change`, as a part of the range of its numbers.

    Example:
        >>> model = reduce_tokens(model, "tome", share=0.65)
        >>> export(model, "vit-tome-onnx", image_processor=processor)
    """
    batch_size = _check(model, format, batch_size, int8, images)
    _check_not_source(model, Path(folder))
    folder = check_new_folder(folder, overwrite, "folder")
    most = MOST_IMAGES if int8 else 5
    given = None if images is None else load_pixel_values(model, images, image_processor, max_images=most).cpu()
    if model.dtype != torch.float32 or model.device.type != "cpu":
        model = copy.deepcopy(model).float().cpu()  # graphs compute on the CPU, in float32
    whole = Outputs(model)
    inputs = _inputs(model, given, max(batch_size or 0, 5), image_processor)
    with evaluating(model), torch.no_grad():
        output = "logits" if whole.side(inputs[:1]).get("logits") is not None else "features"
        outputs = [output, "token_counts"] if whole.tells_counts else [output]
        with model_folder(folder, with_card=True) as place:
            write(trace(whole, inputs, batch_size), format, place, _input_name(model), outputs)
            found = {
                "format": format,
                "opset": OPSET if format in ("onnx", "openvino") else None,
                "input": _input_name(model),
                "shape": list(inputs.shape[1:]),
                "output": output,
                "batch_size": batch_size,
                "int8": int8,
                "method": getattr(getattr(model.config, "reduction", None), "method", None),
                "tokens": _even_count(model, inputs[:1]),
                **_compare(whole, inputs, format, place, batch_size),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
            if int8:
                assert given is not None
                fitted = _inputs(model, given, -(-len(given) // (batch_size or 1)) * (batch_size or 1))
                quantize(place / FORMATS[format].file, fitted, batch_size)
                del found["largest_difference"], found["decided_by_rounding"]
                found |= _compare_int8(whole, fitted, len(given), format, place, batch_size, output, model.config)
            stock = restore(model) if type(model).__name__.startswith(PREFIX) else model
            config = copy.deepcopy(stock.config)
            config.architectures = [type(stock).__name__]
            config.save_pretrained(place)
            if image_processor is not None:
                image_processor.save_pretrained(place)
            (place / RECORD).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            text = readme(folder, model, found, image_processor is not None)
            (place / "README.md").write_text(text, encoding="utf-8")
    return found


class Outputs(nn.Module):
    """A model that returns only its main output, and the tokens that leave each layer if images differ in them."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.side = image_side(model)
        reduction = getattr(model.config, "reduction", None)
        self.reduces = reduction is not None
        self.tells_counts = method_of(reduction).is_adaptive(reduction)

    def forward(self, inputs: Tensor) -> Any:
        output = self.side(inputs)
        found = main_output(output)
        return (found, output.token_counts) if self.tells_counts else found

    def main(self, inputs: Tensor) -> Tensor:
        """Return the main output alone, on the CPU."""
        return main_output(self.side(inputs)).cpu()


def _check(model: Any, format: str, batch_size: int | None, int8: bool, images: Any) -> int | None:
    """Raise an error that says what to do, or return the number of images that the graph takes."""
    if int8 and format in FORMATS and format != "openvino":
        raise ValueError(
            f"8 bits work only in OpenVINO, but the format is {format}. Give format='openvino', or leave out int8."
        )
    check_format(format, True, PACKAGES if int8 else ())
    if stock_name(model) is None:
        raise ValueError(f"A {type(model).__name__} cannot be exported. {what_can_be_reduced()}")
    reason = NO_GRAPH.get(type(model).__name__.removeprefix(PREFIX))
    if type(model).__name__ == "ViTMAEModel":
        reason = "it shuffles its patches at random. Export reduce_tokens(model, None), which does not"
    if reason is not None:
        raise ValueError(f"A {type(model).__name__} cannot be exported: {reason}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if int8 and images is None:
        raise ValueError(
            "8 bits are fitted to images. Give images=, a folder of 100 or more images of the kind that you expect."
        )
    reduction = getattr(model.config, "reduction", None)
    method = method_of(reduction)
    reason = method.why_not(reduction)
    if reason is not None:
        raise ValueError(f"{method.title} cannot be exported yet: {reason}.")
    if not method.is_adaptive(reduction):
        return batch_size
    if batch_size not in (None, 1):
        raise ValueError(
            f"{method.title} keeps a different number of tokens of each image, so its graph takes one image at a "
            f"time. Leave out batch_size={batch_size}, or give 1."
        )
    return 1


def _check_not_source(model: PreTrainedModel, folder: Path) -> None:
    """Raise a ValueError if the model was loaded from the folder: its graph would replace its only weights."""
    source = model.config.name_or_path  # "" if it was not loaded
    # A folder that holds a graph is not the source: it may have the name of a model on the Hub.
    if source and folder.is_dir() and Path(source).is_dir() and folder.samefile(source) and not is_exported(folder):
        raise ValueError(
            f"{folder} holds the model that is exported, and the graph would replace it. Name another folder."
        )


def _inputs(model: PreTrainedModel, given: Tensor | None, count: int, image_processor: Any = None) -> Tensor:
    """Return `count` images to check the graph with: the given ones, repeated as needed, or noise. The noise has the
    size that the image processor makes, or without one the size in the configuration."""
    if given is not None:
        return given.repeat(-(-count // len(given)), *[1] * (given.ndim - 1))[:count].float()
    encoder = encoder_of(model)
    size = encoder.tower.inputs(encoder.config)
    if image_processor is not None and encoder.tower.any_size:  # DINOv2 says 518 pixels and is given 224
        size = size_made_by(image_processor)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *size, generator=generator).to(model.device)


def _even_count(model: PreTrainedModel, inputs: Tensor) -> int | None:
    """Return the number of tokens that leave the last layer. None: images differ in it."""
    reduction = getattr(model.config, "reduction", None)
    if reduction is None:
        return encoder_of(model).embed(inputs).shape[1]
    if method_of(reduction).is_adaptive(reduction):
        return None
    return int(image_side(model)(inputs, **all_layers_act(model)).token_counts[0, -1])


def _compare(whole: Outputs, inputs: Tensor, format: str, place: Path, batch_size: int | None) -> dict[str, Any]:
    """Run the graph on batches. Raise a ValueError if its outputs differ from the model's."""
    run = FORMATS[format].open(place, None, None, "float32")
    sizes = (1, 2, len(inputs)) if batch_size is None else (batch_size,)
    batches = [batch for batch in inputs.split(sizes[-1]) if len(batch) == sizes[-1]]
    answers = [whole.main(batch) for batch in batches]
    # That of all images: a head with one number can give one that is nearly 0.
    scale = torch.stack([answer.abs().max() for answer in answers]).max().clamp(min=torch.finfo(torch.float32).tiny)
    differences, ties = [], []
    for batch, expected in zip(batches, answers, strict=True):
        for image, one, graphs in zip(batch, expected, run(batch)[0], strict=True):
            differences.append(_difference(graphs, one, scale))
            ties.append(differences[-1] > TOLERANCE and _is_tie(whole, image[None], graphs, scale))
    counted = [place for place, tie in enumerate(ties) if not tie]
    if not counted:
        raise ValueError(
            f"In all {len(ties)} images rounding decides which tokens stay, so the graph could not be checked. "
            "Nothing was written. Give other images."
        )
    found_differences = [differences[place] for place in counted]
    for size in sizes[:-1]:
        batch = inputs[(counted * size)[:size]]
        found_differences.append(_difference(run(batch)[0], whole.main(batch), scale))
    largest = torch.tensor(found_differences).max().item()  # nan if any of them is nan
    if not largest <= TOLERANCE:
        raise ValueError(
            f"The exported graph differs from the model by {largest:.1e} of the largest value, more than {TOLERANCE}. "
            "Nothing was written."
        )
    return {"batch_sizes": list(sizes), "largest_difference": largest, "decided_by_rounding": sum(ties)}


def _difference(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    if found.shape != expected.shape:  # a graph may keep another number of tokens
        return torch.inf
    return ((found - expected).abs().max() / scale).item()


def _is_tie(whole: Outputs, image: Tensor, found: Tensor, scale: Tensor) -> bool:
    """Return whether the model, too, gives what the graph found if pixels change by as little as numbers are rounded.
    Then two tokens are so alike that rounding decides which of them stays."""
    if not whole.reduces:
        return False
    draw = torch.Generator().manual_seed(0)
    for size in (1e-6,) * 8 + (1e-5,) * 8:
        noise = torch.randn(image.shape, generator=draw).to(image) * image.abs().max() * size
        if _difference(whole.main(image + noise)[0], found, scale) <= TOLERANCE:
            return True
    return False


def _compare_int8(
    whole: Outputs,
    images: Tensor,
    count: int,
    format: str,
    place: Path,
    batch_size: int | None,
    output: str,
    config: Any,
) -> dict[str, Any]:
    """Compare 8 bits with float32 on the first `count` images, to which the 8 bits were fitted."""
    run = FORMATS[format].open(place, None, None, "float32")
    parts = images.split(batch_size or 1)
    small = torch.cat([run(part)[0] for part in parts])[:count]
    full = torch.cat([whole.main(part) for part in parts])[:count]
    if not small.isfinite().all():
        raise ValueError(
            "In 8 bits the outputs of the model are not finite. Nothing was written. Leave out int8, or give other "
            "images."
        )
    if output == "logits" and is_regression(config):
        scale = (full.amax() - full.amin()).clamp(min=full.abs().amax() * 1e-6)  # of one image there is no range
        return {"mean_change": ((small - full).abs().mean() / scale).item(), "images": len(full)}
    if output == "logits" and small.ndim == 2:  # pooled features have two dimensions too, but no classes
        same = same_decisions(small, full, config).double().mean().item()
        if same < LITTLE_AGREEMENT:
            logger.warning(
                f"In 8 bits the model predicts the same class as in float32 for only {same:.0%} of the {len(full)} "
                "images. Give more images, or leave out int8."
            )
        return {"same_class": same, "images": len(full)}
    return {"cosine": torch.cosine_similarity(small.flatten(1), full.flatten(1)).mean().item(), "images": len(full)}


def _input_name(model: Any) -> str:
    """Return the name of the input: `input_values` for audio models, else `pixel_values`."""
    return "input_values" if getattr(model, "main_input_name", "") == "input_values" else "pixel_values"
