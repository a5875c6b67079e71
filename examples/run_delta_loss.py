"""Prepare DL-ViT: label patches by how much the loss grows without them, then fit the filter to these labels.

    python examples/run_delta_loss.py --model_name_or_path FOLDER_OR_HUB_ID --train_dir IMAGE_FOLDER \
        --output_dir FOLDER --max_train_samples 1000

The output folder gets `labels/` (delta and label of every patch), `model/` (the reduced model, which drops patches,
and its image processor) and `results.json`. The script prints how well the filter predicts the labels of held-out
images.
Fine-tune the model afterwards, because dropping patches costs accuracy at first.

Labelling takes most of the time: it needs one forward per patch, 196 for an image of 224 pixels. Two CPU cores need
about 5 to 10 seconds per image with a tiny model. `--labeller groups` takes a quarter of that time, and `--labeller
gradient` about a hundredth. A run that was stopped goes on where it stopped. With another `--threshold` or
`--keep_share` nothing is measured again. The processes of `accelerate launch` or `torchrun` share the labelling.
Fitting the filter takes minutes.

With `--streaming` the folder may also hold WebDataset shards (.tar), and the data set is not downloaded as a whole.
The labelled images are copied into the output folder, because the filter needs them again.

Name each class folder by a label of the model, or begin its name with the index of the class: `0001_goldfish`.
"""

import argparse
import json
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import ClassLabel, Dataset, load_dataset

from hf_tokenreduce import DLViTConfig, reduce_tokens
from hf_tokenreduce.evaluation.accuracy import class_index
from hf_tokenreduce.files import known_settings, write_whole
from hf_tokenreduce.image_folders import folder_split
from hf_tokenreduce.loading import load_model
from hf_tokenreduce.training.deltas import LABELLERS, MASKS
from hf_tokenreduce.training.filter import fit_filter
from hf_tokenreduce.training.labels import make_labels
from hf_tokenreduce.training.origin import name_of, origin, shown
from hf_tokenreduce.training.streaming import folder_stream, kept_images


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of the classifier.")
    parser.add_argument("--model_revision", default="main", help="Commit, tag or branch of the Hub id.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train_dir", help="Folder of images, with one folder per class.")
    source.add_argument("--dataset_name", help="Hub id of a data set.")
    parser.add_argument("--dataset_config_name", help="Configuration of the data set.")
    parser.add_argument("--train_split", default="train", help="Split of the data set.")
    parser.add_argument("--image_column_name", default="image", help="Name of the column with the images.")
    parser.add_argument("--label_column_name", default="label", help="Name of the column with the labels.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the labels and the model.")
    parser.add_argument("--max_train_samples", type=int, help="Label at most this many images.")
    parser.add_argument(
        "--streaming", action="store_true", help="Read a stream, and copy only the images that are labelled."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of images and of the filter.")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--threshold", type=float, help="The labels keep patches whose delta is larger than this.")
    keep.add_argument(
        "--keep_share",
        type=float,
        help="The labels keep this share of all patches, those with the largest deltas. Default: 0.2.",
    )
    parser.add_argument(
        "--labeller",
        choices=LABELLERS,
        default="exact",
        help="Forwards per image: one per patch, one per 2 x 2 patches, or one gradient.",
    )
    parser.add_argument(
        "--mask", choices=MASKS, default="remove", help="Remove the token of a masked patch, or set it to zero."
    )
    parser.add_argument("--label_batch_size", type=int, default=64, help="Number of masked copies per batch.")
    parser.add_argument(
        "--on_error", choices=["stop", "skip"], default="stop", help="What to do about an image that cannot be read."
    )
    parser.add_argument("--reduction_args", type=json.loads, default={}, help="Fields of DLViTConfig, as JSON.")
    parser.add_argument("--num_train_epochs", type=int, default=10, help="Number of epochs of the filter.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Learning rate of the filter.")
    parser.add_argument("--train_batch_size", type=int, default=32, help="Number of images per step of the filter.")
    parser.add_argument("--validation_share", type=float, default=0.1, help="Share of the images to hold out.")
    parser.add_argument(
        "--use_cpu", action="store_true", help="Run on the CPU. Several processes without accelerators need it."
    )
    args = parser.parse_args(arguments)
    if args.threshold is None and args.keep_share is None:
        args.keep_share = 0.2  # most deltas are near zero, where their sign is chance and cannot be learned
    return args


def load_images(args: argparse.Namespace, label2id: dict[str, int]) -> Dataset:
    """Load the images, with the class indices of the model as labels."""
    if args.streaming:
        folder = args.output_dir / f"images-{args.max_train_samples}-{args.seed}"
        names = ("train_dir", "dataset_name", "dataset_config_name", "train_split", "image_column_name",
                 "label_column_name")  # fmt: skip
        source, file = {name: getattr(args, name) for name in names}, folder.with_suffix(".json")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(source, indent=1))
        known_settings(file, source)
        if folder.exists():
            stream = None
        elif args.train_dir is not None:
            stream = folder_stream(args.train_dir)
        else:
            name, config = args.dataset_name, args.dataset_config_name
            stream = load_dataset(name, config, split=args.train_split, streaming=True)
        columns = [args.image_column_name, args.label_column_name]
        dataset = kept_images(stream, args.max_train_samples, args.seed, columns, folder)
    elif args.train_dir is not None:
        dataset = folder_split(args.train_dir, args.train_split)
    else:
        dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=args.train_split)
    column = args.label_column_name
    feature = dataset.features.get(column)
    if not isinstance(feature, ClassLabel):
        return dataset
    classes = [class_index(name, label2id) for name in feature.names]
    # -1 and None are no labels, and make_labels refuses them.
    labels = [label if label is None or label < 0 else classes[label] for label in dataset[column]]
    return dataset.remove_columns(column).add_column(column, labels)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    setting = DLViTConfig(**args.reduction_args)
    if args.streaming and args.max_train_samples is None:
        raise ValueError("A stream may be without end, and labelling takes long. Give --max_train_samples.")
    processes = PartialState(cpu=args.use_cpu)
    model, processor = load_model(args.model_name_or_path, args.model_revision)  # refuses one without a classifier
    model.to(processes.device)
    with processes.main_process_first():  # the other processes find the data set in the cache
        dataset = load_images(args, model.config.label2id)
    labelling = make_labels(
        model,
        dataset,
        args.output_dir / "labels",
        image_processor=processor,
        threshold=args.threshold or 0.0,
        keep_share=args.keep_share,
        labeller=args.labeller,
        mask=args.mask,
        batch_size=args.label_batch_size,
        max_samples=args.max_train_samples,
        seed=args.seed,
        on_error=args.on_error,
        image_column_name=args.image_column_name,
        label_column_name=args.label_column_name,
    )
    if not processes.is_main_process:
        return
    print(
        f"{labelling.images} images were labelled and {labelling.skipped} skipped. The labels keep "
        f"{labelling.share_kept:.1%} of the patches."
    )
    reduced = reduce_tokens(model, setting)
    fit = fit_filter(
        reduced,
        args.output_dir / "labels",
        dataset,
        image_processor=processor,
        epochs=args.num_train_epochs,
        learning_rate=args.learning_rate,
        batch_size=args.train_batch_size,
        validation_share=args.validation_share,
        seed=args.seed,
        image_column_name=args.image_column_name,
    )
    print(
        f"On {fit.images} held-out images the filter keeps {fit.share_kept:.1%} of the patches (the labels: "
        f"{fit.share_labelled:.1%}). Its precision is {fit.precision:.3f}, its recall {fit.recall:.3f}."
    )
    reduced.save_pretrained(args.output_dir / "model")
    processor.save_pretrained(args.output_dir / "model")
    # A later training reads this record to know the first checkpoint and the commands.
    settings = reduced.config.reduction.to_dict()
    command = ["python", "examples/run_delta_loss.py", *(sys.argv[1:] if arguments is None else arguments)]
    record = {"method": "dlvit", "settings": settings, **origin(args.model_name_or_path), "command": shown(command)}
    record["fitted_on"] = name_of(args.dataset_name, args.train_dir)
    (args.output_dir / "model" / "record.json").write_text(json.dumps(record))
    results = {"labels": labelling._asdict(), "filter": fit._asdict()}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
