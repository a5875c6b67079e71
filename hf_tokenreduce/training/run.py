"""Train a model from command-line arguments, and save it with a record of how it was made.

`tokenreduce train` and `examples/run_image_classification.py` run `main` of this module.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    ProgressCallback,
    set_seed,
)
from transformers.utils import logging

from ..budget import reduce_to_share
from ..convert import reduce_tokens
from ..files import CONFIG, WRITTEN_ABOUT_IT, write_whole
from ..loading import parse_settings
from ..methods import METHODS
from ..methods.register import register_from_folder
from ..modeling.encoders import encoder_of
from ..pictures import spread
from .arguments import TokenReduceTrainingArguments
from .augmentation import BatchTransform, Collator, EvalTransform, TrainTransform
from .callbacks import EpochLines
from .data import Relabelled, load_data
from .measuring import describe, evaluate_dense, how_long, last_metrics
from .origin import fitted_on, last_checkpoint, name_of, origin, shown
from .recipes import AUGMENTATION, recipe
from .streaming import Seeded, first_images, load_streams, training_stream
from .trainer import TokenReduceTrainer


logger = logging.get_logger(__name__)


@dataclass
class ModelArguments:
    """Say which model is trained, and how it is reduced."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the model."})
    model_revision: str = field(default="main", metadata={"help": "Commit, tag or branch of the Hub id."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Make a new head if the classes of the data are not those of the model."}
    )
    reduction: str | None = field(
        default=None,
        metadata={"help": f"Name of the method: {', '.join(METHODS)}. Default: train the model as it is."},
    )
    reduction_args: str = field(default="{}", metadata={"help": "Settings of the method, as JSON."})
    share: float | None = field(default=None, metadata={"help": "Share of the multiply-adds to keep, such as 0.65."})
    recipe: str = field(
        default="quick", metadata={"help": "Recipe that gives the training arguments: quick or paper."}
    )
    teacher_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the teacher. Default: the dense model."}
    )
    lora: bool = field(
        default=False, metadata={"help": "Train the backbone with LoRA, which is merged into it at the end."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the model in the output folder."})


@dataclass
class DataArguments:
    """Say which images the model is trained and evaluated on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of training images, with one folder per class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder of validation images, with one folder per class."}
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images to validate on if there are no others."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most this many validation images."})
    image_column_name: str = field(default="image", metadata={"help": "Name of the column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Name of the column with the labels."})
    augmentation: str = field(
        default="light", metadata={"help": f"Augmentation of the training images: {', '.join(AUGMENTATION)}."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the images as a stream. Folders may hold WebDataset shards (.tar)."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Number of images of a stream that are held back to shuffle them."}
    )
    on_error: str = field(default="stop", metadata={"help": "What to do about an unreadable image: stop, or skip it."})


def main(
    arguments: list[str] | None = None, command: Sequence[str] | None = None
) -> tuple[dict[str, Any], str] | None:
    """Train, evaluate and save a model, with a record of how it was made.

    Args:
        arguments: Command-line arguments. None: those of this process.
        command: The command that the record shows. None: `python examples/run_image_classification.py`.

    Returns:
        The record and the output folder. None in all processes but the first.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = command or ("python", "examples/run_image_classification.py", *arguments)
    model_args, data_args, args = parse(arguments)
    came_from = origin(model_args.model_name_or_path)
    set_seed(args.seed)
    train, validation, names = load_streams(data_args) if data_args.streaming else load_data(data_args, args.seed)
    processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    dense, order, knows_classes = load_model(model_args, names)
    if not knows_classes and (args.freeze_backbone or (args.logits_weight and model_args.teacher_model is None)):
        raise ValueError(
            "The model gets a new head for these classes, and this recipe would freeze it or use it as the teacher. "
            "First train the model as it is, without --reduction. Then train that model with --reduction."
        )
    model = reduce(dense, model_args, train, processor, data_args, args.device)
    if model_args.lora:
        model = with_lora(model)

    augmentation = dict(AUGMENTATION[data_args.augmentation])
    mixing = {name: augmentation.pop(name) for name in ("mixup", "cutmix") if name in augmentation}
    columns: dict[str, Any] = {
        "image_column_name": data_args.image_column_name,
        "label_column_name": data_args.label_column_name,
    }
    if data_args.streaming:
        columns["on_error"] = data_args.on_error
    augment, plain = (
        Relabelled(BatchTransform(transform, **columns), order)
        for transform in (TrainTransform(processor, **augmentation), EvalTransform(processor))
    )
    if data_args.streaming:
        train_rows = training_stream(train, Seeded(augment, args.seed), args.seed, data_args.shuffle_buffer)
        eval_rows = validation.map(plain, batched=True, batch_size=1, remove_columns=validation.column_names)
    else:
        train_rows, eval_rows = train.with_transform(augment), validation.with_transform(plain)
    trainer = TokenReduceTrainer(
        model,
        args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=Collator(**mixing, num_labels=model.config.num_labels) if mixing else Collator(),
        processing_class=processor,
        compute_metrics=accuracy,
        teacher_model=model_args.teacher_model,
    )
    sharded = trainer.is_fsdp_enabled
    if sharded and model_args.lora:
        raise ValueError("--lora does not run with FSDP: the adapters cannot be merged into sharded weights. Use DDP.")
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(EpochLines)
    some = validation.shuffle(seed=0) if data_args.streaming else validation.select(spread(len(validation), 256))
    sample = first_images(some, 256, data_args.image_column_name, data_args.on_error)
    pixels = torch.stack([EvalTransform(processor)(image) for image in sample])
    baseline = evaluate_dense(dense, trainer) if knows_classes else None
    begin = time.perf_counter()
    if args.num_train_epochs:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - begin
    metrics = last_metrics(trainer) or trainer.evaluate()
    if model_args.lora:
        trainer.model = trainer.model.merge_and_unload()
    if args.process_index == 0:  # if this run is killed now, nothing about an older model stays beside the new one
        for written in WRITTEN_ABOUT_IT if (Path(args.output_dir) / CONFIG).is_file() else ():
            (Path(args.output_dir) / written).unlink(missing_ok=True)
    if model_args.lora and args.should_save:  # Trainer would ask DeepSpeed, which still holds the adapters
        trainer._save(args.output_dir)
    elif not model_args.lora:
        trainer.save_model()
    if args.process_index == 0:
        if not args.disable_tqdm:
            print(f"Saved to {args.output_dir}. Now its time beside the dense model is measured.", file=sys.stderr)
        # Not the model of the trainer: FSDP leaves a part of each weight in each process, and bf16 leaves autocast
        # around the model, but not around the dense model beside it.
        whole = AutoModelForImageClassification.from_pretrained(args.output_dir)
        record = describe(whole, pixels, args.device) | {
            **came_from,
            "dataset": name_of(data_args.dataset_name, data_args.train_dir),
            "eval_dataset": name_of_validation(data_args, validation.split, model_args.model_name_or_path),
            "eval_images": metrics["eval_images"],
            "seed": args.seed,
            "command": shown(command),
            **how_long(trainer, data_args.streaming),
            # A resumed run does not know how long the interrupted run took.
            "seconds": None if args.resume_from_checkpoint else round(seconds, 1),
            "top1": 100 * metrics["eval_accuracy"],
            "baseline_top1": baseline,
        }
        write_whole(Path(args.output_dir) / "record.json", json.dumps(record, indent=1))
        return record, args.output_dir
    return None


def name_of_validation(data_args: DataArguments, split: Any = None, model: str = "") -> str:
    """Return the name of the validation images.

    Args:
        data_args: Names of the data.
        split: The split of the data set that they are from.
        model: Folder of the model that is trained. The filter of DL-ViT was fitted on labels of images.
    """
    if data_args.validation_dir is not None:
        return name_of(None, data_args.validation_dir)
    name = name_of(data_args.dataset_name, data_args.train_dir)
    if data_args.dataset_name and str(split) != "train":
        return name
    if fitted_on(model) != name:
        return f"{name} (a part held out)"
    logger.warning(
        f"The filter of {model} was fitted on labelled images of {name}, so the images that are held out of them are "
        "not new to it, and the accuracy may be too high. Give other images with --validation_dir."
    )
    return f"{name} (a part held out of the training, but not of the labels of the filter)"


def method_in(name: str, revision: str) -> str | None:
    """Return the name of the method that reduces the model in a folder or on the Hub. None: it is not reduced, or
    cannot be read, which is told when it is loaded."""
    try:
        setting = PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("reduction")
    except (OSError, ValueError):
        return None
    method = setting.get("method") if isinstance(setting, dict) else None
    return method if method in METHODS else None


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TokenReduceTrainingArguments]:
    """Parse the arguments. The method's recipe gives the defaults of the training arguments."""
    description = "Fine-tune an image classifier with any token reduction method, by the method's recipe."
    # Without abbreviations: in the record, a shortened --hub_token could not be told from other options.
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TokenReduceTrainingArguments), description=description, allow_abbrev=False
    )
    parser.set_defaults(report_to="none", eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    known, _ = parser.parse_known_args(arguments)
    if known.trust_remote_code:
        register_from_folder(known.model_name_or_path, known.model_revision)
    if known.augmentation not in AUGMENTATION:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATION)}, got {known.augmentation!r}.")
    if known.on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be stop or skip, got {known.on_error!r}.")
    method = known.reduction or method_in(known.model_name_or_path, known.model_revision)
    defaults = recipe(method or next(iter(METHODS)), known.recipe)
    if known.recipe == "paper":  # its batch is that of all devices together
        devices = int(os.environ.get("WORLD_SIZE", 1))
        defaults["per_device_train_batch_size"] = max(1, defaults["per_device_train_batch_size"] // devices)
        parser.set_defaults(augmentation="strong")
    # Trainer would hide its progress bar when messages are hidden, and warn of pinned memory without a device.
    parser.set_defaults(**defaults, remove_unused_columns=False, disable_tqdm=False, logging_strategy="epoch")
    parser.set_defaults(dataloader_pin_memory=torch.accelerator.is_available())
    written = {word.split("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
    for name in ("eval", "save", "logging"):
        if known.streaming or f"{name}_steps" in written:  # a stream has no epochs
            parser.set_defaults(**{f"{name}_strategy": "steps"})
    if known.lora:
        parser.set_defaults(freeze_backbone=False)
    model_args, data_args, args = parser.parse_args_into_dataclasses(arguments)
    for option in ("share", "reduction_args"):
        if known.reduction is None and getattr(known, option) != parser.get_default(option):
            raise ValueError(
                f"--{option} is a setting of a method, but there is none. Give one, such as --reduction tome."
            )
    for option in ("max_train_samples", "max_eval_samples"):
        if getattr(known, option) is not None and getattr(known, option) < 1:
            raise ValueError(
                f"--{option} must be at least 1, got {getattr(known, option)}. Leave it out to use all images."
            )
    if data_args.streaming and args.max_steps < 1:
        raise ValueError(
            "A stream has no length, so the number of epochs does not say when training ends. Give --max_steps: "
            "images x epochs / images per step."
        )
    if Path(args.output_dir).is_dir() and not os.access(args.output_dir, os.W_OK):
        raise ValueError(f"{args.output_dir} may not be written into. Name another folder.")
    left = last_checkpoint(args.output_dir)
    if left and args.num_train_epochs and args.resume_from_checkpoint is None:  # the first save would delete it
        raise ValueError(
            f"{args.output_dir} holds {Path(left).name} of a training. To go on, pass --resume_from_checkpoint {left} "
            f"(tokenreduce train: --resume {left}). To start again, delete it, or name another folder."
        )
    if (Path(args.output_dir) / CONFIG).is_file() and not (model_args.overwrite or args.resume_from_checkpoint):
        raise ValueError(
            f"{args.output_dir} holds a model. Name another folder, or pass --overwrite to replace that model at the "
            "end of the training."
        )
    if args.push_to_hub:
        raise ValueError(
            "--push_to_hub would upload a folder before it is whole. Train without it. Then tokenreduce publish "
            f"{args.output_dir} NAMESPACE/NAME checks the folder and uploads it."
        )
    if model_args.lora and args.freeze_backbone:
        raise ValueError("--lora trains the backbone and --freeze_backbone does not. Leave one of them out.")
    return model_args, data_args, args


def load_model(model_args: ModelArguments, names: list[str] | None) -> tuple[Any, list[int], bool]:
    """Return the model, its index for each class of the data, and whether it knew these classes before.

    Without names, the labels of the data are the indices of the model's classes.
    """
    where: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
        "dtype": torch.float32,  # small steps would be rounded away from weights in a half type
    }
    model = AutoModelForImageClassification.from_pretrained(model_args.model_name_or_path, **where)
    if not hasattr(model, "classifier"):
        raise ValueError(
            f"{model_args.model_name_or_path} is a {type(model).__name__}, which has two heads and no loss. Save it "
            "with one head by DeiTForImageClassification.from_pretrained(...).save_pretrained(FOLDER), and train that."
        )
    label2id = model.config.label2id
    if names is None:
        return model, list(range(model.config.num_labels)), True
    if set(label2id) == set(names):
        return model, [int(label2id[name]) for name in names], True
    if not model_args.ignore_mismatched_sizes:
        raise ValueError(
            f"The data has {len(names)} classes, {names[:8]}, the model {model.config.num_labels}, "
            f"{list(label2id)[:8]}. Rename the class folders, or pass --ignore_mismatched_sizes to make a new head."
        )
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "problem_type": "single_label_classification"}
    labels["label2id"] = {name: index for index, name in enumerate(names)}
    path = model_args.model_name_or_path
    model = AutoModelForImageClassification.from_pretrained(
        path, num_labels=len(names), ignore_mismatched_sizes=True, **labels, **where
    )
    model.classifier.reset_parameters()  # also when the old head has as many classes, but others
    return model, list(range(len(names))), False


def reduce(
    dense: Any,
    model_args: ModelArguments,
    train: Dataset,
    processor: Any,
    data_args: DataArguments,
    device: torch.device,
) -> Any:
    if model_args.reduction is None:
        return dense if hasattr(dense.config, "reduction") else reduce_tokens(dense, None)
    settings = parse_settings(model_args.reduction_args)
    method = METHODS.get(model_args.reduction)
    if method is not None and method.needs == "labels":
        raise ValueError(
            f"{method.title}'s filter has to be fitted first, or it keeps every token. Run examples/run_delta_loss.py "
            "with these settings. Then train the model that it writes, without --reduction."
        )
    pixels = None
    if method is not None and (method.prepare is not None or (model_args.share and method.at_share is None)):
        photos = first_images(train.shuffle(seed=0), 100, data_args.image_column_name, data_args.on_error)
        pixels = torch.stack([EvalTransform(processor)(photo) for photo in photos])
    if pixels is None:
        return reduce_to_share(dense, model_args.reduction, model_args.share, None, processor, settings)
    # A fit runs the model many times. The trainer then takes the model from the CPU to where it belongs.
    return reduce_to_share(dense.to(device), model_args.reduction, model_args.share, pixels, None, settings).cpu()


def with_lora(model: Any) -> Any:
    """Add LoRA to the backbone. The head and the learned parts of the method are trained in full."""
    whole = ["classifier"]
    if any(p.requires_grad for reducer in encoder_of(model).reducers for p in reducer.parameters()):
        whole.append("reducer")
    return get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], modules_to_save=whole))


def accuracy(given: EvalPrediction) -> dict[str, float]:
    return {
        "accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean()),
        "images": len(given.label_ids),
    }
