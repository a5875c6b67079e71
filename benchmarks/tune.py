"""What the tuner finds for models at some targets, on labelled photographs.

    python benchmarks/tune.py --models FOLDER_OR_HUB_ID ... --data_dir IMAGE_FOLDER --work_dir FOLDER

Each model is tuned for each target in a folder of its own in `--work_dir`, where a run that was stopped goes on. Ends
with `benchmarks/results/tune-<model>-<target>.json` for each, and a table. A search of 500 images takes about six
minutes with a tiny model on two quiet cores, and its report about two. `--no_speed` leaves the clock out.
"""

import argparse
from pathlib import Path

from hf_tokenreduce import tune
from hf_tokenreduce.files import write_whole
from hf_tokenreduce.loading import load_images, load_model


RESULTS = Path(__file__).with_name("results")
TARGETS = ("share=0.65", "share=0.5", "max_drop=1", "speedup=1.5")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--data_dir", required=True, help="an image folder: one folder per class")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="such as share=0.65")
    parser.add_argument("--minutes", type=float, help="the most that each search takes")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--no_speed", action="store_true")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data_dir)
    lines = ["| model | target | chosen | drop | best single default | drop | settings tried |", "|---" * 7 + "|"]
    for name in args.models:
        model, processor = load_model(name)
        for target in args.targets:
            kind, value = target.split("=")
            called = f"{Path(name).name}-{kind.replace('_', '-')}-{value}"
            report = tune(
                model, images, processor, **{kind: float(value)}, output_dir=args.work_dir / called,
                minutes=args.minutes, batch_size=args.batch_size, speed=not args.no_speed,
            )  # fmt: skip
            text = (args.work_dir / called / "tuning.json").read_text()
            write_whole(args.output_dir / f"tune-{called}.json", text + "\n")
            default = next((row for row in report.rows if "default" in row["roles"]), None)
            cells = [report.model, f"{kind} {value}", report.chosen["name"], dropped(report.chosen)]
            cells += ["", ""] if default is None else [default["name"], dropped(default)]
            lines.append(f"| {' | '.join(cells)} | {report.tried} |")
    print("\n".join(lines))


def dropped(row: dict) -> str:
    if row.get("drop") is None:
        return ""
    return "{:.1f} ({:.1f} to {:.1f})".format(row["drop"], *row["drop_interval"])


if __name__ == "__main__":
    main()
