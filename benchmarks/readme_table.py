"""The table of methods in README.md, made from what the benchmarks recorded.

    python benchmarks/readme_table.py

Puts the table between its two marks in README.md. The texts are here; every number comes from `benchmarks/results/`.
"""

import json
from pathlib import Path
from typing import Any

from train_report import summarise

from hf_tokenreduce.files import write_whole
from hf_tokenreduce.methods import METHODS


ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- tokenreduce:begin table -->", "<!-- tokenreduce:end table -->"
MODEL, SHARE, BATCH = "deit-tiny-patch16-224", 0.65, 8
TRAINED = RESULTS / f"train-trashnet224-{MODEL}-cuda"
NEWER = RESULTS / f"train-trashnet224-{MODEL}"  # on a CPU, for SiT, whose layers were chosen anew since

# What it needs, and when to take it.
TEXTS = {
    "tome": ("nothing", "For a first try, with any model and image size."),
    "protected": ("nothing", "When nothing is trained. It is our own."),
    "bat": ("nothing", "A published method, trained or not."),
    "evit": ("fine-tuning", "When you fine-tune anyway, and speed counts."),
    "sit": ("long fine-tuning", "When you can train for long."),
    "dlvit": ("labelled images, fine-tuning", "When you can train, and memory counts."),
    "ats": ("unlabelled images", "When some images need fewer tokens than others."),
    "ltmp": ("unlabelled images", "Like ATS, when nothing is trained. It is slower."),
}


def readme_table() -> str:
    """Make the table from the records."""
    free = json.loads((RESULTS / "training-free-odd.json").read_text())["results"]
    drops = {row["method"]: row for row in free if row["model"] == MODEL and row["share"] == SHARE and "drop" in row}
    file = next(iter(sorted(RESULTS.glob("speed-deit-tiny-eager-onnx*.json"))))
    speeds = {(row["method"], row["runtime"]): row for row in _of_batch(json.loads(file.read_text())["rows"])}
    trained = _trained(TRAINED) | {"sit": _trained(NEWER)["sit"]}
    lines = [
        "| method | drop of top-1, points | drop, trained | faster, PyTorch | faster, ONNX Runtime "
        "| for good accuracy it needs | take it |",
        "|" + "---|" * 7,
    ]
    for name, (needs, when) in TEXTS.items():
        cells = [
            f"[{METHODS[name].title}](docs/methods/{name}.md)",
            _with_spread(drops[name]["drop"], drops[name]["drop_interval"]) if name in drops else "",
            _of_training(trained[name]) if name in trained else "",
            *(f"{speeds[name, way]['speedup']:.2f}" if (name, way) in speeds else "" for way in ("eager", "onnx")),
            needs,
            when,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _trained(folder: Path) -> dict[str, dict[str, Any]]:
    runs = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return {line["name"]: line for line in summarise(runs) if line["share"] == SHARE}


def _of_training(line: dict[str, Any]) -> str:
    return _with_spread(-line["difference"], line["interval"]) + ("\\*" if line["other_start"] else "")


def _with_spread(drop: float, interval: list[float]) -> str:
    low, high = interval
    return f"{drop:.1f}±{(high - low) / 2:.1f}"


def _of_batch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["batch_size"] == BATCH]


def with_table(text: str) -> str:
    """Put the table between the marks of a text."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    write_whole(README, with_table(README.read_text()))
    print(readme_table())
