"""What the papers claim, beside what is measured here. `results_page.py` puts this table into the documentation.

    python benchmarks/claims.py

A claim whose record is not there is told as not measured.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from train_report import START, summarise


RESULTS = Path(__file__).resolve().parent / "results"
TRAINED = "train-trashnet224-deit-tiny-patch16-224"
MODELS = {"deit-tiny-patch16-224": "DeiT-Tiny", "vit-tiny-patch16-224": "ViT-Tiny"}
NOT_MEASURED = "not measured"
TRAIN = "train_table.py"
FREE = "training_free_table.py"


Trained = dict[tuple[str, float | None], dict[str, Any]]


class Records(NamedTuple):
    """What is on record.

    trained: by device, lines of `train_report.summarise`, by name and share. free: rows of the training-free table, by
    model, method and share. ranking: record of `rank_patches.py`. speed: rows of `speed.py`, by name, batch size and
    runtime.
    """

    trained: dict[str, Trained]
    free: dict[tuple[str, str | None, float], dict[str, Any]]
    ranking: dict[str, Any]
    speed: dict[tuple[str, int, str], dict[str, Any]]


FORMER = ", with its former layers and start"  # these records were not made again


class Claim(NamedTuple):
    """method and claim: whose paper says what, with its number. here: what the records say, or None. script: the
    script of `benchmarks/` that made the records."""

    method: str
    claim: str
    here: Callable[[Records], str | None]
    script: str


def read(results: Path = RESULTS) -> Records:
    trained = {}
    folders = {"GPU": f"{TRAINED}-cuda", "CPU": TRAINED, "CPU for {} epochs": f"trained-longer/{TRAINED}"}
    for device, folder in folders.items():
        runs = [json.loads(file.read_text()) for file in sorted((results / folder).glob("*.json"))]
        if runs:
            trained[device.format(runs[0]["setting"]["epochs"])] = {
                (line["name"], line["share"]): line for line in summarise(runs)
            }
    free = [row for file in results.glob("training-free-*.json") for row in json.loads(file.read_text())["results"]]
    ranked = sorted(results.glob("rank-patches-*.json"))
    timed = sorted(results.glob("speed-deit-tiny-eager-onnx*.json"))[:1]  # the same as in the README
    speeds = [row for file in timed for row in json.loads(file.read_text())["rows"]]
    return Records(
        trained,
        {(row["model"], row["method"], row["share"]): row for row in free},
        json.loads(ranked[0].read_text()) if ranked else {},
        {(row["name"], row["batch_size"], row["runtime"]): row for row in speeds},
    )


def after_training(
    name: str, *shares: float, other: str | None = None, given: str = ""
) -> Callable[[Records], str | None]:
    """The difference of a trained model to the dense control, and that of another one beside it. given: what to say
    of the line before."""

    def here(records: Records) -> str | None:
        parts = [
            f"{text} on a {device}{FORMER if name == 'sit' and device == 'GPU' else ''}"
            for share in shares
            for device, trained in records.trained.items()
            if (text := _beside(trained, name, share, other)) is not None
        ]
        return f"{given}points to the dense control: {'; '.join(parts)}" if parts else None

    return here


def _beside(trained: Trained, name: str, share: float, other: str | None) -> str | None:
    lines = [trained.get((one, share)) for one in (name, other) if one is not None]
    if any(line is None or line["difference"] is None for line in lines):
        return None
    # Two lines are compared on the seeds that both have. The intervals are those of all seeds of a line.
    seeds = set.intersection(*(set(line["seeds"]) for line in lines if line))
    if not seeds:
        return None
    texts = [
        "{:+.1f} ({:+.1f} to {:+.1f})".format(line["difference"], *line["interval"])
        if set(line["seeds"]) == seeds
        else f"{mean(line['seeds'][seed] for seed in seeds):+.1f}"
        for line in lines
        if line
    ]
    kept = lines[0]["mult_adds_ratio"] if lines[0] else share
    beside = f", and {other} {texts[1]}" if other is not None else ""
    beside += r" \*" if any(line["other_start"] for line in lines if line) else ""
    return f"at {kept:.2f} {texts[0]}{beside}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def thresholds_alone(records: Records) -> str | None:
    """LTMP's difference to the model that its training began with, because its backbone learns nothing."""
    gained = []
    for device, trained in records.trained.items():
        line, start = trained.get(("ltmp", 0.65)), trained.get((START, None))
        if line is not None and start is not None and set(line["of_seeds"]) <= set(start["of_seeds"]):
            points = mean(line["of_seeds"][seed] - start["of_seeds"][seed] for seed in line["of_seeds"])
            gained.append(f"{points:+.1f} on a {device}")
    told = f"points to the start, because the backbone is frozen: {'; '.join(gained)}; "
    return after_training("ltmp", 0.65, given=told)(records) if gained else None


def untrained(method: str, others: list[str], shares: list[float]) -> Callable[[Records], str | None]:
    """The share of images with the dense model's class, of a method and of others at the same multiply-adds."""

    def here(records: Records) -> str | None:
        parts = []
        for model, called in MODELS.items():
            for share in shares:
                rows = {one: records.free.get((model, one, share)) for one in (method, *others)}
                if any(row is None or "agreement" not in row for row in rows.values()):
                    continue
                shown = ", ".join(f"{one} {row['agreement']:.1f}" for one, row in rows.items() if row)
                parts.append(f"{called} at {share:g}: {shown}")
        return "same class in %, without training: " + "; ".join(parts) if parts else None

    return here


def ranking(records: Records) -> str | None:
    if not records.ranking:
        return None
    rows = records.ranking["rows"]
    attention = {name: row for name, row in rows.items() if name.startswith("class attention")}
    best = max(attention, key=lambda name: attention[name]["auc"])
    own = rows["filter"]
    return (
        f"AUC {own['auc']:.2f} ({own['auc_interval'][0]:.2f} to {own['auc_interval'][1]:.2f}), precision "
        f"{own['precision']:.2f}; the best {best}: {attention[best]['auc']:.2f}, {attention[best]['precision']:.2f}; "
        f"chance: 0.50, {records.ranking['share_to_keep']:.2f}"
    )


def faster(name: str, batch: int = 32) -> Callable[[Records], str | None]:
    """How much faster a model of about 0.65 is than dense in PyTorch, beside its accuracy after training."""

    def here(records: Records) -> str | None:
        row, trained = records.speed.get((name, batch, "eager")), after_training(name, 0.65)(records)
        return None if row is None or trained is None else f"{row['speedup']:.2f} times, and {trained}"

    return here


CLAIMS = [
    Claim("DL-ViT", "after fine-tuning, as accurate as dense", after_training("dlvit", 0.65, 0.45), TRAIN),
    Claim("DL-ViT", "its filter finds the patches that matter", ranking, "rank_patches.py"),
    Claim("ATS", "DeiT-S loses 0.1 points at 0.63 after fine-tuning", after_training("ats", 0.65), TRAIN),
    Claim("ATS", "adaptive beats Top-K at equal mean cost", after_training("ats", 0.65, 0.45, other="topk"), TRAIN),
    Claim("ATS", "adaptive beats Top-K, untrained", untrained("ats", ["topk"], [0.65, 0.5]), FREE),
    Claim("LTMP", "DeiT-T loses 0.2 at 0.8, 0.7 at 0.6, one epoch", thresholds_alone, TRAIN),
    Claim("LTMP", "ahead of ToMe and of pruning at equal cost", untrained("ltmp", ["tome", "topk"], [0.8, 0.65, 0.5]),
          FREE),
    Claim("LTMP", "merging and pruning beat merging alone",
          after_training("ltmp", 0.65, 0.45, other="ltmp-merge-only"), TRAIN),
    Claim("LTMP", "merging and pruning beat pruning alone",
          after_training("ltmp", 0.65, 0.45, other="ltmp-prune-only"), TRAIN),
    Claim("BAT", "DeiT-S loses 0.2 at 0.65", after_training("bat", 0.65), TRAIN),
    Claim("BAT", "DeiT-T gains 0.1 at 0.6", after_training("bat", 0.65), TRAIN),
    Claim("BAT", "clustering helps", after_training("bat", 0.65, 0.45, other="bat-no-clusters"), TRAIN),
    Claim("BAT", "matching helps", after_training("bat", 0.65, 0.45, other="bat-no-matching"), TRAIN),
    Claim("BAT", "two groups beat one", after_training("bat", 0.65, 0.45, other="bat-one-group"), TRAIN),
    Claim("SiT", "1.7 times as fast with a negligible loss", faster("sit"), TRAIN),
    Claim("SiT", "3.6 times as fast with 97 % of the accuracy", after_training("sit", 0.28), TRAIN),
    Claim(
        "SiT",
        "distillation (FRD) helps",
        after_training("sit-three-networks", 0.28, other="sit-no-teacher"),
        TRAIN,
    ),
    Claim("ToMe", "DeiT-S loses 0.4 at 0.6, trained", after_training("tome", 0.65), TRAIN),
]  # fmt: skip


def table(results: Path = RESULTS) -> list[str]:
    """The lines of the section."""
    records = read(results)
    lines = [
        "## What the papers claim",
        "",
        "The papers measured on ImageNet after training for many epochs. Here, DeiT-Tiny was trained for 3 epochs, "
        "if no other number is named, on 1,768 photographs of TrashNet, and the dense control for as many. What needs "
        "no training was measured on photographs with ImageNet labels. So a claim that holds here is not proved, and "
        "one that fails is not refuted. *Start* is the dense model that training began with. Points are differences "
        "of top-1; in brackets is the interval of 95 % for other images and, where there are several, for other "
        "seeds. \\* began with a start that was trained once more than that of the control, as the next tables say.",
        "",
        "| method | the paper says | here | by |",
        "|---" * 4 + "|",
    ]
    for claim in CLAIMS:
        here = claim.here(records) or NOT_MEASURED
        lines.append(f"| {claim.method} | {claim.claim} | {here} | `benchmarks/{claim.script}` |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
