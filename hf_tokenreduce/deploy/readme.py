"""The README of an exported model: what the model is, and the lines of code that run it."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert import stock_name
from ..methods import method_of
from ..tasks import image_side, is_one_by_one, is_regression, task_of_model


# Code that reads the input, by the name of the input.
READ = {
    "pixel_values": """from PIL import Image, ImageOps
from transformers import AutoConfig, AutoImageProcessor

config, processor = AutoConfig.from_pretrained("."), AutoImageProcessor.from_pretrained(".")
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")  # turned upright
inputs = processor([image]{times}, return_tensors="{kind}")["pixel_values"]""",
    "input_values": """import numpy
from transformers import AutoConfig, AutoFeatureExtractor

config, processor = AutoConfig.from_pretrained("."), AutoFeatureExtractor.from_pretrained(".")
sound = numpy.zeros(16000, dtype="float32")  # one channel, 16,000 numbers a second
inputs = processor([sound]{times}, sampling_rate=16000, return_tensors="{kind}")["input_values"]""",
}
# Code for a folder without the processor of the model.
UNREAD = {
    "np": """import numpy
from transformers import AutoConfig

config = AutoConfig.from_pretrained(".")
inputs = numpy.zeros({shape}, dtype="float32")  # instead of these, what the processor of the model makes""",
    "pt": """import torch
from transformers import AutoConfig

config = AutoConfig.from_pretrained(".")
inputs = torch.zeros({shape})  # instead of these, what the processor of the model makes""",
}
# What a graph without logits returns, by the task of its model.
RETURNS = {
    "depth-estimation": " It returns a depth for each pixel.",
    "image-feature-extraction": " It returns features.",
}
# Code that runs the graph, by its format.
RUN = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
answer = session.run(None, {{"{name}": inputs}})[0]""",
    "openvino": """import openvino

compiled = openvino.Core().compile_model("openvino_model.xml", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
answer = compiled({{"{name}": inputs}})[0]""",
    "torch": """import torch

answer = torch.export.load("model.pt2").module()(inputs)""",
    "aoti": """import torch

answer = torch._inductor.aoti_load_package("model.pt2")(inputs)""",
}


def readme(folder: Path, model: PreTrainedModel, found: dict[str, Any], has_processor: bool = True) -> str:
    """Return the text of the README of an exported model, from the content of its export.json."""
    reduction = getattr(model.config, "reduction", None)
    what = (
        "without token reduction"
        if reduction is None
        else f"reduced by {method_of(reduction).title}, `{json.dumps(reduction.to_dict())}`"
    )
    name, size, of_torch = found["input"], found["batch_size"], found["format"] in ("torch", "aoti")
    times, kind = "" if size in (None, 1) else f" * {size}", "pt" if of_torch else "np"
    shape = (size or 1, *found["shape"])
    read = READ[name].format(times=times, kind=kind) if has_processor else UNREAD[kind].format(shape=shape)
    run = RUN[found["format"]].format(name=name)
    if of_torch and found["tokens"] is None:
        run += "[0]"
    last = _last_lines(found, model.config)
    number = "takes any number of inputs at once" if size is None else f"takes {size} input{'s' * (size > 1)} at once"
    if found["int8"]:
        checked = (
            f"Layers with weights compute in 8 bits, fitted to {found['images']} images. On these images "
            + (f"{found['same_class']:.1%} of the predicted classes are the same as in float32."
               if "same_class" in found
               else f"the numbers change by {found['mean_change']:.1%} of their range, on average."
               if "mean_change" in found
               else f"the mean cosine between the features and those in float32 is {found['cosine']:.4f}.")
        )  # fmt: skip
    else:
        checked = (
            f"The graph was compared with PyTorch on batches of {', '.join(map(str, found['batch_sizes']))}. The "
            f"largest difference is {found['largest_difference']:.1e} of the largest value."
        )
        if found["decided_by_rounding"]:
            checked += (
                f" In {found['decided_by_rounding']} of the images, rounding decides which tokens stay. These images "
                "do not count."
            )
    task = "" if found["output"] == "logits" else RETURNS.get(task_of_model(model).name, "")
    if image_side(model) is not model:
        task = " It is the image side of the model alone, so it takes no texts. It returns the features of the image."
    if found["opset"]:
        checked += f" The ONNX opset is {found['opset']}."
    return f"""# {folder.resolve().name}

This is a {stock_name(model)} as a graph, {what}.{task} The graph {number}. The size of an input is fixed.
Run this in the folder:

```python
{read}

{run}
{last}
```

{checked}
"""


def _last_lines(found: dict[str, Any], config: Any) -> str:
    """Return the code that prints the answer."""
    if found["output"] != "logits":
        return "print(answer.shape)"
    if is_regression(config):
        return "print(answer[0])"
    if is_one_by_one(torch.empty(1, config.num_labels), config):
        return """for index, logit in enumerate(answer[0]):
    print(config.id2label[index], 1 / (1 + 2.718281828459045 ** -float(logit)))  # the score of this label alone"""
    return "print(config.id2label[int(answer[0].argmax())])"
