"""Commands that measure models and show what they do: evaluate, benchmark, compare, tune, show."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .options import (
    Batch,
    ClassNames,
    Data,
    Images,
    Json,
    Limit,
    Model,
    Pictures,
    Prompt,
    Revision,
    Runtime,
    Split,
    Trust,
    app,
    out,
    print_answer,
)


ROWS = ("became_right", "became_wrong")
BatchSizes = Annotated[list[int], typer.Option(min=1, help="Number of images per batch. Repeatable.", metavar="N")]
Shares = Annotated[list[float], typer.Option(help="Share of multiply-adds to keep. Repeatable.", metavar="N")]


@app.command(epilog="tokenreduce evaluate vit-tome data/val --dense google/vit-base-patch16-224")
def evaluate(
    model: Model,
    data: Data,
    dense: Annotated[
        str | None,
        typer.Option(help="Model to compare with. Default: MODEL without its reduction.", metavar="MODEL"),
    ] = None,
    class_names: ClassNames = None,
    prompt: Prompt = [],  # noqa: B006
    split: Split = None,
    limit: Limit = None,
    batch_size: Batch = 32,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", "-o", help="Folder for results. A stopped run continues there.", metavar="FOLDER"
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure the accuracy on labelled images, and which predictions changed.

    The accuracy is compared with that of the dense model.
    Models that compare images with texts (CLIP, SigLIP) classify by the names of the classes."""
    from hf_tokenreduce.evaluation import evaluate_model
    from hf_tokenreduce.evaluation.zero_shot import as_classifier
    from hf_tokenreduce.loading import check_takes_images, image_names, load_images, load_model, load_processor

    reduced, processor = load_model(model, revision, trust_remote_code, any_task=True)
    check_takes_images(model, reduced)
    images = load_images(data, split, limit)

    def classifier(loaded: Any, name: str, revision: str | None) -> Any:
        return as_classifier(
            loaded, lambda: load_processor(name, revision, trust_remote_code), images, class_names, prompt
        )

    other = None
    if dense is not None:
        other, others = load_model(dense, trust_remote_code=trust_remote_code, any_task=True)
        _check_same_processor(dense, others, model, processor)
        other = classifier(other, dense, None)
    reduced = classifier(reduced, model, revision)
    report = evaluate_model(reduced, images, processor, dense=other, batch_size=batch_size, output_dir=output_dir)
    from accelerate import PartialState

    if PartialState().is_main_process:
        if dense is None:
            advice = " For a fair comparison give --dense, a dense model that was trained as long."
            _warn_if_trained(model, revision, advice)
        answer = report.to_dict()
        if not as_json:  # name files instead of rows
            names = image_names(images)
            answer |= {key: [names[row] for row in answer[key] or ()] for key in ROWS if answer.get(key) is not None}
        print_answer(answer, as_json, f"{model} on {data}")


def _warn_if_trained(model: str, revision: str | None, advice: str = "") -> None:
    """Say that the dense model beside a model that was trained with its reduction is worse than it could be."""
    from hf_tokenreduce.training.origin import was_trained

    if was_trained(model, revision):
        print(
            f"{model} was trained with its reduction. It was compared with the same weights without reduction, for "
            f"which they were not trained.{advice}",
            file=sys.stderr,
        )


@app.command(epilog="tokenreduce benchmark vit-tome vit-bat --images data/val --batch-size 1 --batch-size 32")
def benchmark(
    models: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids of models with one image size.", metavar="MODELS...")
    ],
    images: Annotated[str, typer.Option(help="Folder of images.", metavar="FOLDER")],
    batch_size: BatchSizes = [1, 32],  # noqa: B006
    dtype: Annotated[
        list[str], typer.Option(help="Data type, such as float32 or bfloat16. Repeatable.", metavar="NAME")
    ] = ["float32"],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed forwards of each model.", metavar="N")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads.", metavar="N")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one, cpu for a graph.", metavar="NAME")
    ] = None,
    runtime: Annotated[
        list[str],
        typer.Option(
            help="Runtime: eager, compiled, recorded, onnx, openvino or openvino-int8. Repeatable.", metavar="NAME"
        ),
    ] = ["eager"],  # noqa: B006
    suggest: Annotated[bool, typer.Option(help="Search a faster setting for models that are not faster.")] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write the report to.", metavar="FILE")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure speed and memory, compared with the dense model and with an ideal one."""
    import torch

    from hf_tokenreduce.calibration import load_pixel_values
    from hf_tokenreduce.evaluation import benchmark as measure
    from hf_tokenreduce.evaluation.runtimes import usual_device
    from hf_tokenreduce.loading import check_takes_images, load_model
    from hf_tokenreduce.methods import method_of

    if device is None:
        device = usual_device(runtime)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"torch finds no CUDA device for --device {device}. Use --device cpu, or install a torch for CUDA."
        )
    if output is not None:
        if output.is_dir():
            raise ValueError(f"{output} is a folder. Give --output the name of a file, such as {output}/speed.json.")
        output.parent.mkdir(parents=True, exist_ok=True)
    last = [name.rstrip("/").split("/")[-1] for name in models]
    named = last if len(set(last)) == len(last) else models
    loaded = {
        name: load_model(model, revision, trust_remote_code, any_task=True)
        for name, model in zip(named, models, strict=True)
    }
    for name, (model, _) in loaded.items():
        check_takes_images(name, model)
    (first, (dense, processor)), *others = loaded.items()
    reductions = [getattr(model.config, "reduction", None) for model, _ in loaded.values()]
    adaptive = any(method_of(reduction).is_adaptive(reduction) for reduction in reductions)
    for name, (_, other) in others if adaptive else []:  # for other methods the values of pixels change no time
        _check_same_processor(first, other, name, processor)
    count = max(2 * max(batch_size), 128 if "openvino-int8" in runtime else 0)
    pixels = load_pixel_values(dense, images, processor, count).cpu()
    report = measure(
        {name: model for name, (model, _) in loaded.items()},
        pixels,
        batch_sizes=batch_size,
        dtypes=dtype,
        repeats=repeats,
        threads=threads,
        device=device,
        runtimes=runtime,
        suggest=suggest,
    )
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.to_markdown())
    if output is not None:
        report.save(output)


@app.command(epilog="tokenreduce compare facebook/deit-tiny-patch16-224 data/val --share 0.65 -o comparison")
def compare(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(help="Folder with one folder per class, or Hub id of images.", metavar="DATA"),
    ],
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "-o", help="Folder for results. A stopped run continues there.", metavar="FOLDER"
        ),
    ],
    share: Shares = [0.8, 0.65, 0.5],  # noqa: B006
    reduction: Annotated[
        list[str],
        typer.Option("--reduction", "-r", help="Only this method, name or JSON. Repeatable.", metavar="NAME"),
    ] = [],  # noqa: B006
    class_names: ClassNames = None,
    prompt: Prompt = [],  # noqa: B006
    tuned: Annotated[
        Path | None, typer.Option(help="Folder of tokenreduce tune, to compare too.", metavar="FOLDER")
    ] = None,
    calibration_images: Annotated[
        int, typer.Option(min=1, help="Number of images for ATS, LTMP and SiT to learn from.", metavar="N")
    ] = 100,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also measure the speed.")] = True,
    runtime: Runtime = "eager",
    split: Split = None,
    limit: Limit = None,
    batch_size: Batch = 32,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compare methods that need no training at some budgets: a table and a picture.

    Classifiers are compared by accuracy, other models by features and nearest neighbours.
    CLIP and SigLIP classify images if --prompt or --class-names is given."""
    from hf_tokenreduce.evaluation import compare as measure
    from hf_tokenreduce.evaluation.features import TASKS as FEATURE_TASKS
    from hf_tokenreduce.evaluation.zero_shot import as_classifier, check_typed
    from hf_tokenreduce.loading import (
        check_takes_images,
        load_bank,
        load_images,
        load_model,
        load_processor,
        parse_settings,
    )
    from hf_tokenreduce.tasks import task_of_model

    dense, processor = load_model(model, revision, trust_remote_code, any_task=True)
    check_takes_images(model, dense)
    check_typed(dense, class_names, prompt)
    of_features = task_of_model(dense).name in FEATURE_TASKS and class_names is None and not prompt
    images = load_images(data, split, limit, labelled=not of_features)
    bank = load_bank(data, images, limit) if of_features else None
    if not of_features:
        dense = as_classifier(
            dense, lambda: load_processor(model, revision, trust_remote_code), images, class_names, prompt
        )
    settings: list[Any] = []
    if tuned is not None:
        from hf_tokenreduce.tuning import bring_learned, held_out_from

        images, settings = held_out_from(tuned, images)
        bring_learned(tuned, output_dir)
    found = measure(
        dense,
        images,
        processor,
        [parse_settings(text) if text.lstrip().startswith("{") else text for text in reduction] or None,
        shares=share,
        tuned=settings,
        output_dir=output_dir,
        bank=bank,
        batch_size=batch_size,
        calibration_images=calibration_images,
        speed=speed,
        runtime=runtime,
    )
    _warn_if_trained(model, revision)
    print(json.dumps(found.rows, indent=1) if as_json else found.to_markdown())
    if not as_json:
        out.print(f"The table and pareto.png are in {escape(str(output_dir))}.")


@app.command(epilog="tokenreduce tune facebook/deit-tiny-patch16-224 photos --share 0.65 -o tuned")
def tune(
    context: typer.Context,
    model: Model,
    images: Images,
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "-o", help="Folder for results. A stopped run continues there.", metavar="FOLDER"
        ),
    ],
    share: Annotated[
        float | None, typer.Option(help="Share of multiply-adds to keep, such as 0.65.", metavar="N")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Speed-up over the dense model, such as 1.5.", metavar="N")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest drop of accuracy in points, such as 1.", metavar="N")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Longest time of the search in minutes.", metavar="N")] = None,
    reduction: Annotated[
        list[str],
        typer.Option("--reduction", "-r", help="Search only this method. Repeatable.", metavar="NAME"),
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.", metavar="N")] = 0,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Use the class folders as labels.")] = True,
    speed: Annotated[
        bool,
        typer.Option("--speed/--no-speed", help="Time it: dense if nothing is faster."),
    ] = True,
    runtime: Runtime = "eager",
    split: Split = None,
    limit: Limit = None,
    batch_size: Batch = 32,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Find the best reduction of a model for a target: --share, --speedup or --max-drop.

    The search uses one part of the images, and the report uses the others.
    Nothing is trained, and labels are not needed."""
    from hf_tokenreduce.loading import check_takes_images, load_images, load_model, processor_of_inputs
    from hf_tokenreduce.training.origin import name_of, origin, shown
    from hf_tokenreduce.tuning import tune as find

    loaded, processor = load_model(model, revision, trust_remote_code, any_task=True)
    check_takes_images(model, loaded)
    whole_processor = processor_of_inputs(loaded, processor, model, revision, trust_remote_code)
    pictures = load_images(images, split, limit, labelled=False if labels else None)
    if not labels and "label" in pictures.column_names:
        pictures = pictures.remove_columns("label")
    report = find(
        loaded,
        pictures,
        processor,
        share=share,
        speedup=speedup,
        max_drop=max_drop,
        output_dir=output_dir,
        methods=reduction or None,
        minutes=minutes,
        seed=seed,
        batch_size=batch_size,
        speed=speed,
        runtime=runtime,
        record={
            **origin(model),
            "eval_dataset": f"{name_of(None, images)}, held out from the search",
            "command": shown(["tokenreduce", *context.obj]),
        },
    )
    whole_processor.save_pretrained(output_dir / "model")
    _warn_if_trained(model, revision)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.to_markdown())
    if not as_json:
        out.print(
            f"The report, pareto.png and tuning.json are in {escape(str(output_dir))}, and the model is in its folder "
            "model."
        )


@app.command(epilog="tokenreduce show vit-tome photos -o tokens.html")
def show(
    model: Model,
    images: Pictures,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Page (.html) or picture (.png) to write.", metavar="FILE")
    ],
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Layer to show, counted from 0. Repeatable.", metavar="N"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many images, evenly spread.", metavar="N")] = 16,
    title: Annotated[str | None, typer.Option(help="Title of the page.", metavar="TEXT")] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Model to compare predictions with. Default: MODEL without its reduction, if it was not trained.",
            metavar="MODEL",
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Draw which patches of images the method kept, merged or dropped in each layer."""
    from hf_tokenreduce.convert import restore
    from hf_tokenreduce.loading import check_takes_images, load_model, load_pictures
    from hf_tokenreduce.training.origin import was_trained
    from hf_tokenreduce.visualization import token_map_grid, write_page

    if output.suffix not in (".html", ".png"):
        raise ValueError(f"--output must end in .html or .png, got {output}.")
    if output.suffix == ".png" and (dense is not None or title is not None):
        raise ValueError(f"--dense and --title are for a page, but {output} is a picture. Name a file .html.")
    output.parent.mkdir(parents=True, exist_ok=True)
    reduced, processor = load_model(model, revision, trust_remote_code, any_task=True)
    check_takes_images(model, reduced)
    if getattr(reduced.config, "reduction", None) is None:
        raise ValueError(
            f"{model} is not reduced, so there is nothing to show. Reduce it first by tokenreduce reduce."
        )
    pictures, names = load_pictures(images, limit)
    if output.suffix == ".png":
        token_map_grid(reduced, pictures, processor, layer, names=names).save(output)
    else:
        # Without its reduction a trained model was never trained.
        other = None if was_trained(model, revision) else restore(reduced)
        if dense is not None:
            other, others = load_model(dense, trust_remote_code=trust_remote_code)
            _check_same_processor(dense, others, model, processor)
        write_page(reduced, pictures, processor, output, dense=other, names=names, layers=layer, title=title)
    out.print(f"Saved to {escape(str(output))}.")


def _check_same_processor(dense: str, others: Any, model: str, processor: Any) -> None:
    if others.to_dict() != processor.to_dict():
        raise ValueError(f"The image processors of {dense} and {model} differ. Give models with the same processor.")
