"""From arguments to a trained model in a folder, and the record of how it came about: what `tokenreduce train` and
`examples/run_image_classification.py` run."""

import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from datasets import Image as ImageFeature
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    ProgressCallback,
    set_seed,
)
from transformers.utils import logging

from ..calibration import calibrate
from ..convert import reduce_tokens, restore, with_reduction
from ..files import write_whole
from ..hub.contents import short
from ..loading import folder_split, method_setting, parse_settings, spread
from ..methods import METHODS
from ..modeling.encoders import encoder_of, facts_of
from ..modeling.multiply_adds import shares_kept
from ..tasks import all_layers_act
from ..timing import in_turns
from .arguments import TokenReduceTrainingArguments
from .augmentation import BatchTransform, Collator, EvalTransform, TrainTransform, decoded, readable_rows
from .progress import EpochLines
from .recipes import AUGMENTATION, recipe
from .trainer import TokenReduceTrainer


logger = logging.get_logger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A folder or a Hub id."})
    model_revision: str = field(default="main", metadata={"help": "A commit of it."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model brings."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "A new head if the classes are others."})
    reduction: str | None = field(default=None, metadata={"help": f"One of {', '.join(METHODS)}."})
    reduction_args: str = field(default="{}", metadata={"help": "Its settings, JSON."})
    share: float | None = field(default=None, metadata={"help": "Of the multiply-adds to keep."})
    recipe: str = field(default="quick", metadata={"help": "quick or paper."})
    teacher_model: str | None = field(default=None, metadata={"help": "Instead of the dense model."})
    lora: bool = field(default=False, metadata={"help": "Adapt the backbone by LoRA; it is merged at the end."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub."})
    train_dir: str | None = field(default=None, metadata={"help": "Class folders."})
    validation_dir: str | None = field(default=None, metadata={"help": "Class folders."})
    train_val_split: float = field(default=0.15, metadata={"help": "Taken from training without validation data."})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    image_column_name: str = "image"
    label_column_name: str = "label"
    augmentation: str = field(default="light", metadata={"help": f"One of {', '.join(AUGMENTATION)}."})
    on_error: str = field(default="stop", metadata={"help": "At an unreadable image: stop, or skip it."})


def main(
    arguments: list[str] | None = None, command: Sequence[str] | None = None
) -> tuple[dict[str, Any], str] | None:
    """Train, evaluate, save the model and a record of how it came about.

    Args:
        arguments: Of the command line, by default this process's own.
        command: What the record says was called.

    Returns:
        The record, and the folder; None in other processes than the first.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = command or ("python", "examples/run_image_classification.py", *arguments)
    model_args, data_args, args = parse(arguments)
    came_from = origin(model_args.model_name_or_path)
    set_seed(args.seed)
    train, validation, names = load_data(data_args, args.seed)
    processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    dense, order, knows_classes = load_model(model_args, names)
    if not knows_classes and (args.freeze_backbone or (args.logits_weight and model_args.teacher_model is None)):
        raise ValueError(
            "The model gets a new head for these classes, which this recipe would freeze, or take as the teacher. "
            "First train the model as it is, without --reduction; then reduce what that wrote."
        )
    model = reduce(dense, model_args, train, processor, data_args)
    if model_args.lora:
        model = with_lora(model)

    augmentation = dict(AUGMENTATION[data_args.augmentation])
    mixing = {name: augmentation.pop(name) for name in ("mixup", "cutmix") if name in augmentation}
    columns: dict[str, Any] = {
        "image_column_name": data_args.image_column_name,
        "label_column_name": data_args.label_column_name,
    }
    trainer = TokenReduceTrainer(
        model,
        args,
        train_dataset=train.with_transform(
            Relabelled(BatchTransform(TrainTransform(processor, **augmentation), **columns), order)
        ),
        eval_dataset=validation.with_transform(Relabelled(BatchTransform(EvalTransform(processor), **columns), order)),
        data_collator=Collator(**mixing, num_labels=len(names)) if mixing else Collator(),
        processing_class=processor,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        teacher_model=model_args.teacher_model,
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(EpochLines)
    sample = validation.select(spread(len(validation), 256))[data_args.image_column_name]
    pixels = torch.stack([EvalTransform(processor)(decoded(image)) for image in sample])
    baseline = evaluate_dense(dense, trainer) if knows_classes else None
    begin = time.perf_counter()
    if args.num_train_epochs:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - begin
    metrics = trainer.evaluate()
    if model_args.lora:
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model()
    if args.process_index == 0:
        record = describe(trainer.model, pixels) | {
            **came_from,
            "dataset": name_of(data_args.dataset_name, data_args.train_dir),
            "eval_dataset": name_of_validation(data_args),
            "eval_images": len(validation),
            "seed": args.seed,
            "command": shown(command),
            "epochs": round(trainer.state.epoch or 0, 2),
            # What came before a resumption is not known.
            "seconds": None if args.resume_from_checkpoint else round(seconds, 1),
            "top1": 100 * metrics["eval_accuracy"],
            "baseline_top1": baseline,
        }
        write_whole(Path(args.output_dir) / "record.json", json.dumps(record, indent=1))
        return record, args.output_dir
    return None


def origin(path: str) -> dict[str, Any]:
    """The checkpoint that it all began with, and the commands that made `path` of it: a folder that a training wrote
    knows its own."""
    file = Path(path) / "record.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    made_by = [record["command"]] if record.get("command") else []
    name = Path(path).name if Path(path).exists() else path  # else a Hub id
    return {
        "base_model": record.get("base_model") or name,
        "earlier_commands": (record.get("earlier_commands") or []) + made_by,
    }


def shown(command: Sequence[str]) -> str:
    """A command that anyone may read: without secrets, and without where its folders are on this machine."""
    command = ["/".join(Path(word).parts[-2:]) if word.startswith("/") else word for word in command]
    return re.sub(r"(--\w*(?:token|key|secret|password)[ =])\S+", r"\1***", shlex.join(command))


def name_of(dataset_name: str | None, folder: str | None) -> str:
    return dataset_name or "/".join(Path(str(folder)).parts[-2:])


def name_of_validation(data_args: DataArguments) -> str:
    if data_args.validation_dir is not None:
        return name_of(None, data_args.validation_dir)
    held_out = "" if data_args.dataset_name else " (a part held out)"
    return name_of(data_args.dataset_name, data_args.train_dir) + held_out


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TokenReduceTrainingArguments]:
    """The recipe of the method is the default of every training argument."""
    description = "Fine-tune an image classifier with any token reduction, by the method's recipe."
    parser = HfArgumentParser((ModelArguments, DataArguments, TokenReduceTrainingArguments), description=description)
    parser.set_defaults(report_to="none", eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    known, _ = parser.parse_known_args(arguments)
    if known.augmentation not in AUGMENTATION:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATION)}, got {known.augmentation!r}.")
    if known.on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be stop or skip, got {known.on_error!r}.")
    defaults = recipe(known.reduction or next(iter(METHODS)), known.recipe)
    if known.recipe == "paper":  # its batches are those of all devices together
        devices = int(os.environ.get("WORLD_SIZE", 1))
        defaults["per_device_train_batch_size"] = max(1, defaults["per_device_train_batch_size"] // devices)
        parser.set_defaults(augmentation="strong")
    # Trainer would hide its bar where messages are hidden, and warn of pinned memory where there is no device.
    parser.set_defaults(**defaults, remove_unused_columns=False, disable_tqdm=False, logging_strategy="epoch")
    parser.set_defaults(dataloader_pin_memory=torch.accelerator.is_available())
    if known.lora:
        parser.set_defaults(freeze_backbone=False)
    model_args, data_args, args = parser.parse_args_into_dataclasses(arguments)
    for option in ("share", "reduction_args"):
        if known.reduction is None and getattr(known, option) != parser.get_default(option):
            raise ValueError(f"--{option} says how a method is set, and there is none. Give one: --reduction tome.")
    for option in ("max_train_samples", "max_eval_samples"):
        if getattr(known, option) is not None and getattr(known, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(known, option)}. Leave it out to take all.")
    if model_args.lora and args.freeze_backbone:
        raise ValueError("--lora adapts the backbone, --freeze_backbone keeps it as it is. Leave one of them out.")
    return model_args, data_args, args


def load_data(data_args: DataArguments, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    if data_args.dataset_name:
        data = dict(load_dataset(data_args.dataset_name))
        data["validation"] = data.get("validation", data.get("test"))
    elif data_args.train_dir:
        data = {"train": folder_split(data_args.train_dir, "train"), "validation": None}
    else:
        raise ValueError("Nothing to train on: give --dataset_name or --train_dir.")
    if data_args.validation_dir:
        data["validation"] = folder_split(data_args.validation_dir, "validation", "train")
    train, validation = data["train"], data["validation"]
    names = class_names(train, data_args)
    if validation is None:
        split = train.train_test_split(data_args.train_val_split, seed=seed)
        train, validation = split["train"], split["test"]
    elif class_names(validation, data_args) != names:
        raise ValueError(
            f"The classes of training and validation differ: {names} and {class_names(validation, data_args)}. Give "
            "both the same class folders."
        )
    parts = []
    for part, most in ((train, data_args.max_train_samples), (validation, data_args.max_eval_samples)):
        part = part.shuffle(seed=seed).select(range(min(most, len(part)))) if most else part
        # Decoded by our transforms: `datasets` would raise whatever Pillow does, without the name of the file.
        part = part.cast_column(data_args.image_column_name, ImageFeature(decode=False))
        if data_args.on_error == "skip":
            readable = readable_rows(part, data_args.image_column_name)
            logger.warning(f"{len(part) - len(readable)} of {len(part)} images cannot be read and are left out.")
            part = part.select(readable)
        parts.append(part)
    return parts[0], parts[1], names


def class_names(dataset: Dataset, data_args: DataArguments) -> list[str]:
    feature = dataset.features.get(data_args.label_column_name)
    if not isinstance(feature, ClassLabel) or not isinstance(
        dataset.features.get(data_args.image_column_name), ImageFeature
    ):
        raise ValueError(
            "The data has no classes: make one folder per class, at least two, and no metadata file. It needs columns "
            f"{data_args.image_column_name!r} and {data_args.label_column_name!r}, the second a ClassLabel. It has "
            f"{short(dict(dataset.features), 300)}."
        )
    return feature.names


def load_model(model_args: ModelArguments, names: list[str]) -> tuple[Any, list[int], bool]:
    """The model, for each class of the data its index in the model, and whether it knew them."""
    where = {"revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code}
    model = AutoModelForImageClassification.from_pretrained(model_args.model_name_or_path, **where)
    if not hasattr(model, "classifier"):
        raise ValueError(
            f"{model_args.model_name_or_path} is a {type(model).__name__}, which has two heads and no loss. Save it "
            "with one, by DeiTForImageClassification.from_pretrained(...).save_pretrained(FOLDER), and train that."
        )
    theirs = model.config.label2id
    if set(theirs) == set(names):
        return model, [int(theirs[name]) for name in names], True
    if not model_args.ignore_mismatched_sizes:
        raise ValueError(
            f"The data has {len(names)} classes, {names[:8]}, the model {model.config.num_labels}, "
            f"{list(theirs)[:8]}. Rename the class folders, or pass --ignore_mismatched_sizes for a new head."
        )
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    path = model_args.model_name_or_path
    model = AutoModelForImageClassification.from_pretrained(
        path, num_labels=len(names), ignore_mismatched_sizes=True, **labels, **where
    )
    model.classifier.reset_parameters()  # also if there were as many classes, but others
    return model, list(range(len(names))), False


def reduce(dense: Any, model_args: ModelArguments, train: Dataset, processor: Any, data_args: DataArguments) -> Any:
    if model_args.reduction is None:
        return dense if hasattr(dense.config, "reduction") else reduce_tokens(dense, None)
    settings = parse_settings(model_args.reduction_args)
    method = METHODS.get(model_args.reduction)
    if method is not None and method.needs == "labels":
        raise ValueError(
            f"{method.title}'s filter has to be fitted first, or it keeps every token. Run examples/run_delta_loss.py "
            "with these settings, then train the model it writes, without --reduction."
        )
    setting = method_setting(dense.config, model_args.reduction, model_args.share, settings)
    model = with_reduction(dense, setting)
    if method is not None and method.prepare is not None:
        photos = train.shuffle(seed=0).select(range(min(100, len(train))))[data_args.image_column_name]
        pixels = torch.stack([EvalTransform(processor)(decoded(photo)) for photo in photos])
        calibrate(model, pixels, getattr(setting, "target", None))
    return model


def with_lora(model: Any) -> Any:
    """Of the backbone; the head and the learned parts of the method are trained whole."""
    whole = ["classifier"]
    if any(p.requires_grad for reducer in encoder_of(model).reducers for p in reducer.parameters()):
        whole.append("reducer")
    return get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], modules_to_save=whole))


@dataclass
class Relabelled:
    """A batch transform whose labels are the model's."""

    transform: BatchTransform
    order: list[int]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        batch = self.transform(batch)
        return {**batch, "labels": [self.order[label] for label in batch["labels"]]}


@torch.no_grad()
def evaluate_dense(dense: Any, trainer: TokenReduceTrainer) -> float:
    """Top-1 of the model as it came, before any reduction."""
    plain = (restore(dense) if hasattr(dense.config, "reduction") else dense).to(trainer.args.device).eval()
    correct = 0
    for batch in trainer.get_eval_dataloader():
        predictions = plain(batch["pixel_values"].to(trainer.args.device)).logits.argmax(dim=-1)
        correct += (
            trainer.accelerator.gather_for_metrics(predictions == batch["labels"].to(predictions.device)).sum().item()
        )
    return 100 * correct / len(trainer.eval_dataset)


@torch.no_grad()
def describe(model: Any, pixels: torch.Tensor, repeats: int = 7, batch_size: int = 32) -> dict[str, Any]:
    """What the model saves: by arithmetic on all images, and by the clock on some, in turns with the dense one."""
    model = model.cpu().eval()
    plain = restore(model).eval()
    counts = torch.cat([model(part, **all_layers_act(model)).token_counts for part in pixels.split(batch_size)])
    batch = pixels[spread(len(pixels), batch_size)]
    reduction = model.config.reduction
    share = shares_kept(model.config, counts, facts_of(model.config).num_tokens, reduction).mean().item()
    seconds, dense_seconds = in_turns([lambda: model(batch), lambda: plain(batch)], repeats, model.device)
    return {
        "method": None if reduction is None else reduction.method,
        "settings": None if reduction is None else reduction.to_dict(),
        "mult_adds_ratio": round(share, 4),
        "speedup": round(statistics.median(dense_seconds) / statistics.median(seconds), 3),
        "speed_batch_size": len(batch),
        "machine": f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "tokens_per_layer": np.round(counts.double().mean(dim=0).numpy(), 1).tolist(),
    }
