"""Tune models for some targets on labelled photographs, and collect the results in a table.

    python benchmarks/tune.py --models FOLDER_OR_HUB_ID ... --data_dir IMAGE_FOLDER --work_dir FOLDER

Each model is tuned for each target in its own folder in `--work_dir`, where a run that was stopped goes on. The
results are `benchmarks/results/tune-<model>-<target>.json` for each search, and a table. A search on 500 images takes
about six minutes with a tiny model on two idle cores, and its report takes about two. `--no_speed` measures no speed.
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
    parser.add_argument("--models", nargs="+", required=True, help="Folders or Hub ids of image classifiers.")
    parser.add_argument("--data_dir", required=True, help="Folder of images, with one folder per class.")
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="Folder for the searches. A stopped search continues there."
    )
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="Targets, such as share=0.65.")
    parser.add_argument("--minutes", type=float, help="Longest time of each search in minutes.")
    parser.add_argument("--batch_size", type=int, default=32, help="Number of images per batch.")
    parser.add_argument("--no_speed", action="store_true", help="Do not measure the speed.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Folder for the results.")
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
