"""Commands that bring models to others: card, publish, export, predict, serve, demo."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .options import (
    Batch,
    Json,
    Model,
    Overwrite,
    Revision,
    Trust,
    app,
    out,
    print_answer,
)


@app.command(epilog="tokenreduce card vit-tome --base-model google/vit-base-patch16-224 --base-license apache-2.0")
def card(
    folder: Annotated[Path, typer.Argument(help="A saved model, or records with --records.")],
    base_model: Annotated[str | None, typer.Option(help="Hub id of what it was made of.")] = None,
    base_license: Annotated[str | None, typer.Option(help="Of those weights, such as apache-2.0.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data it was trained on.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where it will be published: namespace/name.")] = None,
    records: Annotated[Path | None, typer.Option(help="Instead: a card for every record here, into FOLDER.")] = None,
) -> None:
    """Write the model card, README.md. What the folder's owner wrote stays."""
    from hf_tokenreduce.hub import write_card, write_cards

    names = {"base_model": base_model, "base_license": base_license, "dataset": dataset, "repo_id": repo_id}
    written = [write_card(folder, **names)] if records is None else write_cards(records, folder, **names)
    for path in written:
        out.print(f"Written: {path}")


@app.command(epilog="tokenreduce export vit-tome -o vit-tome-openvino --format openvino --int8 --images photos")
def export(
    model: Model,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The new folder.")],
    format: Annotated[str, typer.Option(help="onnx, openvino, torch, or aoti (compiled by torch).")] = "onnx",
    batch_size: Annotated[
        str, typer.Option(help="Images that the graph takes: dynamic (any number), or one number.")
    ] = "dynamic",
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute in 8 bits, fitted to --images. OpenVINO only.")
    ] = False,
    images: Annotated[
        str | None, typer.Option(help="A folder of images to check the graph on. Default: noise.")
    ] = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a model as a graph for ONNX Runtime, OpenVINO or torch, and check it."""
    from hf_tokenreduce.deploy import export as write
    from hf_tokenreduce.loading import load_model

    if batch_size != "dynamic" and not batch_size.isdecimal():
        raise ValueError(f"--batch-size must be dynamic or a number, got {batch_size!r}.")
    loaded, processor = load_model(model, revision, trust_remote_code, any_task=True)
    found = write(
        loaded,
        output_dir,
        image_processor=processor,
        format=format,
        batch_size=None if batch_size == "dynamic" else int(batch_size),
        int8=int8,
        images=images,
        overwrite=overwrite,
    )
    print_answer(found, as_json, f"Saved to {output_dir}")


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
    """Check a folder in a fresh process, list what goes up, and upload it."""
    from hf_tokenreduce.hub import check_folder
    from hf_tokenreduce.hub import publish as upload

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


@app.command(epilog="tokenreduce predict vit-tome-openvino photos --json")
def predict(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or an exported model's folder.", metavar="MODEL")],
    images: Annotated[list[str], typer.Argument(help="Images, or folders of them.", metavar="IMAGES...")],
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes to tell of each image.")] = 1,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Keeps predictions as they come; resumes there.")
    ] = None,
    batch_size: Batch = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads.")] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Number of processes that read images.")] = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Label images: class, score, and number of tokens of each.

    Broken images are reported, and the run goes on. Launched by torchrun, processes share the images."""
    import torch
    from accelerate import PartialState

    from hf_tokenreduce.deploy import is_exported, load_exported
    from hf_tokenreduce.loading import load_model
    from hf_tokenreduce.predict import find_images
    from hf_tokenreduce.predict import predict as run

    processor = None
    if is_exported(model):
        at_once = min(batch_size, len(find_images(images)))
        loaded = load_exported(model, threads=threads, batch_size=at_once, trust_remote_code=trust_remote_code)
    else:
        loaded, processor = load_model(model, revision, trust_remote_code)
    if threads is not None:
        torch.set_num_threads(threads)
    broken = 0
    options: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size, "num_workers": num_workers}
    options |= {"output_dir": output_dir, "progress": output_dir is not None}
    for row in run(loaded, images, processor, **options):
        broken += "error" in row
        if as_json:
            print(json.dumps(row), flush=True)
        elif "error" in row:
            print(f"{row['file']}: {row['error']}", file=sys.stderr)
        elif output_dir is None:
            others = "".join(f", {other['label']} {other['score']:.1%}" for other in row.get("others", []))
            print(f"{row['file']}: {row['label']} {row['score']:.1%}{others} ({row['tokens']} tokens)")
    if PartialState().is_main_process and not as_json:
        if output_dir is not None:
            out.print(f"Predictions are in {output_dir}, a line for each image.")
        if broken:
            print(f"{broken} images could not be read.", file=sys.stderr)


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
    """Open a page to try a checkpoint: drop an image, pick a method and a budget."""
    from hf_tokenreduce.serve import serve as run

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
    """Draw images, train a small ViT, reduce it by every method. No downloads."""
    from hf_tokenreduce.demo.run import run_demo

    run_demo(output_dir, seed=seed)
