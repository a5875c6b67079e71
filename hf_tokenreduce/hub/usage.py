"""Write the code that uses a published model, by its task, for cards and `publish`."""

from typing import Any

from ..methods import method_of
from ..modeling.encoders import PREFIX, encoder_config
from ..tasks import takes_texts
from .configuration import main_input_of, model_class_of, pipeline_of, task_of_config, tower_of


NOT_NAMED = "<this repository>"  # stands for the id as long as it is not known
WHERE = """where = {"revision": "<commit>", "trust_remote_code": True}  # pin the commit whose code you have read"""

# For each pipeline, the name of the variable that holds it, and the arguments of a call.
CALLS = {
    "image-classification": ("classify", '"photo.jpg"'),
    "zero-shot-image-classification": ("classify", '"photo.jpg", candidate_labels=["a cat", "a dog"]'),
    "depth-estimation": ("estimate", '"photo.jpg"'),
    "audio-classification": ("classify", '"sound.wav"'),
}

CHAT = """content = [{"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "What is this?"}]
print(answer(text=[{"role": "user", "content": content}], max_new_tokens=40))"""

FEATURES = """processor = AutoImageProcessor.from_pretrained("{repo_id}", revision="<commit>")
out = model(**processor(load_image("photo.jpg"), return_tensors="pt"), output_patch_map=True)
"""
A_ROW_PER_PATCH = "features = out.last_hidden_state  # {prefix}a row for every patch"
UNMERGE = """unmerge = get_class_from_dynamic_module("grid.unmerge", "{repo_id}", revision="<commit>")
features = unmerge(out.last_hidden_state, out.{patches})  # a row for every patch"""

# As in pyproject.toml, because a model's folder holds the code of this package.
LEAST_TRANSFORMERS = "5.19"


def stock_of(config: Any) -> str:
    return model_class_of(config).__name__.removeprefix(PREFIX)


def loading(auto_class: str, repo_id: str, revision: str | None) -> str:
    """Write two lines that load a model."""
    return (
        f"from transformers import {auto_class}\n"
        f'model = {auto_class}.from_pretrained("{repo_id}", revision="{revision or "<commit>"}", '
        "trust_remote_code=True)"
    )


def usage(config: Any, repo_id: str) -> str:
    """Write code that loads and runs a model by its Auto class and by the pipeline of its task."""
    task, pipeline = task_of_config(config), pipeline_of(stock_of(config))
    names, more = [task.auto_class], ""
    lines = [f'model = {task.auto_class}.from_pretrained("{repo_id}", **where)']
    if pipeline == "image-feature-extraction":
        names = ["AutoImageProcessor", *names]
        lines.append(FEATURES.replace("{repo_id}", repo_id) + _features(config, repo_id))
        if not tower_of(config).wants_grid:
            more = "from transformers.dynamic_module_utils import get_class_from_dynamic_module\n"
        more += "from transformers.image_utils import load_image\n"
    elif pipeline is not None:
        names.append("pipeline")
        called, arguments = CALLS.get(pipeline, ("answer", ""))
        lines.append(f'{called} = pipeline("{pipeline}", model="{repo_id}", **where)')
        lines.append(f"print({called}({arguments}))" if arguments else CHAT)
    return f"from transformers import {', '.join(names)}\n{more}\n{WHERE}\n" + "\n".join(lines)


def run(config: Any) -> str:
    """Write the call that runs the model on its main input alone."""
    stock = stock_of(config)
    name = "model.get_image_features" if takes_texts(stock) else "model"
    return f"{name}({'pixels' if main_input_of(stock) == 'pixel_values' else 'sounds'}, output_patch_map=True)"


def pipeline_tag(config: Any) -> str:
    """Name the task by which the Hub finds a model."""
    stock = stock_of(config)
    if task_of_config(config).name == "backbone":
        return "image-feature-extraction"
    return pipeline_of(stock) or ("image-text-to-text" if takes_texts(stock) else "feature-extraction")


def _features(config: Any, repo_id: str) -> str:
    tower = tower_of(config)
    if tower.wants_grid:
        prefix = tower.num_prefix_tokens(encoder_config(config))
        before = {0: "", 1: "the class token, then "}.get(prefix, f"{prefix} prefix tokens, then ")
        return A_ROW_PER_PATCH.format(prefix=before)
    mixes = method_of(config.reduction).token_decoder is not None
    return UNMERGE.format(repo_id=repo_id, patches="patch_weights" if mixes else "patch_map")
