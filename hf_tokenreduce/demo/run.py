"""`tokenreduce demo`: draw images, train a dense model, reduce it by every method, and show the results.

Every step leaves its result in the output folder, and is skipped if its result is there.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor, set_seed

from ..calibration import calibrate
from ..convert import with_reduction
from ..evaluation import benchmark, evaluate_model, pareto_plot
from ..files import model_folder, write_whole
from ..hub import write_card
from ..image_folders import load_image_folder
from ..loading import no_progress_bars
from ..methods import METHODS, Method
from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import facts_of
from ..pictures import spread
from ..training import (
    BatchTransform,
    Collator,
    TokenReduceTrainer,
    TokenReduceTrainingArguments,
    TrainTransform,
    recipe,
)
from ..tuning import read_tuned, tune
from ..tuning.report import FILE
from ..visualization import method_comparison, write_page
from .dense import STEPS, train_dense
from .images import make_images
from .report import NAMES, markdown_table, write_report


SHARE = 0.6  # share of the multiply-adds to keep
LEARNED_FROM = 1600  # number of training images that the methods learn from
LABELLED = 160  # number of images that are labelled for DL-ViT: one forward for every few patches
TUNED_MINUTES = 0.4  # time of the tuner's search, in minutes
SHOWN = 12  # number of images on the page of a method
FRESH = """
import sys
sys.modules["hf_tokenreduce"] = None  # importing it fails, so the code in the folder is used
from transformers import pipeline
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True, device="cpu")
best = classify(sys.argv[2])[0]
print(f"{type(classify.model).__module__.split('.')[0]}: {best['label']} {best['score']:.3f}")
"""


def run_demo(output_dir: str | Path = "demo", *, seed: int = 0, steps: int = STEPS, train: int = 6000) -> str:
    """Run the whole demonstration. It needs no downloads, and goes on where an earlier call was interrupted.

    Args:
        output_dir: The folder for the results: index.html, table.md, and a folder for each model.
        seed: Seed of the images and of the training.
        steps: Number of training steps of the dense model. Fewer are quicker, but give a worse model.
        train: Number of training images.

    Returns:
        `str`: The table of all methods, in Markdown.
    """
    begin, folder = time.perf_counter(), Path(output_dir)
    data, work = folder / "data", folder / "work"
    others = [name for name in ("index.html", "results.json", "table.md", "pareto.png") if (folder / name).exists()]
    if others and not data.is_dir():
        raise ValueError(f"{folder} holds {others[0]} of something else. Give a new or empty folder.")
    _say(f"1. Images: {data}")
    make_images(data, train=train, validation=min(400, train), seed=seed)
    _say("2. A dense ViT, trained from random weights (takes over a minute)")
    train_dense(data, folder / "dense", seed=seed, steps=steps)
    with no_progress_bars():
        dense = AutoModelForImageClassification.from_pretrained(folder / "dense").eval()
    processor = ViTImageProcessor.from_pretrained(folder / "dense")
    training, validation = (load_image_folder(data / split)["train"] for split in ("train", "validation"))

    training = training.shuffle(seed=seed).select(range(min(LEARNED_FROM, len(training))))
    _say(f"3. Every method, at {SHARE:.0%} of the multiply-adds (ATS decides how many it needs)")
    models: dict[str, PreTrainedModel] = {"dense": dense}
    for number, (name, method) in enumerate(METHODS.items(), start=1):
        target = folder / name
        if not (target / "config.json").is_file():
            _say(f"   {number} of {len(METHODS)}: {method.title}" + (", trained" if "demo" in method.recipes else ""))
            set_seed(seed)
            reduced = with_reduction(copy.deepcopy(dense), _setting(method, dense))
            reduced = _prepared(method, reduced, training, processor, work / name)
            with model_folder(target) as place, no_progress_bars():
                reduced.save_pretrained(place)
                processor.save_pretrained(place)
        with no_progress_bars():
            models[name] = AutoModelForImageClassification.from_pretrained(target).eval()

    _say("4. Accuracy on images that no model was trained on, and speed, measured in turn")
    report = evaluate_model(dense, validation, processor, output_dir=work / "accuracy" / "dense")
    reports = {"dense": report}
    for name, model in models.items():
        if name != "dense":
            where = work / "accuracy" / name
            reports[name] = evaluate_model(model, validation, processor, dense=report, output_dir=where)
    speed = _speed(models, validation, processor, work / "speed.json")
    rows = [_row(name, reports[name].to_dict(), speed[name]) for name in models]
    write_whole(folder / "results.json", json.dumps(rows, indent=1))
    table = markdown_table(rows)
    write_whole(folder / "table.md", table + "\n")

    _say("5. The tuner, which searches methods, layers and settings on half of those images")
    tuned = _tuned(dense, validation, processor, folder / "tuned", seed)

    _say("6. Pictures, pages and model cards")
    pareto_plot(rows, folder / "pareto.png", "Accuracy of a small ViT on drawn images")
    pictures = _examples(validation, SHOWN)
    in_papers = [method for method in METHODS.values() if method.paper and method.token_decoder is None]
    chosen = {method.title: models[method.name] for method in in_papers}  # their tokens are areas of the image
    comparisons = []
    for number, picture in enumerate(pictures[:4]):
        comparisons.append(folder / f"methods-{number}.png")
        method_comparison(chosen, picture, processor, size=168).save(comparisons[-1])
    for name, row in zip(models, rows, strict=True):
        if name != "dense":
            page = folder / f"{name}.html"
            write_page(models[name], pictures, processor, page, dense=dense, title=f"{NAMES[name]} on drawn images")
            record = {**row, "dataset": "drawn shapes", "base_model": "dense", "seed": seed}
            write_whole(folder / name / "record.json", json.dumps(record, indent=1))
            picture = method_comparison({NAMES[name]: models[name]}, pictures[0], processor, size=288)
            picture.save(folder / name / "token_map.png")
            write_card(folder / name)
    write_report(folder / "index.html", rows, folder / "pareto.png", comparisons, tuned)

    print("\n" + table + "\n")
    _say("7. One of the folders, loaded in a new process that cannot import this package:")
    sample = next((data / "validation").glob("star/*.png"))
    last = folder / next(reversed(METHODS))
    _say(f"   prediction of {last} for an image of a {sample.parent.name}: {_fresh(last, sample)}")
    seconds = time.perf_counter() - begin
    _say(f"Done in {seconds // 60:.0f} min {seconds % 60:.0f} s. Open {folder / 'index.html'}.")
    return table


def _setting(method: Method, dense: PreTrainedModel) -> ReductionConfig:
    facts = facts_of(dense.config)
    if method.at_share is not None:
        return method.at_share(facts, SHARE)
    return method.untrained(facts, [SHARE])[0] if method.untrained else method.config_class()


def _prepared(method: Method, model: PreTrainedModel, images: Dataset, processor: Any, work: Path) -> PreTrainedModel:
    """Let the method learn what it needs from the training images."""
    if method.prepare is not None:
        pixels = processor(_examples(images, 96), return_tensors="pt")["pixel_values"]
        calibrate(model, pixels, getattr(model.config.reduction, "target", None))
    if method.learn_from_labels is not None:
        work.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"labeller": "groups", "keep_share": 0.4, "max_samples": LABELLED}
        method.learn_from_labels(model, images, work, processor, **options)
    if "demo" in method.recipes:
        arguments = TokenReduceTrainingArguments(
            str(work),
            **{**recipe(method.name, "demo"), "per_device_train_batch_size": 32},
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
        )
        augmented = images.with_transform(BatchTransform(TrainTransform(processor, scale=(0.9, 1.0))))
        trainer = TokenReduceTrainer(model, arguments, train_dataset=augmented, data_collator=Collator())
        trainer.train()
    return model.eval()


def _tuned(dense: PreTrainedModel, images: Dataset, processor: Any, folder: Path, seed: int) -> dict[str, Any]:
    if not (folder / FILE).is_file():
        record = {"base_model": "dense", "eval_dataset": "drawn shapes, held out from the search"}
        options: dict[str, Any] = {"minutes": TUNED_MINUTES, "repeats": 6, "seed": seed, "record": record}
        tune(dense, images, processor, share=SHARE, output_dir=folder, **options)
    return read_tuned(folder)


def _speed(
    models: dict[str, PreTrainedModel], images: Dataset, processor: Any, file: Path
) -> dict[str, dict[str, float]]:
    if not file.is_file():
        pixels = processor(_examples(images, 64), return_tensors="pt")["pixel_values"]
        report = benchmark(models, pixels, batch_sizes=[32], repeats=11, breakdown=False, memory=False, suggest=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(report.to_dict(), indent=1))
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]}


def _row(name: str, accuracy: dict[str, Any], speed: dict[str, Any]) -> dict[str, Any]:
    names = ("speedup", "speedup_interval", "oracle_share", "images_per_second")
    row = {**accuracy, **{key: speed[key] for key in names}, "speed_batch_size": speed["batch_size"]}
    return {**row, "name": NAMES[name], "trained": name in METHODS and "demo" in METHODS[name].recipes}


def _examples(images: Dataset, count: int) -> list[Image.Image]:
    return images.select(spread(len(images), count))["image"][:]


def _fresh(folder: Path, image: Path) -> str:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", FRESH, str(folder.resolve()), str(image.resolve())]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{folder} does not load in a new process: {last}")
    return done.stdout.strip().splitlines()[-1]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
