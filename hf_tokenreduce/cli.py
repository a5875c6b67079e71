"""`tokenreduce`: the package from a terminal. Each command is a few lines over functions that Python code calls."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Token reduction for the vision transformers of Hugging Face: half the cost, most of the accuracy.",
    epilog="Start with: [bold]tokenreduce demo[/bold]. Of a command: [bold]tokenreduce reduce --help[/bold].",
)
out = Console()

Model = Annotated[str, typer.Argument(help="A folder or a Hub id.", metavar="MODEL")]
Data = Annotated[str, typer.Argument(help="An image folder, one folder per class, or a Hub data set.", metavar="DATA")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]
Split = Annotated[str | None, typer.Option(help="Of the data. Default: validation, test or train.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use this many images, evenly spread.")]
Batch = Annotated[int, typer.Option(min=1, help="Images at once.")]
Method = Annotated[str, typer.Option("--reduction", "-r", help="tome, evit, topk, bat, ats, ltmp, sit or dlvit.")]
Share = Annotated[float | None, typer.Option(help="Of the multiply-adds to keep, such as 0.65.")]
Settings = Annotated[str, typer.Option("--reduction-args", help="Further settings of the method, JSON.")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Options of all commands; `--debug` is taken out of the arguments by `main`, wherever it stands."""


@app.command(epilog="tokenreduce reduce google/vit-base-patch16-224 -r tome --share 0.65 -o vit-tome")
def reduce(
    model: Model,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The new folder.")],
    reduction: Method = "tome",
    share: Share = None,
    reduction_args: Settings = "{}",
    images: Annotated[str | None, typer.Option(help="Unlabelled images that LTMP and SiT are calibrated on.")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Reduce a checkpoint and save it, weights and code: a folder that loads anywhere."""
    from .calibration import calibrate
    from .convert import reduce_tokens
    from .loading import load_model, method_setting

    dense, processor = load_model(model, revision, trust_remote_code)
    setting = method_setting(dense.config, reduction, share, _settings(reduction_args))
    reduced = reduce_tokens(dense, setting)
    if reduction in ("ltmp", "sit"):
        if images is None:
            raise ValueError(f"{reduction} starts from images, without labels: pass --images FOLDER, or train it.")
        calibrate(reduced, images, getattr(setting, "target", None), image_processor=processor)
    elif images is not None:
        raise ValueError(f"--images is for ltmp and sit; {reduction} needs none. Leave it out.")
    reduced.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    _print(_described(reduced, str(output_dir)), as_json, f"Saved to {output_dir}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="tokenreduce train google/vit-base-patch16-224 --train-dir data/train --validation-dir data/val "
    "-r bat --share 0.65 -o out --ignore_mismatched_sizes --learning_rate 1e-4",
)
def train(
    context: typer.Context,
    model: Model,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The trained model, its checkpoints.")],
    train_dir: Annotated[Path | None, typer.Option(help="Class folders. Or: --dataset_name ID.")] = None,
    validation_dir: Annotated[Path | None, typer.Option(help="Class folders; else a part of training.")] = None,
    reduction: Annotated[str | None, typer.Option("--reduction", "-r", help="Default: the model as it is.")] = None,
    share: Share = None,
    reduction_args: Settings = "{}",
    recipe: Annotated[str, typer.Option(help="quick or paper: what is not given here.")] = "quick",
    epochs: Annotated[float | None, typer.Option(help="Instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per device and step.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A checkpoint to go on from.")] = None,
) -> None:
    """Fine-tune by the method's recipe. Any argument of transformers' TrainingArguments may follow."""
    from .training.run import main as run

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
    if reduction_args != "{}":
        arguments += ["--reduction_args", reduction_args]
    run([*arguments, *context.args], command=("tokenreduce", *context.obj))


@app.command(epilog="tokenreduce inspect vit-tome")
def inspect(model: Model, revision: Revision = None, trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Say what a folder or Hub id is: backbone, method, settings, tokens per layer, multiply-adds, size."""
    from .loading import load_model

    _print(_described(load_model(model, revision, trust_remote_code)[0], model), as_json, model)


def _described(model: Any, name: str) -> dict[str, Any]:
    from .evaluation import dense_multiply_adds, total_multiply_adds
    from .modeling.multiply_adds import even_counts, num_patches, num_prefix_tokens

    config = model.config
    reduction = getattr(config, "reduction", None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = num_patches(config) + num_prefix_tokens(config)
    described: dict[str, Any] = {
        "name": name,
        "class": type(model).__name__,
        "backbone": f"{config.num_hidden_layers} layers of width {config.hidden_size}, {tokens} tokens",
        "image_size": config.image_size,
        "labels": config.num_labels,
        "parameters": parameters,
        "megabytes": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6, 1),
        "method": None if reduction is None else reduction.method,
        "settings": None if reduction is None else reduction.to_dict(),
        "dense_multiply_adds": round(dense_multiply_adds(model)),
        "multiply_adds": None,
        "tokens_per_layer": None,
    }
    try:
        described["tokens_per_layer"] = (
            [tokens] * config.num_hidden_layers if reduction is None else even_counts(reduction, config)
        )
    except ValueError:  # adaptive: both depend on the image
        return described
    described["multiply_adds"] = round(total_multiply_adds(model).item())
    described["share"] = round(described["multiply_adds"] / described["dense_multiply_adds"], 4)
    return described


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--reduction-args is not JSON ({error}). Write it as '{{\"keep_rate\": 0.5}}'.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"--reduction-args must be a JSON object, got {text!r}. Write it as '{{\"keep_rate\": 0.5}}'."
        )
    return settings


def _print(answer: dict[str, Any], as_json: bool, title: str) -> None:
    """One answer: as JSON, or as a table of its entries."""
    if as_json:
        print(json.dumps(answer, indent=1, default=str))
        return
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in answer.items():
        if value is None:
            value = "depends on the image" if key in ("multiply_adds", "tokens_per_layer") else "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{name}={entry}" for name, entry in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 100_000:
            value = f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"
        table.add_row(key.replace("_", " "), escape(str(value)))
    out.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Errors that a user can mend are one line and exit code 2; `--debug` anywhere shows the whole of them."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    else:
        from datasets import disable_progress_bars
        from transformers.utils import logging

        logging.set_verbosity_error()
        disable_progress_bars()
    try:
        app(args=arguments, prog_name="tokenreduce", obj=arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if debug:
            raise
        print("tokenreduce: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("tokenreduce: stopped", file=sys.stderr)
        raise SystemExit(130) from None
