"""Fit LTMP's thresholds for image classifiers, and write them as small files that ship with the project.

    python benchmarks/make_thresholds.py --models FOLDER_OR_HUB_ID ... --data_dir PHOTOS

The thresholds are fitted without labels on at most 100 of the even rows of the data set. What they cost is measured on
the odd rows, by `benchmarks/training_free_table.py`. Each file of `model_cards/thresholds/` has two numbers per
layer: `load_thresholds(model, FILE)` puts them into a model that is reduced by LTMP. A file takes half a minute.
"""

import argparse
from pathlib import Path

from training_free_table import ROWS, TO_LEARN

from hf_tokenreduce import LTMPConfig, calibrate, reduce_tokens, save_thresholds
from hf_tokenreduce.loading import load_images, load_model


FOLDER = Path(__file__).resolve().parents[1] / "model_cards" / "thresholds"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="Folders or Hub ids of image classifiers.")
    parser.add_argument("--data_dir", required=True, help="Image folder with one folder per class.")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="Shares to keep.")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="Folder for the files.")
    args = parser.parse_args(arguments)

    dataset = load_images(args.data_dir)
    rows = range(len(dataset))[ROWS["even"]]
    rows = rows[:: -(-len(rows) // TO_LEARN)]
    pictures = [picture.convert("RGB") for picture in dataset.select(rows)["image"]]
    for name in args.models:
        dense, processor = load_model(name)
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        for share in args.shares:
            model = reduce_tokens(dense, LTMPConfig(target=share)).eval()
            kept = calibrate(model, pixels, share)
            file = args.output_dir / f"{Path(name).name}-ltmp-{share:g}.safetensors"
            save_thresholds(model, file)
            print(f"{file}: keeps {kept:.3f} of the multiply-adds")


if __name__ == "__main__":
    main()
