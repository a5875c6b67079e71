"""Commands that make models (reduce, calibrate, train) or describe them (methods, inspect)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .options import (
    Json,
    Method,
    Model,
    Overwrite,
    Revision,
    Settings,
    Share,
    Trust,
    app,
    out,
    print_answer,
)


@app.command(epilog="tokenreduce reduce google/vit-base-patch16-224 -r tome --share 0.65 -o vit-tome")
def reduce(
    model: Model,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Folder for the reduced model.", metavar="FOLDER")
    ],
    reduction: Method = "tome",
    share: Share = None,
    reduction_args: Settings = "{}",
    overwrite: Overwrite = False,
    images: Annotated[
        str | None,
        typer.Option(help="Folder of images without labels, for methods that learn from them.", metavar="FOLDER"),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Reduce a model and save it with its code, so that it loads anywhere."""
    from hf_tokenreduce.budget import reduce_to_share
    from hf_tokenreduce.evaluation.compute import describe_model
    from hf_tokenreduce.files import check_new_folder, model_folder
    from hf_tokenreduce.loading import load_model, parse_settings, processor_of_inputs
    from hf_tokenreduce.methods import find_method

    check_new_folder(output_dir, overwrite)
    method, settings = find_method(reduction), parse_settings(reduction_args)
    if method.prepare is not None and images is None:
        raise ValueError(f"{method.title} learns from images without labels: pass --images FOLDER, or train it.")
    dense, image_processor = load_model(model, revision, trust_remote_code, any_task=True)
    processor = processor_of_inputs(dense, image_processor, model, revision, trust_remote_code)
    reduced = reduce_to_share(dense, reduction, share, images, image_processor, settings)
    reason = method.why_not(reduced.config.reduction)
    if reason is not None:
        raise ValueError(f"{method.title} cannot reduce this model yet: {reason}.")
    with model_folder(output_dir, with_card=True) as place:
        reduced.save_pretrained(place)
        processor.save_pretrained(place)
    print_answer(describe_model(reduced, str(output_dir), image_processor), as_json, f"Saved to {output_dir}")


@app.command(epilog="tokenreduce calibrate vit-ltmp photos --target 0.65 -o vit-ltmp-65")
def calibrate(
    model: Model,
    images: Annotated[str, typer.Argument(help="Folder of images. They need no labels.", metavar="IMAGES")],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Folder for the calibrated model.", metavar="FOLDER")
    ],
    target: Annotated[
        float | None,
        typer.Option(help="Share of the multiply-adds to keep, for methods such as LTMP.", metavar="N"),
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Use at most this many images.", metavar="N")] = 128,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Fit LTMP's thresholds or SiT's networks to images without labels."""
    from hf_tokenreduce.calibration import calibrate as fit
    from hf_tokenreduce.convert import reduce_tokens, with_reduction
    from hf_tokenreduce.evaluation.compute import describe_model
    from hf_tokenreduce.files import check_new_folder, model_folder
    from hf_tokenreduce.loading import load_model, processor_of_inputs

    check_new_folder(output_dir, overwrite)
    reduced, image_processor = load_model(model, revision, trust_remote_code, any_task=True)
    processor = processor_of_inputs(reduced, image_processor, model, revision, trust_remote_code)
    setting = reduced.config.reduction if hasattr(reduced.config, "reduction") else None
    if setting is not None and hasattr(setting, "target"):
        setting = setting if target is None else replace(setting, target=target)
        reduced, target = with_reduction(reduce_tokens(reduced, None), setting), setting.target
    fit(reduced, images, target, image_processor=image_processor, max_images=max_images)
    with model_folder(output_dir, with_card=True) as place:
        reduced.save_pretrained(place)
        processor.save_pretrained(place)
    print_answer(describe_model(reduced, str(output_dir), image_processor), as_json, f"Saved to {output_dir}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="tokenreduce train google/vit-base-patch16-224 --train-dir data/train --validation-dir data/val "
    "-r bat --share 0.65 -o out --ignore_mismatched_sizes --learning_rate 1e-4",
)
def train(
    context: typer.Context,
    model: Model,
    output_dir: Annotated[
        Path,
        typer.Option("--output-dir", "-o", help="Folder for the trained model and checkpoints.", metavar="FOLDER"),
    ],
    train_dir: Annotated[
        Path | None,
        typer.Option(help="Training images, in one folder per class. Or: --dataset_name ID.", metavar="FOLDER"),
    ] = None,
    validation_dir: Annotated[
        Path | None,
        typer.Option(help="Validation images. Default: a part of the training images.", metavar="FOLDER"),
    ] = None,
    reduction: Annotated[
        str | None,
        typer.Option(
            "--reduction", "-r", help="Name of the method. Default: train the model as it is.", metavar="NAME"
        ),
    ] = None,
    share: Share = None,
    reduction_args: Settings = "{}",
    recipe: Annotated[
        str, typer.Option(help="Recipe for arguments that are not given: quick or paper.", metavar="NAME")
    ] = "quick",
    epochs: Annotated[
        float | None, typer.Option(help="Number of epochs. Default: that of the recipe.", metavar="N")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Number of images per device and step.", metavar="N")] = None,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to continue from.", metavar="FOLDER")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model by the recipe of its method.

    You can add any argument of transformers' TrainingArguments, such as --learning_rate 1e-4."""
    from hf_tokenreduce.training.run import main as run

    arguments = ["--model_name_or_path", model, "--output_dir", str(output_dir), "--recipe", recipe]
    for name, value in (
        ("train_dir", train_dir),
        ("validation_dir", validation_dir),
        ("reduction", reduction),
        ("share", share),
        ("num_train_epochs", epochs),
        ("per_device_train_batch_size", batch_size),
        ("resume_from_checkpoint", resume),
    ):
        if value is not None:
            arguments += [f"--{name}", str(value)]
    if overwrite:
        arguments.append("--overwrite")
    if reduction_args != "{}":
        arguments += ["--reduction_args", reduction_args]
    found = run([*arguments, *context.args], command=("tokenreduce", *context.obj))
    if found is not None:
        record, folder = found
        print_answer(record, as_json, f"Saved to {folder}")


@app.command(epilog="tokenreduce methods")
def methods(as_json: Json = False) -> None:
    """List the methods, what they do with tokens, and what they need first."""
    from hf_tokenreduce.methods.table import methods_rows

    found = methods_rows()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(*found[0])
    for row in found:
        table.add_row(*map(escape, row.values()))
    out.print(table)


@app.command(epilog="tokenreduce inspect vit-tome")
def inspect(model: Model, revision: Revision = None, trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Describe a model: its method, settings, tokens per layer and size."""
    from hf_tokenreduce.evaluation.compute import describe_model
    from hf_tokenreduce.loading import load_model

    loaded, image_processor = load_model(model, revision, trust_remote_code, any_task=True)
    print_answer(describe_model(loaded, model, image_processor), as_json, model)
