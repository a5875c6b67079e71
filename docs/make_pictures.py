"""Draw the token picture of every method: `docs/images/methods/<name>.webp`.

    python docs/make_pictures.py MODEL PHOTO --images FOLDER

Each picture shows the photograph and the tokens that leave the last layer of MODEL, reduced by the method to 65 % of
its multiply-adds. ATS, LTMP and SiT are fitted to the images in FOLDER, without their labels. DL-ViT's filter learns
from the labels of 100 of them, which takes some minutes; without class folders its picture is left out. A photograph
that is not your own needs the name of its author and its licence on the page: see `CREDIT` in
`hf_tokenreduce/methods/table.py`.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_tokenreduce import DLViTConfig, reduce_tokens
from hf_tokenreduce.budget import reduce_to_share
from hf_tokenreduce.evaluation.accuracy import class_indices
from hf_tokenreduce.loading import load_images, load_model
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.training import fit_filter, make_labels
from hf_tokenreduce.visualization import method_comparison


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an image classifier")
    parser.add_argument("photo", help="the photograph to draw")
    parser.add_argument("--images", required=True, help="a folder of images, to fit methods to")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--share", type=float, default=0.65, help="share of the multiply-adds to keep")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "images" / "methods")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    dense, processor = load_model(args.model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.methods:
        model = reduced(dense, processor, name, args.share, args.images)
        if model is not None:
            picture = method_comparison({METHODS[name].title: model}, args.photo, processor, size=280)
            picture.save(args.output_dir / f"{name}.webp", quality=80, method=6)
            print(args.output_dir / f"{name}.webp")


def reduced(dense: Any, processor: Any, name: str, share: float, images: str) -> Any:
    """The model reduced by one method to a share. None: the method needs labels, and there are none."""
    method = METHODS[name]
    if method.needs == "labels":
        return with_filter(dense, processor, share, images)
    fitted = method.prepare is not None or method.at_share is None
    return reduce_to_share(dense, name, share, images if fitted else None, processor if fitted else None, {}).eval()


def with_filter(dense: Any, processor: Any, share: float, images: str) -> Any:
    """DL-ViT with a filter that learned from 100 labelled images."""
    dataset = load_images(images, limit=100, labelled=False)
    if "label" not in dataset.column_names:
        return None
    classes = class_indices(dataset, "label", dense.config.label2id)
    labels = [classes[label] for label in dataset["label"]]
    dataset = dataset.remove_columns("label").add_column("label", labels)
    model = reduce_tokens(dense, DLViTConfig.for_budget(dense.config, share))
    with TemporaryDirectory() as folder:
        make_labels(dense, dataset, folder, image_processor=processor, labeller="groups", keep_share=0.5)
        fit_filter(model, folder, dataset, image_processor=processor)
    return model.eval()


if __name__ == "__main__":
    main()
