"""`check_folder`: whether a folder can be published, seen from a process that knows nothing of this package."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from .contents import (
    check_config,
    check_processor,
    check_weights,
    differing_code,
    list_files,
    model_class_of,
    one_line,
)


TOLERANCE = 1e-5
MOST_REPORTED = 10

# Of this process's environment; credentials may stand under any other name.
PASSED_ON = {"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"}

# What a stranger does with the folder.
FRESH = """
import json, sys
sys.modules["hf_tokenreduce"] = None  # importing it fails
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline
folder, work, threads = sys.argv[1:4]
torch.set_num_threads(int(threads))
inputs = load_file(work + "/inputs.safetensors")
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, use_safetensors=True).eval()
assert type(model).__module__.startswith("transformers_modules."), "the code in the folder was not used"
with torch.no_grad():
    logits = model(inputs["pixels"].to(model.dtype)).logits
save_file({"logits": logits.float().contiguous()}, work + "/outputs.safetensors")
classify = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu")
answers = classify(Image.fromarray(inputs["photo"].numpy()), top_k=5)
with open(work + "/answers.json", "w") as file:
    json.dump(answers, file)
"""


@dataclass(frozen=True)
class CheckReport:
    """files: what would be published, with sizes in bytes. errors: why it should not be, empty if it can be.
    max_difference: of logits computed in a fresh process and in this one; None if it did not come to that.
    """

    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    max_difference: float | None = None

    @property
    def ok(self) -> bool:
        return not self.errors

    def raise_for_errors(self) -> None:
        if self.errors:
            raise ValueError(f"{self.folder} cannot be published: {' '.join(self.errors)}")


def check_folder(
    folder: str | Path,
    *,
    images: Tensor | None = None,
    load: bool = True,
    skip_others: bool = False,
    trust_remote_code: bool = False,
    timeout: float = 600,
) -> CheckReport:
    """Whether a folder of `save_pretrained`, with its image processor, can be published.

    Names, sizes, configuration and the headers of the weights come first; only if they are in order is the folder
    loaded, from a copy of just the files that belong, in a fresh process that cannot import this package: by the Auto
    class and by `pipeline`. Its logits have to be those of this process.

    images: pixel values (n, C, H, W) to compare on. None: two of noise, always the same.
    load: False looks at the files only.
    skip_others: files that do not belong are left out instead of being an error.
    trust_remote_code: also take, and run, code that is not this version's. You should have read it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Save a model there first: model.save_pretrained(folder).")
    if images is not None and (images.ndim != 4 or len(images) == 0):
        raise ValueError(f"images must be pixel values (n, C, H, W) with n above 0, got {tuple(images.shape)}.")
    files, errors, others = list_files(folder)
    warnings: list[str] = []
    if skip_others:
        warnings += [f"Left out: {other}" for other in others]
    else:
        errors += others
    config: Any = None
    if not errors:
        try:
            config = check_config(folder)
            check_processor(folder)
            check_weights(folder, files, config)
        except ValueError as error:
            errors.append(str(error))
    for name in differing_code(folder, files):
        what = f"{name} is not this version's: the folder was saved by another one, or the file was changed."
        if trust_remote_code:
            warnings.append(what)
        else:
            errors.append(f"{what} Save the model again, or read the file and pass trust_remote_code=True.")
    if "README.md" not in files:
        warnings.append("There is no README.md: write_card(folder) writes a model card.")
    difference = None
    if load and not errors:
        try:
            difference = _compare(folder, files, config, images, timeout)
        except ValueError as error:
            errors.append(str(error))
    return CheckReport(folder, files, _first(errors), _first(warnings), difference)


def copy_files(folder: Path, files: dict[str, int], target: Path, link: bool = False) -> None:
    """Exactly these files, in the same places. `link`: by links where the system has them, for a short-lived copy."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                (target / name).symlink_to((folder / name).resolve())
                continue
            except OSError:  # Windows wants a privilege for it
                pass
        shutil.copyfile(folder / name, target / name)


def _compare(folder: Path, files: dict[str, int], config: Any, images: Tensor | None, timeout: float) -> float:
    """The largest difference between what a fresh process and this one compute. Raises a ValueError if it does not
    load, or if that is too large."""
    if images is None:
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        images = torch.randn(2, config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    photo = torch.randint(0, 256, (96, 128, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with tempfile.TemporaryDirectory(prefix="tokenreduce-check-") as work:
        copy = Path(work, "published")
        copy_files(folder, files, copy, link=True)
        try:
            ours, scores = _compute(copy, config, images, photo)
        except Exception as error:
            raise ValueError(f"The model or its image processor does not run: {one_line(error)}") from error
        if not ours.isfinite().all():
            raise ValueError("The logits of this model are not finite: its weights are broken.")
        save_file({"pixels": images.float().contiguous(), "photo": photo}, Path(work, "inputs.safetensors"))
        _run_fresh(copy, work, timeout)
        theirs = load_file(Path(work, "outputs.safetensors"))["logits"]
        answers = json.loads(Path(work, "answers.json").read_text())
    difference = (ours - theirs).abs().max().item()
    of_pipeline = max(abs(score - answer["score"]) for score, answer in zip(scores, answers, strict=True))
    if not max(difference, of_pipeline) <= TOLERANCE:
        raise ValueError(
            f"In a fresh process the model computes something else: logits differ by {difference:.1e}, the scores of "
            f"pipeline by {of_pipeline:.1e}. Save it again with this version: model.save_pretrained(folder)."
        )
    return difference


@torch.no_grad()
def _compute(copy: Path, config: Any, images: Tensor, photo: Tensor) -> tuple[Tensor, list[float]]:
    """What this process computes, by this package's code: logits of images, and the scores of a photo by pipeline."""
    from transformers import AutoImageProcessor, pipeline

    model = model_class_of(config).from_pretrained(copy, use_safetensors=True, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(copy, local_files_only=True)
    logits = model(images.to(model.dtype)).logits.float()
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    return logits, [answer["score"] for answer in classify(Image.fromarray(photo.numpy()), top_k=5)]


def _run_fresh(copy: Path, work: str, timeout: float) -> None:
    environment = {name: value for name, value in os.environ.items() if name in PASSED_ON or name[:4] == "OMP_"}
    environment |= {
        "HOME": work,
        "HF_HOME": f"{work}/home",
        "HF_MODULES_CACHE": f"{work}/modules",
        "HF_TOKEN_PATH": f"{work}/no-token",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", FRESH, str(copy), work, str(torch.get_num_threads())]
    try:
        done = subprocess.run(
            command, env=environment, cwd=work, capture_output=True, text=True, timeout=timeout, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"Loading the model in a fresh process took more than {timeout:.0f} s.") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(
            f"It does not load in a fresh process: {one_line(lines[-1] if lines else f'exit {done.returncode}')}"
        )


def _first(messages: list[str]) -> tuple[str, ...]:
    more = len(messages) - MOST_REPORTED
    return (*messages[:MOST_REPORTED], f"And {more} more.") if more > 0 else tuple(messages)
