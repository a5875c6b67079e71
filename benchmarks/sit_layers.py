"""Compare the layers after which SiT can slim, at equal multiply-adds, without training.

    python benchmarks/sit_layers.py MODEL PHOTOS

MODEL is a folder or Hub id of an image classifier with 12 layers. PHOTOS is a folder of images; their labels are not
used. For each share and choice of layers, the networks are calibrated on every eighth photograph. Then the classes of
at most 400 others are compared with those of the dense model.

The choice that `reduce_tokens(model, "sit", share=...)` makes was made by this table. Each row is written to
benchmarks/results as soon as it is done, and is not measured again. A row takes about half a minute on two cores.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hf_tokenreduce import SiTConfig, calibrate, reduce_tokens
from hf_tokenreduce.evaluation.reading import sample_pixels
from hf_tokenreduce.evaluation.resume import digest_of_data
from hf_tokenreduce.files import known_settings, write_whole
from hf_tokenreduce.loading import load_images, load_model


CHOICES = {
    0.8: ((5, 8, 9), (5,), (7,), (8,)),
    0.65: ((5, 8, 9), (2, 5, 8), (3, 6, 9), (4, 8), (3,), (4,), (5,), (6,)),
    0.45: ((2, 5, 8), (1, 4, 7), (1, 5), (1,), (2,), (3,)),
    0.28: ((1, 3, 5), (0, 2), (0, 3), (0, 5), (0,), (1,)),
}
CALIBRATED_ON, MOST = 8, 400  # every eighth image; number of images that are compared


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or Hub id of an image classifier.")
    parser.add_argument("photos", help="Folder of images.")
    parser.add_argument(
        "--shares", type=float, nargs="+", choices=CHOICES, default=list(CHOICES), help="Shares of the multiply-adds."
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent / "results", help="Folder for the results."
    )
    args = parser.parse_args(arguments)
    dense, processor = load_model(args.model)
    images = load_images(args.photos, labelled=None)
    pixels = sample_pixels(images, processor, "image", len(images))
    is_learned = torch.arange(len(pixels)) % CALIBRATED_ON == 0
    learned, others = pixels[is_learned], pixels[~is_learned][:: -(-int((~is_learned).sum()) // MOST)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / f"sit-layers-{Path(args.model).name}.json"
    settings = {"images": len(others), "photos": digest_of_data(images, "image", [])}
    found: dict[str, Any] = {**settings, "rows": []}
    if file.is_file():
        found = known_settings(file, settings)
    known = [(row["share"], tuple(row["layers"])) for row in found["rows"]]
    wanted = [(share, layers) for share in args.shares for layers in CHOICES[share]]
    logits = logits_of(dense, others)
    for share, layers in wanted:
        if (share, layers) not in known:
            setting = SiTConfig.for_budget(dense.config, share, layers=layers)
            model = reduce_tokens(dense, setting, copy=True)
            calibrate(model, learned)
            slim = list(setting.slim_tokens(dense.config).values())
            row = {"share": share, "layers": layers, "slim": slim, **compared(logits, logits_of(model, others))}
            found["rows"].append(row)
            write_whole(file, json.dumps(found, indent=1) + "\n")
            print(f"{share} {layers}: {row['same_class']:.1f} %", flush=True)
    print(table(found))


@torch.inference_mode()
def logits_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).logits for part in pixels.split(50)])


def compared(dense: torch.Tensor, reduced: torch.Tensor) -> dict[str, float]:
    """How many images keep the dense model's class, in percent, and the divergence of the probabilities in nats."""
    divergence = F.kl_div(reduced.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
    same = (reduced.argmax(dim=1) == dense.argmax(dim=1)).double().mean()
    return {"same_class": round(100 * same.item(), 2), "divergence": round(divergence.item(), 4)}


def table(found: dict[str, Any]) -> str:
    """The rows in Markdown, the best of each share first."""
    lines = [
        "| share | after layers | slim tokens | same class as dense % | divergence |",
        "|---" * 5 + "|",
    ]
    for row in sorted(found["rows"], key=lambda row: (-row["share"], row["divergence"])):
        after, slim = (", ".join(map(str, row[name])) for name in ("layers", "slim"))
        lines.append(f"| {row['share']:g} | {after} | {slim} | {row['same_class']:.1f} | {row['divergence']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
