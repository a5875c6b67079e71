"""Commands that publish and use models: card, export, publish, predict, serve, demo."""

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
    Pictures,
    Revision,
    Trust,
    app,
    out,
    print_answer,
)


@app.command(epilog="tokenreduce card vit-tome --base-model google/vit-base-patch16-224 --base-license apache-2.0")
def card(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a saved model, or for the cards of --records.", metavar="FOLDER")
    ],
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that was reduced.", metavar="ID")] = None,
    base_license: Annotated[
        str | None, typer.Option(help="License of that model, such as apache-2.0.", metavar="NAME")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hub id of the data set it was trained on.", metavar="ID")
    ] = None,
    repo_id: Annotated[
        str | None, typer.Option(help="Hub id to publish it under: namespace/name.", metavar="ID")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="The report.json that evaluate -o wrote: its numbers for the card.", metavar="FILE"),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Write a card into FOLDER for each record of this folder.", metavar="RECORDS"),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write the model card, README.md. Text that you added to it is kept."""
    from hf_tokenreduce.hub import write_card, write_cards
    from hf_tokenreduce.methods.register import register_from_folder

    if trust_remote_code:
        register_from_folder(folder)
    if report is not None and records is not None:
        raise ValueError("--report is for one card, and --records writes several. Leave one of them out.")
    names = {"base_model": base_model, "base_license": base_license, "dataset": dataset, "repo_id": repo_id}
    written = (
        [write_card(folder, report=report, **names)] if records is None else write_cards(records, folder, **names)
    )
    for path in written:
        out.print(f"Saved to {escape(str(path))}")


@app.command(epilog="tokenreduce export vit-tome -o vit-tome-openvino --format openvino --int8 --images photos")
def export(
    model: Model,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Folder for the exported model.", metavar="FOLDER")
    ],
    format: Annotated[
        str, typer.Option(help="onnx, openvino, torch, or aoti (compiled by torch).", metavar="NAME")
    ] = "onnx",
    batch_size: Annotated[
        str,
        typer.Option(help="Images per batch of the graph: a number, or dynamic for any number.", metavar="N"),
    ] = "dynamic",
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute in 8 bits, fitted to --images. For OpenVINO only.")
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder of images: at most 5 check the graph, at most 300 are for --int8. Default: noise.",
            metavar="FOLDER",
        ),
    ] = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Export a model as a graph for ONNX Runtime, OpenVINO or torch, and check it."""
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
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model with its processor.", metavar="FOLDER")],
    repo_id: Annotated[str, typer.Argument(help="Hub id of the repository: namespace/name.", metavar="REPO_ID")],
    dry_run: Annotated[
        Path | None,
        typer.Option(help="Upload nothing, and save the files of the upload here.", metavar="FOLDER"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is a new one.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the repository.")
    ] = False,
    skip_others: Annotated[
        bool, typer.Option("--skip-others", help="Leave out files that do not belong to the model.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check a model in a new process, list its files, and upload them to the Hub."""
    from hf_tokenreduce.hub import check_folder
    from hf_tokenreduce.hub import publish as upload
    from hf_tokenreduce.hub.publish import check_destination

    check_destination(repo_id, dry_run)  # before the folder is checked, which takes seconds
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
            "warnings": report.warnings,
        }
        print(json.dumps(answer, indent=1))
        return
    out.print(f"{'Written to' if dry_run else 'Uploaded:'} {escape(str(found.pull_request or found.url))}")
    print(found.snippet)


@app.command(epilog="tokenreduce predict vit-tome-openvino photos --json")
def predict(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a model, or folder of an exported model.", metavar="MODEL")
    ],
    images: Pictures,
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes per image.", metavar="N")] = 1,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", "-o", help="Folder for results. A stopped run continues there.", metavar="FOLDER"
        ),
    ] = None,
    batch_size: Batch = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads.", metavar="N")] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Number of processes that read images.", metavar="N")] = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Predict the class of images, with its score and the number of tokens.

    Images that cannot be read are reported, and the run goes on.
    If torchrun launches several processes, they share the images."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from hf_tokenreduce.deploy import is_exported, load_exported
    from hf_tokenreduce.loading import load_model
    from hf_tokenreduce.predict import count_unlabelled, find_images
    from hf_tokenreduce.predict import predict as run
    from hf_tokenreduce.tasks import score_text

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
            told = row["error"] if row["file"] in row["error"] else f"{row['file']}: {row['error']}"
            print(told, file=sys.stderr)
        elif output_dir is None:
            best = [row, *row.get("others", [])]
            told = ", ".join(f"{one['label']} {score_text(one['score'], loaded.config)}" for one in best)
            print(f"{row['file']}: {told} ({row['tokens']} tokens)")
    if PartialState().num_processes > 1:
        broken = sum(gather_object([broken]))
    if PartialState().is_main_process and output_dir is not None:
        broken = count_unlabelled(output_dir)
    if PartialState().is_main_process and not as_json:
        if output_dir is not None:
            out.print(f"The predictions are in {escape(str(output_dir))}, one line per image.")
        if broken:
            print(f"Images with an error and without a label: {broken}.", file=sys.stderr)


@app.command(epilog="tokenreduce serve vit-tome")
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address of the page. By default, only this computer can use it.", metavar="ADDRESS")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page.", metavar="N")] = 7860,
    max_upload_mb: Annotated[float, typer.Option(help="Largest size of an image in MB.", metavar="N")] = 10,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Start a web page to try a model: drop an image, pick a method and a budget."""
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
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "-o", help="Folder for results. A stopped run continues there.", metavar="FOLDER"
        ),
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the images and of the training.", metavar="N")] = 0,
) -> None:
    """Draw images, train a small ViT, and reduce it by every method, without downloads."""
    from hf_tokenreduce.demo.run import run_demo

    run_demo(output_dir, seed=seed)
