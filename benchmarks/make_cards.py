"""Make the cards in `model_cards/` from the runs of `train_table.py`: one per method, at its best setting.

    python benchmarks/make_cards.py

The best setting of a method is the smallest share at which it loses at most one point to the dense control, as the
mean over seeds; if there is none, the largest share. The card is that of the first seed. It names the one command
that makes the weights again.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from train_report import CONTROL, START, summarise
from train_table import METHODS as TRAINED

from hf_tokenreduce.hub import write_cards
from hf_tokenreduce.methods import METHODS


ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "benchmarks" / "results" / "train-trashnet224-deit-tiny-patch16-224"
CARDS = ROOT / "model_cards"
PREFIX = "deit-tiny-trashnet-"
MOST_LOST = 1.0


def main(runs: Path = RUNS, cards: Path = CARDS) -> None:
    rows = {(row["name"], row["share"], row["seed"]): row for row in map(read, sorted(runs.glob("*.json")))}
    lines = [line for line in summarise(list(rows.values())) if line["difference"] is not None]
    for old in cards.glob("*.md"):
        if old.stem.startswith(PREFIX):
            old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        for name in METHODS:
            share = best_share([line for line in lines if line["name"] == name])
            if share is None:
                continue
            seed = min(seed for other, at, seed in rows if (other, at) == (name, share))
            record = as_record(rows[name, share, seed], rows[START, None, seed], rows.get((CONTROL, None, seed)))
            (Path(folder) / f"{PREFIX}{name}.json").write_text(json.dumps(record))
        written = write_cards(folder, cards, base_license="apache-2.0", base_model="facebook/deit-tiny-patch16-224")
    print("\n".join(str(path.relative_to(cards)) for path in written))


def read(file: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(file.read_text())
    return row


def best_share(lines: list[dict[str, Any]]) -> float | None:
    """The smallest share that loses at most `MOST_LOST` points; of none, the largest share; None without lines."""
    good = [line["share"] for line in lines if line["difference"] >= -MOST_LOST]
    return min(good) if good else max((line["share"] for line in lines), default=None)


def as_record(row: dict[str, Any], start: dict[str, Any], control: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `hf_tokenreduce.hub` makes a card of. start: the dense model that the training began with. control: the
    dense model that was trained as long."""
    setting, images = row["setting"], len(row["right"])
    which = f"--methods {row['name']} --variants" if row["name"] in TRAINED else f"--methods --variants {row['name']}"
    others = {"epochs": 3, "start_epochs": 4, "label_images": 250, "max_train_samples": None, "device": "cpu"}
    values = {name: setting.get(name) for name in others}
    which += "".join(f" --{name} {value}" for name, value in values.items() if value not in (None, others[name]))
    which += " --bf16" if setting["bf16"] and setting["device"] == "cpu" else ""
    command = (
        f"python benchmarks/train_table.py --model_name_or_path {setting['model']} --train_dir {setting['train']} "
        f"--eval_dirs {' '.join(setting['eval'])} --work_dir train-table {which} "
        f"--shares {row['share']:g} --seeds {row['seed']} --output_dir train-table/results"
    )
    return {
        "method": row["method"], "settings": row["settings"], "base_model": setting["model"],
        "dataset": setting["train"], "eval_dataset": " and ".join(setting["eval"]), "eval_images": images,
        "top1": row["top1"], "baseline_top1": start["top1"], "control_top1": control and control["top1"],
        "mult_adds_ratio": row["mult_adds_ratio"],
        "tokens_per_layer": row["tokens_per_layer"], "epochs": setting["epochs"], "seed": row["seed"],
        "command": command, "machine": row["machine"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
