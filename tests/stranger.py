"""What a stranger does with folders of models, run where this package cannot be imported: loads them by Auto classes,
asks pipelines, saves them again. Writes what it saw for `test_tasks.py`."""

import json
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
import transformers
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)


TRUST = {"trust_remote_code": True}
CANDIDATES = ["cat.", "dog."]


def refused(load, *arguments):
    try:
        return f"loaded a {type(load(*arguments)).__name__}"
    except ValueError as error:
        return str(error)


def main_output(output, name):
    value = output[name]
    return torch.stack(list(value)) if isinstance(value, (tuple, list)) else value


def by_hand(task, model, folder, photo, sound):
    """What the pipeline should answer, from the model and what prepares its inputs."""
    if task == "audio-classification":
        inputs = AutoFeatureExtractor.from_pretrained(folder)(sound.numpy(), sampling_rate=16000, return_tensors="pt")
        return model(**inputs).logits[0].softmax(dim=-1).sort(descending=True).values
    if task == "image-text-to-text":
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(images=photo, text="<image> what?", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        return processor.decode(tokens[0], skip_special_tokens=True)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=photo, return_tensors="pt").pixel_values
    if task == "zero-shot-image-classification":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sigmoid = "Siglip" in type(model).__name__
        padding = {"padding": "max_length", "max_length": 64, "truncation": True} if sigmoid else {"padding": True}
        texts = tokenizer([f"This is a photo of {word}." for word in CANDIDATES], return_tensors="pt", **padding)
        logits = model(pixel_values=pixels, **texts).logits_per_image[0]
        return (logits.sigmoid() if sigmoid else logits.softmax(dim=-1)).sort(descending=True).values
    output = model(pixels)
    if task == "image-classification":
        return output.logits[0].softmax(dim=-1).sort(descending=True).values
    if task == "depth-estimation":
        return processor.post_process_depth_estimation(output, [photo.size[::-1]])[0]["predicted_depth"]
    return output[0]


def by_pipeline(task, folder, photo, sound):
    pipe = pipeline(task, model=folder, **TRUST)
    if task == "zero-shot-image-classification":
        answers = pipe(photo, candidate_labels=CANDIDATES)
    elif task == "image-text-to-text":
        answer = pipe(text="<image> what?", images=photo, max_new_tokens=5, generate_kwargs={"do_sample": False})
        return answer[0]["generated_text"]
    elif task == "audio-classification":
        answers = pipe(sound.numpy(), top_k=5)
    elif task == "image-feature-extraction":
        return pipe(photo, return_tensors=True)
    elif task == "depth-estimation":
        return pipe(photo)["predicted_depth"]
    else:
        answers = pipe(photo, top_k=5)
    return torch.tensor([answer["score"] for answer in answers])


def run_card(folder, photo_file):
    """The code in the card runs as it stands, but for the names in it."""
    code = (Path(folder) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("<this repository>", folder).replace("<commit>", "main").replace("photo.jpg", photo_file)
    code = code.replace('"sound.wav"', "sound.numpy()").replace("What is this?", "what?")
    names = {"sound": torch.randn(16000), "print": lambda *values: None}
    exec(code, names)
    features = names.get("features")
    return None if features is None else list(features.shape)


def visit(folder, case, inputs, photo, sound, photo_file):
    """Numbers and words about a folder."""
    auto_class = getattr(transformers, case["auto_class"])
    model = auto_class.from_pretrained(folder, **TRUST).eval()
    again = f"{folder}-again"
    model.save_pretrained(again)
    second = auto_class.from_pretrained(again, **TRUST).eval()
    outputs = [one(**inputs) for one in (model, second)]
    values = {
        "output": main_output(outputs[0], case["output"]),
        "again": main_output(outputs[1], case["output"]),
        "counts": outputs[0].token_counts,
    }
    words = {
        "module": type(model).__module__.split(".")[0],
        "class": type(model).__name__,
        "config": type(AutoConfig.from_pretrained(folder, **TRUST)).__name__,
        "reduction": model.config.reduction.to_dict(),
        "processor": type(AutoProcessor.from_pretrained(folder, **TRUST)).__name__,
    }
    if case["pipeline"]:
        found = [by_pipeline(case["task"], folder, photo, sound), by_hand(case["task"], model, folder, photo, sound)]
        if isinstance(found[0], str):
            words["answer"], words["expected"] = found
        else:
            values["answer"], values["expected"] = found
    words["features"] = run_card(folder, photo_file)
    return values, words


def main(work):
    cases = json.loads((work / "cases.json").read_text())
    shared = load_file(work / "shared.safetensors")
    photo, sound = Image.fromarray(shared["photo"].numpy()), shared["sound"]
    photo.save(work / "photo.png")
    found = {}
    # Before any code was trusted: then nothing of these folders has been loaded.
    for name, case in cases.items():
        folder = str(work / name)
        loaders = [AutoConfig.from_pretrained, transformers.AutoModel.from_pretrained]
        loaders.append(getattr(transformers, case["auto_class"]).from_pretrained)
        if case["pipeline"]:
            loaders.append(lambda folder, task=case["task"]: pipeline(task, model=folder))
        found[name] = {"refused": [refused(load, folder) for load in loaders]}
    for name, case in cases.items():
        folder = str(work / name)
        try:
            inputs = load_file(work / f"{name}.inputs.safetensors")
            values, words = visit(folder, case, inputs, photo, sound, str(work / "photo.png"))
            save_file({key: value.contiguous() for key, value in values.items()}, work / f"{name}.seen.safetensors")
            found[name] |= words
        except Exception:
            found[name]["error"] = traceback.format_exc()
    (work / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.modules["hf_tokenreduce"] = None  # importing it fails
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    # AutoBackbone takes only what the Hub knows by that name, even if it is a folder.
    with mock.patch.object(HfApi, "repo_exists", return_value=True):
        main(Path(sys.argv[1]))
