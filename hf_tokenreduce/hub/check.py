"""Check whether a folder can be published: also in a fresh process that cannot import this package."""

import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from ..methods.register import register_from_folder
from ..modeling.encoders import PREFIX, encoder_config
from ..tasks import MAIN_OUTPUTS, Task, takes_texts
from . import fresh
from .card_check import check_card
from .code_files import __version__, find_code
from .configuration import (
    check_config,
    main_input_of,
    model_class_of,
    pipeline_of,
    stock_class,
    task_of_config,
    tower_of,
)
from .contents import LEFT_BY_TRAINING, list_files, one_line, read_json, short
from .processing import check_processor
from .weights import check_weights


TOLERANCE = 1e-5
MOST_REPORTED = 10
SAMPLES = 16_000  # of sound

# The only variables of this process that the fresh one gets: credentials may stand under any other name.
PASSED_ON = {"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"}


@dataclass(frozen=True)
class CheckReport:
    """What `check_folder` says of a folder.

    Attributes:
        folder: The folder that was checked.
        files: The files that would be published, with their sizes in bytes.
        errors: Why the folder should not be published; empty if it can be.
        warnings: What its owner should know.
        max_difference: The largest difference between the outputs of a fresh process and of this one; None if they
            were not compared.
        task: What the model is for; None if its configuration does not say.
        code_version: The release of hf_tokenreduce that the folder's code is of, told by the SHA-256 of its files;
            None if the code is of no release that this version knows.
    """

    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    max_difference: float | None = None
    task: Task | None = None
    code_version: str | None = None

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
    """Check whether the folder of a saved model can be published.

    The folder holds what `save_pretrained` of the model wrote, and that of its image processor, feature extractor or
    processor of images and texts. Names, sizes, code, configuration and the headers of the weights are checked first.
    Only if they are in order is the folder loaded, by the Auto class and the `pipeline` of its task. This happens in a
    fresh process that cannot import this package, from a copy of the files that belong. The model must compute there
    what it computes in this process.

    Code of an older release is accepted if every code file is, byte by byte, what that release had. A version that the
    folder claims in `config.json` is not believed.

    Args:
        folder: The folder to check.
        images: Pixel values (n, C, H, W), or spectrograms (n, frames, bins), to compare on. By default two images of
            noise, which are always the same.
        load: Whether to load the model. False looks at the files only.
        skip_others: Leave out files that do not belong, instead of making them an error.
        trust_remote_code: Also accept, and run, code that is of no known release. You should have read it.
        timeout: The longest time to wait for the fresh process, in seconds.

    Returns:
        What was found. `report.ok` says whether the folder can be published.

    Example:
        >>> report = check_folder("deit-tome")
        >>> report.raise_for_errors()
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Save a model there first: model.save_pretrained(folder).")
    if trust_remote_code and load:
        register_from_folder(folder)
    stock = _named_class(folder)
    of_audio = stock is not None and main_input_of(stock) == "input_values"
    if images is not None and (images.ndim != (3 if of_audio else 4) or len(images) == 0):
        what = "spectrograms (n, frames, bins)" if of_audio else "pixel values (n, C, H, W)"
        raise ValueError(f"images must be {what} with n above 0, got {tuple(images.shape)}.")
    code = find_code(folder)
    files, errors, others = list_files(folder, code.names, None if stock is None else takes_texts(stock))
    left = [other for other in others if LEFT_BY_TRAINING.fullmatch(other.split()[0])]
    others = [other for other in others if other not in left]
    warnings = [f"Left out, as training leaves it: {other.split()[0]}" for other in left]
    if skip_others:
        warnings += [f"Left out: {other}" for other in others]
    else:
        errors += others
    config: Any = None
    if not errors:
        try:
            config = check_config(folder)
            check_processor(folder, files, of_audio)
            check_weights(folder, files, config)
            check_card(folder, files, config)
        except ValueError as error:
            errors.append(str(error))
    foreign = [
        f"{name} is not this version's, nor that of a release that it knows: the folder was saved by another version, "
        "or the file was changed."
        for name in code.foreign
        if name in files
    ]
    if trust_remote_code:
        warnings += foreign
    else:
        remedy = "Save the model again, or read the file and pass trust_remote_code=True."
        errors += [f"{what} {remedy}" for what in foreign]
    warnings += _about_version(folder, code.version)
    if "README.md" not in files:
        warnings.append("There is no README.md: write_card(folder) writes a model card.")
    difference = None
    if load and not errors:
        try:
            difference = _compare(folder, files, config, images, timeout)
        except ValueError as error:
            errors.append(str(error))
    task = None if config is None else task_of_config(config)
    return CheckReport(folder, files, _first(errors), _first(warnings), difference, task, code.version)


def copy_files(folder: Path, files: dict[str, int], target: Path, link: bool = False) -> None:
    """Copy exactly these files to the same places of `target`; with `link`, as links where the system allows it."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                (target / name).symlink_to((folder / name).resolve())
                continue
            except OSError:  # Windows wants a privilege for it
                pass
        shutil.copyfile(folder / name, target / name)


def _named_class(folder: Path) -> str | None:
    """The stock class of the model, if config.json names one."""
    return stock_class(_config_values(folder))


def _config_values(folder: Path) -> Any:
    """The content of config.json; None if it cannot be read."""
    path = folder / "config.json"
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return None
    try:
        return read_json(path)
    except ValueError:
        return None


def _about_version(folder: Path, version: str | None) -> list[str]:
    """What the owner of a folder should know of the version of its code, and of the version that it claims."""
    values = _config_values(folder)
    claimed = values.get("hf_tokenreduce_version") if isinstance(values, dict) else None
    if version is None:
        if claimed in (None, __version__):
            return []
        return [
            f"config.json says that hf_tokenreduce {short(claimed)} saved the folder; this is {__version__}. That "
            "proves nothing about the code. If it is true, check the folder with that version."
        ]
    found = []
    if version != __version__:
        found.append(
            f"The code is that of hf_tokenreduce {version}, as it was released; this is {__version__}. To publish the "
            "code of this version, load the model and save it in a new folder."
        )
    if claimed not in (None, version):
        found.append(
            f"config.json says that hf_tokenreduce {short(claimed)} saved it, but the code is that of {version}."
        )
    return found


def _compare(folder: Path, files: dict[str, int], config: Any, images: Tensor | None, timeout: float) -> float:
    """Find the largest difference between what a fresh process and this one compute.

    Raises a ValueError if the model does not load there, or if the difference is too large.
    """
    stock = model_class_of(config).__name__.removeprefix(PREFIX)
    plan: dict[str, Any] = {
        "auto_class": task_of_config(config).auto_class,
        "pipeline": pipeline_of(stock),
        "outputs": list(MAIN_OUTPUTS),
    }
    with tempfile.TemporaryDirectory(prefix="tokenreduce-check-") as work:
        copy = Path(work, "published")
        copy_files(folder, files, copy, link=True)
        try:
            inputs = _inputs(copy, config, images, takes_texts(stock))
            outputs, text = fresh.observe(str(copy), inputs, **plan, trust=False)
        except Exception as error:
            raise ValueError(f"The model or what prepares its inputs does not run: {one_line(error)}") from error
        _check_finite(outputs, "here")
        save_file({name: value.contiguous() for name, value in inputs.items()}, Path(work, "inputs.safetensors"))
        _run_fresh(copy, work, {**plan, "threads": torch.get_num_threads()}, timeout)
        fresh_outputs = load_file(Path(work, "outputs.safetensors"))
        fresh_text = json.loads(Path(work, "generated.json").read_text())
    _check_finite(fresh_outputs, "in a fresh process")
    differences = {name: _difference(outputs[name], fresh_outputs[name]) for name in outputs}
    allowed = {name: TOLERANCE * max(1.0, value.abs().max().item()) for name, value in outputs.items()}
    if text != fresh_text or any(differences[name] > allowed[name] for name in outputs):
        found = f"the output differs by {differences['output']:.1e}"
        if "answer" in differences:
            found += f", the answer of pipeline by {differences['answer']:.1e}"
        if text != fresh_text:
            found += f", which is {one_line(repr(fresh_text), 60)} instead of {one_line(repr(text), 60)}"
        raise ValueError(
            f"In a fresh process the model computes something else: {found}. Save it again with this version: "
            "model.save_pretrained(folder)."
        )
    return differences["output"]


def _inputs(copy: Path, config: Any, images: Tensor | None, texts: bool) -> dict[str, Tensor]:
    """Make inputs for the model's forward, and a photo and a sound. They are always the same."""
    photo = torch.randint(0, 256, (96, 128, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sound = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(2))
    if images is None:
        shape = tower_of(config).inputs(encoder_config(config))
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    main_input = main_input_of(model_class_of(config).__name__.removeprefix(PREFIX))
    inputs = {main_input: images.float(), "photo": photo, "sound": sound}
    if texts and task_of_config(config).name == "zero-shot-image-classification":
        tokenizer = AutoTokenizer.from_pretrained(copy, local_files_only=True)
        inputs |= tokenizer(["a photo of a cat", "a dog"], padding=True, return_tensors="pt")
    elif texts:
        processor = AutoProcessor.from_pretrained(copy, local_files_only=True)
        prompt = f"{processor.image_token} What is this?"
        one = processor(images=photo.numpy(), text=prompt, return_tensors="pt")
        inputs["input_ids"] = one["input_ids"].expand(len(images), -1)
    return inputs


def _check_finite(found: dict[str, Tensor], where: str) -> None:
    if not found["output"].isfinite().all():
        raise ValueError(f"The output of this model is not finite {where}: its weights are broken.")
    if not found.get("answer", found["output"]).isfinite().all():
        raise ValueError(
            f"What pipeline answers is not finite {where}, though the model is in order: look at the settings of what "
            "prepares its inputs."
        )


def _difference(here: Tensor, there: Tensor) -> float:
    """Find the largest difference of two tensors of finite numbers; infinite if their shapes differ."""
    return (here - there).abs().max().item() if here.shape == there.shape else float("inf")


def _run_fresh(copy: Path, work: str, plan: dict[str, Any], timeout: float) -> None:
    """Run `fresh.py` on a copy of the folder, in a process without this package and without credentials."""
    environment = {name: value for name, value in os.environ.items() if name in PASSED_ON or name[:4] == "OMP_"}
    environment |= {
        "HOME": work,
        "HF_HOME": f"{work}/home",
        "HF_MODULES_CACHE": f"{work}/modules",
        "HF_TOKEN_PATH": f"{work}/no-token",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if site.ENABLE_USER_SITE:  # packages of `pip install --user` lie in the home directory
        environment["PYTHONUSERBASE"] = site.getuserbase()
    code = Path(fresh.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-c", code, str(copy), work, json.dumps(plan)]
    try:
        done = subprocess.run(
            command, env=environment, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout, errors="replace",
        )  # fmt: skip
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
