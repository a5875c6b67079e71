"""`tokenreduce`: the package from a terminal. Each command is a few lines over functions that Python code calls."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState
from rich.markup import escape
from rich.table import Table

from .answers import out, print_answer


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Token reduction for the vision transformers of Hugging Face.",
    epilog="Start with: [bold]tokenreduce demo[/bold]. Of a command: [bold]tokenreduce reduce --help[/bold].",
)

Model = Annotated[str, typer.Argument(help="A folder or a Hub id.", metavar="MODEL")]
Data = Annotated[str, typer.Argument(help="An image folder, one folder per class, or a Hub data set.", metavar="DATA")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]
Split = Annotated[str | None, typer.Option(help="Of the data. Default: validation, test or train.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use this many images, evenly spread.")]
Batch = Annotated[int, typer.Option(min=1, help="Images at once.")]
Method = Annotated[str, typer.Option("--reduction", "-r", help="The method: tokenreduce methods lists them.")]
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
    images: Annotated[str | None, typer.Option(help="Unlabelled images, for methods that are fitted on them.")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Reduce a checkpoint and save it, weights and code: a folder that loads anywhere."""
    from .budget import reduce_to_share
    from .evaluation.compute import describe_model
    from .loading import load_model, load_processor, parse_settings
    from .methods import find_method

    method, settings = find_method(reduction), parse_settings(reduction_args)
    if method.prepare is not None and images is None:
        raise ValueError(f"{method.title} starts from images, without labels: pass --images FOLDER, or train it.")
    if output_dir.is_file():
        raise ValueError(f"--output-dir {output_dir} is a file. Name a folder.")
    dense, image_processor = load_model(model, revision, trust_remote_code, any_task=True)
    processor = load_processor(model, revision, trust_remote_code)
    reduced = reduce_to_share(dense, reduction, share, images, image_processor, settings)
    reason = method.why_not(reduced.config.reduction)
    if reason is not None:
        raise ValueError(f"{method.title} cannot reduce this checkpoint yet: {reason}.")
    reduced.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    print_answer(describe_model(reduced, str(output_dir)), as_json, f"Saved to {output_dir}")


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


@app.command(epilog="tokenreduce methods")
def methods(as_json: Json = False) -> None:
    """List the methods: what they are called, what they do with tokens, and what they need first."""
    from .methods.table import methods_rows

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
    """Say what a folder or Hub id is: backbone, method, settings, tokens per layer, multiply-adds, size."""
    from .evaluation.compute import describe_model
    from .loading import load_model

    print_answer(
        describe_model(load_model(model, revision, trust_remote_code, any_task=True)[0], model), as_json, model
    )


@app.command(epilog="tokenreduce evaluate vit-tome data/val --dense google/vit-base-patch16-224")
def evaluate(
    model: Model,
    data: Data,
    dense: Annotated[str | None, typer.Option(help="To compare with. Default: the model without reduction.")] = None,
    class_names: Annotated[str | None, typer.Option(help="Zero-shot: a,b,c or a file. Default: DATA's.")] = None,
    prompt: Annotated[list[str], typer.Option(help="Zero-shot: 'a photo of a {}'; again.")] = [],  # noqa: B006
    split: Split = None,
    limit: Limit = None,
    batch_size: Batch = 32,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Keeps results; an interrupted run goes on.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Accuracy on labelled images beside the dense model's, with intervals; what flipped; multiply-adds.

    Models that compare images with texts (CLIP, SigLIP) classify by the names of the classes."""
    from .evaluation import evaluate_model
    from .evaluation.zero_shot import as_classifier
    from .loading import load_images, load_model, load_processor

    reduced, processor = load_model(model, revision, trust_remote_code, any_task=True)
    images = load_images(data, split, limit)

    def classifier(loaded: Any, name: str, revision: str | None) -> Any:
        return as_classifier(
            loaded, lambda: load_processor(name, revision, trust_remote_code), images, class_names, prompt
        )

    other = None
    if dense is not None:
        other, others = load_model(dense, trust_remote_code=trust_remote_code, any_task=True)
        if others.to_dict() != processor.to_dict():
            raise ValueError(f"{dense} takes images that are prepared otherwise than those of {model}.")
        other = classifier(other, dense, None)
    reduced = classifier(reduced, model, revision)
    report = evaluate_model(reduced, images, processor, dense=other, batch_size=batch_size, output_dir=output_dir)
    if PartialState().is_main_process:
        print_answer(report.to_dict(), as_json, f"{model} on {data}")


@app.command(epilog="tokenreduce benchmark vit-tome vit-bat --images data/val --batch-size 1 --batch-size 32")
def benchmark(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids, of one size.", metavar="MODELS...")],
    images: Annotated[str, typer.Option(help="A folder of images.")],
    batch_size: Annotated[list[int], typer.Option(help="May be given again.")] = [1, 32],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="May be given again.")] = ["float32"],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Of every model in turn.")] = 15,
    threads: Annotated[int | None, typer.Option(help="Of the processor.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    compile_models: Annotated[bool, typer.Option("--compile", help="torch.compile what can be.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the report here, JSON.")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time and memory beside the dense model and the ideal, in one run, and where the time goes."""
    import torch

    from .evaluation import benchmark as measure
    from .loading import load_model, load_pictures

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here.")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    last = [name.rstrip("/").split("/")[-1] for name in models]
    named = last if len(set(last)) == len(last) else models
    loaded = {
        name: load_model(model, revision, trust_remote_code, any_task=True)
        for name, model in zip(named, models, strict=True)
    }
    processor = next(iter(loaded.values()))[1]
    pixels = processor(load_pictures([images], 2 * max(batch_size))[0], return_tensors="pt")["pixel_values"]
    report = measure(
        {name: model for name, (model, _) in loaded.items()},
        pixels,
        batch_sizes=batch_size,
        dtypes=dtype,
        repeats=repeats,
        threads=threads,
        device=device,
        compile=compile_models,
    )
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.to_markdown())
    if output is not None:
        report.save(output)


@app.command(epilog="tokenreduce compare facebook/deit-tiny-patch16-224 data/val --share 0.65 -o comparison")
def compare(
    model: Model,
    data: Annotated[str, typer.Argument(help="Class folders, a Hub data set, or any images.", metavar="DATA")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Table, picture; resumes there.")],
    share: Annotated[list[float], typer.Option(help="Multiply-adds to keep; again.")] = [0.8, 0.65, 0.5],  # noqa: B006
    reduction: Annotated[list[str], typer.Option("--reduction", "-r", help="Only this name or JSON; again.")] = [],  # noqa: B006
    class_names: Annotated[str | None, typer.Option(help="Zero-shot: a,b,c or a file. Default: DATA's.")] = None,
    prompt: Annotated[list[str], typer.Option(help="Zero-shot: 'photo of a {}'; again.")] = [],  # noqa: B006
    calibration_images: Annotated[int, typer.Option(min=1, help="LTMP and SiT start from them.")] = 100,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also measure throughput.")] = True,
    split: Split = None,
    limit: Limit = None,
    batch_size: Batch = 32,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Try every untrained method at some budgets: a table, and a picture of quality against cost.

    Quality is accuracy; without a classifier, cosines to the dense model's features and the accuracy of nearest
    neighbours. CLIP and SigLIP classify if --prompt or --class-names is given."""
    from .evaluation import compare as measure
    from .evaluation.features import TASKS as FEATURE_TASKS
    from .evaluation.zero_shot import as_classifier, check_typed
    from .loading import load_bank, load_images, load_model, load_processor, parse_settings
    from .tasks import task_of_model

    dense, processor = load_model(model, revision, trust_remote_code, any_task=True)
    check_typed(dense, class_names, prompt)
    of_features = task_of_model(dense).name in FEATURE_TASKS and class_names is None and not prompt
    images = load_images(data, split, limit, labelled=not of_features)
    bank = load_bank(data, images, limit) if of_features else None
    if not of_features:
        dense = as_classifier(
            dense, lambda: load_processor(model, revision, trust_remote_code), images, class_names, prompt
        )
    found = measure(
        dense,
        images,
        processor,
        [parse_settings(text) if text.lstrip().startswith("{") else text for text in reduction] or None,
        shares=share,
        output_dir=output_dir,
        bank=bank,
        batch_size=batch_size,
        calibration_images=calibration_images,
        speed=speed,
    )
    print(json.dumps(found.rows, indent=1) if as_json else found.to_markdown())
    if not as_json:
        out.print(f"The same, and pareto.png, are in {output_dir}.")


@app.command(epilog="tokenreduce show vit-tome photos -o tokens.html")
def show(
    model: Model,
    images: Annotated[list[str], typer.Argument(help="Images, or folders of them.", metavar="IMAGES...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A page (.html) or a picture (.png).")],
    layer: Annotated[list[int] | None, typer.Option(help="From 0; may be given again.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Of the images, evenly spread.")] = 16,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """What the method did to images: kept, merged, dropped, layer by layer, and how many tokens each image took."""
    from .convert import restore
    from .loading import load_model, load_pictures
    from .visualization import token_map_grid, write_page

    if output.suffix not in (".html", ".png"):
        raise ValueError(f"--output must end in .html or .png, got {output}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    reduced, processor = load_model(model, revision, trust_remote_code, any_task=True)
    if getattr(reduced.config, "reduction", None) is None:
        raise ValueError(f"{model} is not reduced, so there is nothing to show. Reduce it: tokenreduce reduce --help.")
    pictures, names = load_pictures(images, limit)
    if output.suffix == ".png":
        token_map_grid(reduced, pictures, processor, layer, names=names).save(output)
    else:
        write_page(
            reduced, pictures, processor, output, dense=restore(reduced), names=names, layers=layer, title=title
        )
    out.print(f"Written to {output}.")


@app.command(epilog="tokenreduce card vit-tome --base-model google/vit-base-patch16-224 --base-license apache-2.0")
def card(
    folder: Annotated[Path, typer.Argument(help="A saved model, or records with --records.")],
    base_model: Annotated[str | None, typer.Option(help="Hub id of what it was made of.")] = None,
    base_license: Annotated[str | None, typer.Option(help="Of those weights, such as apache-2.0.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data it was trained on.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where it will be published: namespace/name.")] = None,
    records: Annotated[Path | None, typer.Option(help="Instead: a card for every record here, into FOLDER.")] = None,
) -> None:
    """Write the model card, README.md, from the folder's settings and record. What its owner wrote stays."""
    from .hub import write_card, write_cards

    names = {"base_model": base_model, "base_license": base_license, "dataset": dataset, "repo_id": repo_id}
    written = [write_card(folder, **names)] if records is None else write_cards(records, folder, **names)
    for path in written:
        out.print(f"Written: {path}")


@app.command(epilog="tokenreduce publish vit-tome your-name/vit-tome --dry-run upload")
def publish(
    folder: Annotated[Path, typer.Argument(help="A saved model with its processor.")],
    repo_id: Annotated[str, typer.Argument(help="namespace/name on the Hub.", metavar="REPO_ID")],
    dry_run: Annotated[Path | None, typer.Option(help="Send nothing; put what would be sent here.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made now.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of writing.")] = False,
    skip_others: Annotated[bool, typer.Option("--skip-others", help="Leave out files that do not belong.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check a folder in a fresh process without this package, list what goes up, and upload it."""
    from .hub import check_folder
    from .hub import publish as upload

    report = check_folder(folder, skip_others=skip_others, trust_remote_code=trust_remote_code)
    report.raise_for_errors()
    if not as_json:
        table = Table("file", "size", title=f"To {repo_id}", title_justify="left")
        for name, size in report.files.items():
            table.add_row(escape(name), f"{size / 1000:.1f} kB")
        out.print(table)
        for warning in report.warnings:
            out.print(f"[yellow]{escape(warning)}[/yellow]")
    found = upload(folder, repo_id, private=private, create_pr=create_pr, dry_run=dry_run, report=report)
    if as_json:
        answer = {
            "files": found.files,
            "url": found.url,
            "revision": found.revision,
            "pull_request": found.pull_request,
        }
        print(json.dumps(answer, indent=1))
        return
    out.print(f"{'Written to' if dry_run else 'Uploaded:'} {found.pull_request or found.url}")
    print(found.snippet)


@app.command(epilog="tokenreduce serve vit-tome")
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="127.0.0.1: this computer alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The page listens there.")] = 7860,
    max_upload_mb: Annotated[float, typer.Option(help="Of one image.")] = 10,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """A page to try a checkpoint: drop an image, pick a method and a budget, see it beside the dense model."""
    from .serve import serve as run

    run(
        model,
        host=host,
        port=port,
        max_upload_mb=max_upload_mb,
        open_browser=open_browser,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


@app.command(epilog="tokenreduce demo --output-dir demo")
def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Output; resumes there.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of images and training.")] = 0,
) -> None:
    """Draw images, train a small ViT, reduce it by every method: table, pictures, pages, folders. No downloads."""
    from .demo.run import run_demo

    run_demo(output_dir, seed=seed)


def main(arguments: list[str] | None = None) -> None:
    """Errors that a user can mend are one line and exit code 2; `--debug` anywhere shows the whole of them. Other
    errors, such as a full memory or a fault of ours, keep their traceback."""
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
    except Exception as error:
        if debug or not _is_for_the_user(error):
            raise
        print("tokenreduce: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def _is_for_the_user(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        from .hub.publish import PublishError

        return isinstance(error, PublishError)
    return isinstance(error, (ValueError, OSError, ImportError))
