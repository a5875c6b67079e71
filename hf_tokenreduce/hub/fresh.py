"""What a user does with a published folder: load it by its Auto class, run it, ask a pipeline.

`check_folder` does this twice: in its own process with the installed code, and in a process that cannot import this
package with the code of the folder. That process runs this file as it is, so the file imports nothing of the package.
"""

import json
import sys
from typing import Any
from unittest import mock

import torch
import transformers
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor


NEW_TOKENS = 5


def observe(
    folder: str, inputs: dict[str, Tensor], auto_class: str, pipeline: str | None, outputs: list[str], trust: bool
) -> tuple[dict[str, Tensor], str]:
    """Load a folder, run the model, and ask a pipeline.

    Args:
        folder: The folder of the model.
        inputs: The inputs of the forward, and `photo` (height, width, 3) and `sound` (samples) for the pipeline.
        auto_class: The name of the Auto class that loads the model.
        pipeline: The name of the pipeline; None if the model has none.
        outputs: Names of outputs that a model may give. The first that it gives is taken.
        trust: Whether to run the code in the folder.

    Returns:
        The numbers that the model (`output`) and the pipeline (`answer`) gave, and the text that was generated, which
        is empty for models that generate none.
    """
    for_pipeline = {name: inputs[name] for name in ("photo", "sound")}
    # AutoBackbone takes only what the Hub knows by that name, even if it is a folder.
    with mock.patch.object(HfApi, "repo_exists", return_value=True):
        model = getattr(transformers, auto_class).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=trust
        )
    if trust and not type(model).__module__.startswith("transformers_modules."):
        raise RuntimeError("The code in the folder was not used.")
    given = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
        if name not in for_pipeline
    }
    with torch.no_grad():
        output = model.eval()(**given)
    first = next(output[name] for name in outputs if output.get(name) is not None)
    parts = first if isinstance(first, (tuple, list)) else [first]
    found = {"output": torch.cat([part.float().flatten() for part in parts])}
    if pipeline is None:
        return found, ""
    del model, output, first, parts  # a large model is in memory once
    pipe = transformers.pipeline(pipeline, model=folder, device="cpu", trust_remote_code=trust)
    found["answer"], text = _ask(pipe, pipeline, **for_pipeline)
    return found, text


@torch.no_grad()
def _ask(pipe: Any, pipeline: str, photo: Tensor, sound: Tensor) -> tuple[Tensor, str]:
    """Return the numbers of a pipeline's answer, and its text, which only models of texts give."""
    picture = Image.fromarray(photo.numpy())
    if pipeline == "image-text-to-text":
        prompt = f"{pipe.processor.image_token} What is this?"
        answer = pipe(text=prompt, images=picture, max_new_tokens=NEW_TOKENS, generate_kwargs={"do_sample": False})
        return torch.zeros(1), answer[0]["generated_text"]
    if pipeline == "depth-estimation":
        return pipe(picture)["predicted_depth"].float().flatten(), ""
    if pipeline == "image-feature-extraction":
        return pipe(picture, return_tensors=True).float().flatten(), ""
    if pipeline == "zero-shot-image-classification":
        scores = pipe(picture, candidate_labels=["a cat", "a dog", "a car"])
    elif pipeline == "audio-classification":
        scores = pipe(sound.numpy(), top_k=5)
    else:
        scores = pipe(picture, top_k=5)
    return torch.tensor([row["score"] for row in scores]), ""


if __name__ == "__main__":
    sys.modules["hf_tokenreduce"] = None  # type: ignore[assignment]  # importing it fails
    copy, work, plan = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(plan.pop("threads"))
    numbers, generated = observe(copy, load_file(f"{work}/inputs.safetensors"), **plan, trust=True)
    save_file({name: value.contiguous() for name, value in numbers.items()}, f"{work}/outputs.safetensors")
    with open(f"{work}/generated.json", "w") as file:
        json.dump(generated, file)
