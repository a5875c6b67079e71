"""Measure what 8 bits cost in accuracy: OpenVINO's graphs beside the same models in float32, dense and reduced.

    python benchmarks/int8_accuracy.py MODEL PHOTOS

MODEL is a folder or Hub id, and PHOTOS is a folder with one folder per class. Every other photograph, at most 300, is
used to fit the ranges of 8 bits, and all other photographs are classified. The result of each method is written to
benchmarks/results as soon as it is done, and is not measured again.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hf_tokenreduce import export, load_exported
from hf_tokenreduce.budget import reduce_to_share
from hf_tokenreduce.evaluation.accuracy import class_indices, paired_bootstrap
from hf_tokenreduce.evaluation.reading import batches
from hf_tokenreduce.evaluation.resume import digest_of_data
from hf_tokenreduce.files import known_settings, write_whole
from hf_tokenreduce.loading import load_images, load_model
from hf_tokenreduce.pictures import spread


METHODS = ("dense", "tome", "topk", "evit", "bat", "sit", "ats", "ltmp")


def reduced(dense: Any, method: str, share: float, images: torch.Tensor) -> Any:
    """Reduce the model by one method without training. Methods that learn from images learn from `images`."""
    if method == "dense":
        return dense
    needs_images = method in ("ats", "ltmp", "sit")
    return reduce_to_share(dense, method, share, images if needs_images else None, None, {}).eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or Hub id of an image classifier.")
    parser.add_argument("photos", help="Folder of images, with one folder per class.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Names of the methods.")
    parser.add_argument("--share", type=float, default=0.65, help="Share of the multiply-adds to keep.")
    parser.add_argument("--limit", type=int, help="Use at most this many images, evenly spread.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent / "results", help="Folder for the results."
    )
    args = parser.parse_args(arguments)
    dense, processor = load_model(args.model)
    images = load_images(args.photos, limit=args.limit)
    names = class_indices(images, "label", dense.config.label2id)
    labels = np.array([names[label] for label in images.with_format(None)["label"]])
    rows = list(range(len(images)))
    read = batches(images, rows, processor, batch_size=50, image_column="image", title="reading")
    pixels = torch.cat([pixel_values for _, pixel_values in read])
    fitting = [rows[::2][place] for place in spread(len(rows[::2]), 300)]  # of all classes
    rest = sorted(set(rows) - set(fitting))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / f"int8-accuracy-{Path(args.model).name}.json"
    settings = {
        "share": args.share,
        "fitting": "evenly spread",
        "images": len(rest),
        "photos": digest_of_data(images, "image", labels.tolist()),
    }
    found: dict[str, Any] = {**settings, "date": date.today().isoformat(), "rows": {}}
    if file.is_file():
        found = known_settings(file, settings)
    for method in args.methods:
        if method not in found["rows"]:
            model = reduced(dense, method, args.share, pixels[[fitting[place] for place in spread(len(fitting), 100)]])
            found["rows"][method] = measure(model, pixels[fitting], pixels[rest], labels[rest])
            write_whole(file, json.dumps(found, indent=1) + "\n")
    print("| method | float32 % | 8 bits % | lost, points | interval | same class % |\n" + "|---" * 6 + "|")
    for method in args.methods:
        row = found["rows"][method]
        low, high = row["interval"]
        print(
            f"| {method} | {row['float32']:.1f} | {row['int8']:.1f} | {row['float32'] - row['int8']:.1f} | "
            f"{low:.1f} to {high:.1f} | {row['same_class']:.1f} |"
        )


def measure(model: Any, fitting: torch.Tensor, images: torch.Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Classify the images by the model in PyTorch and by its graph in 8 bits, and compare the classes."""
    with torch.inference_mode():
        float_classes = torch.cat([model(part).logits for part in images.split(50)]).argmax(dim=1).numpy()
    with TemporaryDirectory() as folder:
        export(model, Path(folder) / "graph", format="openvino", int8=True, images=fitting)
        int8_classes = load_exported(Path(folder) / "graph", batch_size=50)(images).argmax(dim=1).numpy()
    return {
        "float32": 100 * float((float_classes == labels).mean()),
        "int8": 100 * float((int8_classes == labels).mean()),
        "interval": paired_bootstrap(int8_classes == labels, float_classes == labels),
        "same_class": 100 * float((float_classes == int8_classes).mean()),
    }


if __name__ == "__main__":
    main()
