"""Top-1 accuracy of a checkpoint on an image folder, dense and by any number of reductions, without training.

    python examples/measure_accuracy.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir IMAGE_FOLDER \
        --reduction '{"method": "tome", "r": 8}' --reduction '{"method": "evit", "keep_rate": 0.7}'
    python examples/measure_accuracy.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir IMAGE_FOLDER --share 0.65

`--share` tries every method that runs untrained, each set to keep that share of the multiply-adds (ATS, which has no
such setting, as it is). LTMP and SiT are calibrated on some of the images, without their labels. Class folders are
named by a label of the model, or begin with its index: `0001_goldfish`. Prints a Markdown table as the rows come in;
1,000 images of 224 pixels through a tiny model take about half a minute per row on two cores.
"""

import argparse
import json
from typing import NamedTuple

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from hf_tokenreduce import BATConfig, EViTConfig, SiTConfig, ToMeConfig, TopKConfig, calibrate, reduce_tokens
from hf_tokenreduce.modeling.multiply_adds import multiply_adds


EVEN = (ToMeConfig, TopKConfig, EViTConfig, BATConfig, SiTConfig)


class Data(NamedTuple):
    pixels: torch.Tensor
    labels: torch.Tensor


class Result(NamedTuple):
    top1: float
    share: float  # of the encoder's multiply-adds
    tokens: float  # leaving the last layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--model_revision", default="main")
    parser.add_argument("--data_dir", required=True, help="an image folder: one folder per class")
    parser.add_argument("--split", default="validation", help="split of the image folder")
    parser.add_argument("--batch_size", type=int, default=50)


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, Data]:
    model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    images = load_dataset("imagefolder", data_dir=args.data_dir, split=args.split)
    classes = [class_index(name, model.config.label2id) for name in images.features["label"].names]
    labels = torch.tensor([classes[label] for label in images["label"]])
    photos = (row["image"].convert("RGB") for row in images)
    return model.eval(), Data(
        torch.cat([processor(photo, return_tensors="pt").pixel_values for photo in photos]), labels
    )


@torch.inference_mode()
def measure(model: PreTrainedModel, data: Data, batch_size: int) -> Result:
    """Of a dense model or a reduced one."""
    reduction = getattr(model.config, "reduction", None)
    length = data.pixels[0, 0].numel() // model.config.patch_size**2 + 1
    dense = multiply_adds(model.config, torch.full((1, model.config.num_hidden_layers), length), length).item()
    correct, tokens, cost = 0, 0, 0.0
    for pixels, labels in zip(data.pixels.split(batch_size), data.labels.split(batch_size), strict=True):
        output = model(pixels)
        correct += (output.logits.argmax(dim=-1) == labels).sum().item()
        counts = output.get("token_counts", torch.full((len(pixels), model.config.num_hidden_layers), length))
        tokens += counts[:, -1].sum().item()
        cost += multiply_adds(model.config, counts, length, reduction).sum().item()
    count = len(data.labels)
    return Result(100 * correct / count, cost / count / dense, tokens / count)


def class_index(name: str, label2id: dict[str, int]) -> int:
    if name in label2id:
        return label2id[name]
    index = name.split("_")[0]
    if not index.isdecimal() or int(index) >= len(label2id):
        raise ValueError(f"The folder {name!r} is no label of the model, nor does it begin with the index of one.")
    return int(index)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--reduction", action="append", default=[], type=json.loads, help="JSON; may be given again")
    parser.add_argument("--share", type=float, help="every method that runs untrained, at this share of multiply-adds")
    parser.add_argument("--calibrate", type=int, default=100, help="images, without labels, for LTMP and SiT")
    args = parser.parse_args()
    logging.disable_progress_bar()

    model, data = load(args)
    reductions = [None, *args.reduction]
    if args.share is not None:
        reductions += [config_class.for_budget(model.config, args.share).to_dict() for config_class in EVEN]
        reductions += [{"method": "ats"}, {"method": "ltmp", "target": args.share}]
    print(f"{args.model_name_or_path}, {len(data.labels)} images\n")
    print("| reduction | top-1 % | multiply-adds kept | tokens leaving the last layer |\n|---|---|---|---|")
    for reduction in reductions:
        reduced = model if reduction is None else reduce_tokens(model, reduction).eval()
        if reduction and reduction["method"] in ("ltmp", "sit"):
            calibrate(reduced, data.pixels, reduction.get("target"), max_images=args.calibrate)
        result = measure(reduced, data, args.batch_size)
        name = json.dumps(reduction) if reduction else "dense"
        print(f"| {name} | {result.top1:.1f} | {result.share:.3f} | {result.tokens:.0f} |", flush=True)


if __name__ == "__main__":
    main()
