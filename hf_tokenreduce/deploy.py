"""`export`: a model as a graph that a runtime serves without PyTorch."""

import copy
import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration import load_pixel_values
from .convert import restore, stock_name
from .files import check_new_folder, model_folder
from .methods import method_of
from .modeling.encoders import PREFIX, encoder_of, what_can_be_reduced
from .modes import evaluating
from .tasks import image_side, main_output


OPSET = 20
TOLERANCE = 1e-4  # of the largest value, between the runtime and PyTorch in float32
# What each format needs, and the file that it is.
FORMATS = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "model.onnx"),
    "openvino": (("onnx", "onnxscript", "openvino"), "openvino_model.xml"),
}
# What was tried and does not come out right, by the name of the stock class.
NO_GRAPH = {
    "LlavaModel": "its graph takes one number of images only",
    "LlavaForConditionalGeneration": "its graph takes one number of images only",
    "Dinov2Backbone": "torch.export cannot follow how it makes its maps",
    "Dinov2WithRegistersBackbone": "torch.export cannot follow how it makes its maps",
    "DINOv3ViTBackbone": "torch.export cannot follow how it makes its maps",
}
# How a README reads what goes in, by the input's name.
READ = {
    "pixel_values": """from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

config, processor = AutoConfig.from_pretrained("{folder}"), AutoImageProcessor.from_pretrained("{folder}")
inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="np")["pixel_values"]""",
    "input_values": """import numpy
from transformers import AutoConfig, AutoFeatureExtractor

config, processor = AutoConfig.from_pretrained("{folder}"), AutoFeatureExtractor.from_pretrained("{folder}")
sound = numpy.zeros(16000, dtype="float32")  # one channel, 16,000 numbers a second
inputs = processor(sound, sampling_rate=16000, return_tensors="np")["input_values"]""",
}
RUN = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
answer = session.run(None, {{"{name}": inputs}})[0]""",
    "openvino": """import openvino

compiled = openvino.Core().compile_model("{folder}/openvino_model.xml", "CPU")
answer = compiled({{"{name}": inputs}})[0]""",
}


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    image_processor: Any = None,
    format: str = "onnx",
    images: Tensor | str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model as a graph for a runtime, with any number of images per batch, and check it there.

    The folder holds the graph, a stock configuration with the labels, the image processor, and a README that says how
    to run it.

    Args:
        model (`PreTrainedModel`): A stock model that can be reduced, or a reduced one whose method keeps the same
            number of tokens of every image.
        folder (`str` or `Path`): The new folder.
        image_processor: The model's, which is saved beside it. Also needed if `images` is a folder.
        format (`str`): `"onnx"` or `"openvino"`.
        images (`Tensor`, `str` or `Path`, *optional*): What the check runs on: pixel values, or a folder of images. By
            default noise.
        overwrite (`bool`): Replace the model that is in the folder.

    Returns:
        `dict`: `format`, `opset`, `output`, `batch_sizes` that were checked, and `largest_difference` to PyTorch, in
        units of the largest value.

    Example:
        >>> model = reduce_tokens(model, "tome", share=0.65)
        >>> export(model, "vit-tome-onnx", image_processor=processor)
    """
    _check(model, format)
    folder = check_new_folder(folder, overwrite, "folder")
    given = None if images is None else load_pixel_values(model, images, image_processor, max_images=5)
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    whole = _MainOutput(model)
    inputs = _inputs(model, given)
    with evaluating(model), torch.no_grad():
        output = "logits" if whole.gives_logits(inputs[:2]) else "features"
        with model_folder(folder, with_card=True) as place:
            _write(whole, inputs, output, format, place)
            found = {
                "format": format,
                "opset": OPSET,
                "output": output,
                "method": getattr(getattr(model.config, "reduction", None), "method", None),
                **_compare(whole, inputs, format, place),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
            stock = restore(model) if type(model).__name__.startswith(PREFIX) else model
            config = copy.deepcopy(stock.config)
            config.architectures = [type(stock).__name__]
            config.save_pretrained(place)
            if image_processor is not None:
                image_processor.save_pretrained(place)
            (place / "export.json").write_text(json.dumps(found, indent=1) + "\n")
            (place / "README.md").write_text(_readme(folder, model, found))
    return found


class _MainOutput(nn.Module):
    """Return the one tensor that users read, of all that a model returns."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.side = image_side(model)

    def forward(self, inputs: Tensor) -> Tensor:
        return main_output(self.side(inputs))

    def gives_logits(self, inputs: Tensor) -> bool:
        return self.side(inputs).get("logits") is not None


def _check(model: Any, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r} to export to. The formats are: {', '.join(FORMATS)}.")
    if stock_name(model) is None:
        raise ValueError(f"A {type(model).__name__} cannot be exported. {what_can_be_reduced()}")
    reason = NO_GRAPH.get(type(model).__name__.removeprefix(PREFIX))
    if type(model).__name__ == "ViTMAEModel":
        reason = "it shuffles its patches by chance; reduce_tokens(model, None) does not, and can be exported"
    if reason is not None:
        raise ValueError(f"A {type(model).__name__} cannot be exported: {reason}.")
    reduction = getattr(model.config, "reduction", None)
    method = method_of(reduction)
    if method.is_adaptive(reduction):
        raise ValueError(
            f"{method.title} keeps another number of tokens of every image, which an exported graph cannot. Export a "
            "model whose method keeps the same number (tokenreduce methods), or serve this one with PyTorch."
        )
    reason = method.why_not(reduction)
    if reason is not None:
        raise ValueError(f"{method.title} cannot be exported yet: {reason}.")
    missing = [name for name in FORMATS[format][0] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Exporting to {format} needs {', '.join(missing)}: pip install 'hf-tokenreduce[{format}]', or pip "
            f"install {' '.join(missing)}."
        )


def _inputs(model: PreTrainedModel, given: Tensor | None) -> Tensor:
    """Five images to check with: those given, as often as needed, or noise."""
    if given is not None:
        return given.repeat(-(-5 // len(given)), *[1] * (given.ndim - 1))[:5].float()
    encoder = encoder_of(model)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, *encoder.tower.inputs(encoder.config), generator=generator).to(model.device)


def _write(whole: _MainOutput, inputs: Tensor, output: str, format: str, place: Path) -> None:
    program = torch.onnx.export(
        whole,
        (inputs[:2],),
        dynamo=True,
        opset_version=OPSET,
        input_names=[_input_name(whole.side)],
        output_names=[output],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
        verbose=False,
    )
    assert program is not None
    if format == "onnx":
        program.save(place / "model.onnx")
        return
    openvino = importlib.import_module("openvino")
    between = place / "between"
    between.mkdir()
    program.save(between / "model.onnx")
    graph = openvino.convert_model(between / "model.onnx")
    openvino.save_model(graph, place / "openvino_model.xml", compress_to_fp16=False)
    shutil.rmtree(between)


def _stable_sort() -> Any:
    """How ONNX sorts: its TopK puts the lower index first of equal values, as a stable sort does."""
    op = importlib.import_module("onnxscript").opset18

    def stable_sort(self: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    return stable_sort


def _compare(whole: _MainOutput, inputs: Tensor, format: str, place: Path) -> dict[str, Any]:
    """Run the graph on batches of several sizes; raise a RuntimeError unless it computes what the model computes."""
    file = place / FORMATS[format][1]
    if format == "onnx":
        runtime = importlib.import_module("onnxruntime")
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(batch: Any) -> Any:
            return session.run(None, {name: batch})[0]
    else:
        core = importlib.import_module("openvino").Core()
        # Its own default may be bfloat16, which says nothing of the graph.
        compiled = core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(batch: Any) -> Any:
            return compiled(batch)[0]

    sizes, differences = (1, 2, len(inputs)), []
    for size in sizes:
        theirs = torch.from_numpy(run(inputs[:size].cpu().numpy()))
        ours = whole(inputs[:size]).cpu()
        differences.append((theirs - ours).abs().max() / ours.abs().max())
    largest = torch.stack(differences).max().item()  # not a number, if one of them is not
    if not largest <= TOLERANCE:
        raise RuntimeError(
            f"The exported graph differs from the model by {largest:.1e} of the largest value, above {TOLERANCE}. "
            "Nothing was written."
        )
    return {"batch_sizes": list(sizes), "largest_difference": largest}


def _input_name(model: Any) -> str:
    """The name of the input: `pixel_values`, of audio models `input_values`."""
    return "input_values" if getattr(model, "main_input_name", "") == "input_values" else "pixel_values"


def _readme(folder: Path, model: PreTrainedModel, found: dict[str, Any]) -> str:
    reduction = getattr(model.config, "reduction", None)
    what = (
        "no reduction" if reduction is None else f"{method_of(reduction).title}, `{json.dumps(reduction.to_dict())}`"
    )
    last = "print(config.id2label[int(answer[0].argmax())])" if found["output"] == "logits" else "print(answer.shape)"
    name = _input_name(model)
    read, run = READ[name].format(folder=folder), RUN[found["format"]].format(folder=folder, name=name)
    return f"""# {folder.name}

A {stock_name(model)} as a graph, with {what}. The number of inputs per batch is free; their size is not.

```python
{read}

{run}
{last}
```

Checked against PyTorch on batches of {", ".join(map(str, found["batch_sizes"]))}: the largest difference is
{found["largest_difference"]:.1e} of the largest value. ONNX opset {found["opset"]}.
"""
