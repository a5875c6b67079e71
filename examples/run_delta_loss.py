"""DL-ViT in two stages: label patches by what the loss gains without them, then teach the filter those labels.

    python examples/run_delta_loss.py --model_name_or_path FOLDER_OR_HUB_ID --train_dir IMAGE_FOLDER \
        --output_dir FOLDER --max_train_samples 1000 --keep_share 0.5

Writes `labels/` (every patch's delta and label), `model/` (the reduced model, which drops patches, and its image
processor) and `results.json` into the output folder, and prints how well the filter knows the labels of images that
it has not learnt from. Fine-tune the model afterwards: dropping half of the patches costs accuracy at first.

Labelling is what takes long: one forward per patch, 196 for an image of 224 pixels, so that two CPU cores need about
5 to 10 seconds an image with a tiny model. `--labeller groups` needs a quarter, `--labeller gradient` a sixtieth. A
run that was stopped goes on where it was; with another `--threshold` or `--keep_share` nothing is measured again.
`accelerate launch` and `torchrun` share the labelling between processes. The filter then learns in minutes.

Class folders are named by a label of the model, or begin with its index: `0001_goldfish`.
"""

import argparse
import json
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import ClassLabel, Dataset, load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_tokenreduce import DLViTConfig, reduce_tokens
from hf_tokenreduce.evaluation.accuracy import class_index
from hf_tokenreduce.loading import folder_split
from hf_tokenreduce.training.filter import fit_filter
from hf_tokenreduce.training.labels import LABELLERS, MASKS, make_labels
from hf_tokenreduce.training.run import origin, shown


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--model_revision", default="main")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train_dir", help="an image folder: one folder per class")
    source.add_argument("--dataset_name", help="of a data set on the Hub")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--image_column_name", default="image")
    parser.add_argument("--label_column_name", default="label")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_samples", type=int, help="images to label")
    parser.add_argument("--seed", type=int, default=0)
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--threshold", type=float, default=0.0, help="keep patches without which the loss gains more")
    keep.add_argument("--keep_share", type=float, help="keep this share of all patches")
    parser.add_argument("--labeller", choices=LABELLERS, default="exact")
    parser.add_argument("--mask", choices=MASKS, default="remove", help="what masking a patch means")
    parser.add_argument("--label_batch_size", type=int, default=64, help="masked copies of images")
    parser.add_argument("--on_error", choices=["stop", "skip"], default="stop", help="at images that cannot be read")
    parser.add_argument("--reduction_args", type=json.loads, default={}, help="JSON: the fields of DLViTConfig")
    parser.add_argument("--num_train_epochs", type=int, default=10, help="of the filter")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--train_batch_size", type=int, default=32, help="images")
    parser.add_argument("--validation_share", type=float, default=0.1)
    parser.add_argument("--use_cpu", action="store_true", help="needed for several processes without accelerators")
    return parser.parse_args(arguments)


def load_images(args: argparse.Namespace, label2id: dict[str, int]) -> Dataset:
    """With the model's numbers for the classes."""
    if args.train_dir is not None:
        dataset = folder_split(args.train_dir, args.train_split)
    else:
        dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=args.train_split)
    column = args.label_column_name
    feature = dataset.features.get(column)
    if not isinstance(feature, ClassLabel):
        return dataset
    classes = [class_index(name, label2id) for name in feature.names]
    labels = [classes[label] for label in dataset[column]]
    return dataset.remove_columns(column).add_column(column, labels)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    setting = DLViTConfig(**args.reduction_args)
    processes = PartialState(cpu=args.use_cpu)
    model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    model.eval().to(processes.device)
    with processes.main_process_first():  # the others find the data set in the cache
        dataset = load_images(args, model.config.label2id)
    labelling = make_labels(
        model,
        dataset,
        args.output_dir / "labels",
        image_processor=processor,
        threshold=args.threshold,
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
        f"{labelling.images} images labelled, {labelling.skipped} skipped, {labelling.share_kept:.1%} of their "
        "patches are to be kept"
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
        f"on {fit.images} images held out the filter keeps {fit.share_kept:.1%} of the patches (labels: "
        f"{fit.share_labelled:.1%}), precision {fit.precision:.3f}, recall {fit.recall:.3f}"
    )
    reduced.save_pretrained(args.output_dir / "model")
    processor.save_pretrained(args.output_dir / "model")
    # The training that follows reads there what it all began with.
    settings = reduced.config.reduction.to_dict()
    command = ["python", "examples/run_delta_loss.py", *(sys.argv[1:] if arguments is None else arguments)]
    record = {"method": "dlvit", "settings": settings, **origin(args.model_name_or_path), "command": shown(command)}
    (args.output_dir / "model" / "record.json").write_text(json.dumps(record))
    results = {"labels": labelling._asdict(), "filter": fit._asdict()}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
