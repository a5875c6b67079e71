"""The table and the picture of what `train_table.py` measured.

    python benchmarks/train_report.py benchmarks/results/train-<data>-<model>

Writes `<folder>.md` and `<folder>.png` beside the folder, and prints the table.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hf_tokenreduce.files import write_whole
from hf_tokenreduce.methods import METHODS


START, CONTROL = "start", "dense"
EPOCHS = 3  # of everything but the starts, unless the records say otherwise
RESAMPLES = 40_000
OTHER_START = (
    "\\* The start of this seed was trained once more on another machine, with the same command. Sums are rounded "
    "otherwise there, so these rows begin from other weights than the dense control that they are compared with."
)


def write_report(folder: Path) -> str:
    """Write the table and the picture of a folder of runs, and return the table."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    lines = summarise(rows)
    text = to_markdown(rows, lines)
    write_whole(folder.with_name(folder.name + ".md"), text)
    if any(line["difference"] is not None for line in lines):
        draw(lines, folder.with_name(folder.name + ".png"), folder.name.removeprefix("train-"))
    return text


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per name and share: means over seeds.

    `difference` is the mean over seeds of the accuracy less that of the dense control of the same seed, in points.
    `interval` is its 95 % interval for other images and other seeds: both are drawn anew. `seeds` gives the
    difference of each seed, and `of_seeds` its accuracy.
    """
    controls = {row["seed"]: row for row in rows if row["name"] == CONTROL}
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-(row["share"] or 2), _place(row["name"]), row["seed"])):
        groups.setdefault((row["name"], row["share"]), []).append(row)
    lines = []
    for (name, share), runs in groups.items():
        if len({json.dumps((run.get("settings") or {}).get("layers")) for run in runs}) > 1:
            raise SystemExit(f"The runs of {name} at {share} have different layers, so they have no common mean.")
        paired = [
            (run, controls[run["seed"]]) for run in runs if run["seed"] in controls and name not in (START, CONTROL)
        ]
        line = {
            "name": name,
            "share": share,
            "top1": float(np.mean([run["top1"] for run in runs])),
            "of_seeds": {run["seed"]: run["top1"] for run in runs},
            "mult_adds_ratio": float(np.mean([run["mult_adds_ratio"] for run in runs])),
            "epochs": runs[0]["setting"]["epochs"],
            "layers": runs[0]["settings"]["layers"] if runs[0].get("method") == "sit" else None,
            # Of a run that was resumed, only the time of the rest is known.
            "minutes": float(np.median([run["seconds"] for run in runs if not run.get("resumed")] or [np.nan])) / 60,
            "difference": None,
            "interval": None,
            "seeds": {},
            "num_seeds": len(runs),
            "other_start": any(run.get("start") != control.get("start") for run, control in paired),
        }
        if paired:
            lost = np.array([_right(run) - _right(control) for run, control in paired])
            of_seeds = zip((run["seed"] for run, _ in paired), lost.mean(axis=1), strict=True)
            line["seeds"] = {number: 100 * float(mean) for number, mean in of_seeds}
            line["difference"] = 100 * float(lost.mean())
            line["interval"] = interval(lost)
        lines.append(line)
    return lines


def interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval, in points, of the mean of differences (seeds, images), each -1, 0 or 1, where images and
    seeds are drawn anew. With few seeds, what they add is drawn from few values and so is too small."""
    return _interval(differences.astype(np.int8).tobytes(), *differences.shape, seed)


@cache  # a report is written after each run, and most of its lines are as before
def _interval(content: bytes, seeds: int, images: int, seed: int) -> tuple[float, float]:
    differences = np.frombuffer(content, dtype=np.int8).reshape(seeds, images)
    generator = np.random.default_rng(seed)
    drawn_seeds = np.sort(generator.integers(0, seeds, (RESAMPLES, seeds)), axis=1)
    means = []
    for drawn, times in zip(*np.unique(drawn_seeds, axis=0, return_counts=True), strict=True):
        # The sums over seeds have few values, so drawing images anew is drawing how often each value comes.
        values, images_with = np.unique(differences[drawn].sum(axis=0, dtype=int), return_counts=True)
        means.append(generator.multinomial(images, images_with / images, size=times) @ values / (seeds * images))
    low, high = np.quantile(100 * np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _right(row: dict[str, Any]) -> np.ndarray:
    return np.array([int(one) for one in row["right"]])


def _place(name: str) -> int:
    """Where a name stands in tables: dense models first, then methods, then variants of them."""
    order = [START, CONTROL, *METHODS]
    return order.index(name) if name in order else len(order)


def title_of(name: str) -> str:
    titles = {START: "start (dense)", CONTROL: "dense control"}
    return titles.get(name) or (METHODS[name].title if name in METHODS else name)


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def minutes_of(minutes: float) -> str:
    if np.isnan(minutes):
        return ""
    return f"{minutes:.0f}" if minutes > 2 else f"{minutes:.1f}"


def to_markdown(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> str:
    setting = rows[0]["setting"]
    images = len(rows[0]["right"])
    precision = "bfloat16" if setting["bf16"] else "float32"
    machines = sorted({row["machine"].split(",")[0] for row in rows})
    at_once = max(row.get("jobs", 1) for row in rows)
    beside = f" Up to {at_once} runs shared the machine, so one alone would take less." if at_once > 1 else ""
    epochs = next((line["epochs"] for line in lines if line["name"] != START), EPOCHS)
    title = f"# {setting['model']} trained on {setting['train']}"
    title += "" if epochs == EPOCHS else f" for {epochs} epochs"
    text = [
        f"{title}{', on a GPU' if setting.get('device') == 'cuda' else ''}",
        "",
        f"Top-1 in percent on {images} images of {' and '.join(setting['eval'])}, from which nothing was trained or "
        "chosen. Every row begins with the start of its seed and trains as many epochs as the dense control of its "
        "seed, on the same images in the same order. The difference is to that control, in points, with its interval "
        f"of 95 % for other images and seeds. Trained in {precision} on {' and '.join(machines)}, evaluated "
        "in float32. The minutes are wall time, also of a machine that did other work meanwhile, of runs that were "
        f"not stopped. DL-ViT's first run of a seed also labels its images.{beside} "
        "By `benchmarks/train_table.py`. Its JSON files, one for each run, hold the result of "
        "every image and the commands.",
        "",
        "| model | share asked for | multiply-adds | top-1 | difference | of each seed | epochs | minutes |",
        "|---" * 8 + "|",
    ]
    for line in lines:
        difference = "" if line["difference"] is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(
            line["difference"], *line["interval"]
        )  # fmt: skip
        cells = [
            title_of(line["name"]) + slimmed_after(line) + (" \\*" if line["other_start"] else ""),
            "" if line["share"] is None else f"{line['share']:g}",
            f"{line['mult_adds_ratio']:.2f}",
            f"{line['top1']:.1f}",
            difference,
            ", ".join(f"{value:+.1f}" for value in line["seeds"].values()) or count_of(line["num_seeds"], "seed"),
            f"{line['epochs']}",
            minutes_of(line["minutes"]),
        ]
        text.append(f"| {' | '.join(cells)} |")
    if any(line["other_start"] for line in lines):
        text += ["", OTHER_START]
    filters = [row for row in rows if "filter" in row]
    if filters:
        text += ["", *filter_lines(filters)]
    return "\n".join(text) + "\n"


def slimmed_after(line: dict[str, Any]) -> str:
    """The layers after which SiT slims. They were chosen anew after the first of these runs."""
    layers = line["layers"]
    return "" if layers is None else f", layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def former_slimming(rows: list[dict[str, Any]]) -> list[str]:
    """Say which rows of SiT were trained before it got its present layers and start. They were not run again."""
    if not any(row.get("method") == "sit" and row["setting"]["device"] == "cuda" for row in rows):
        return []
    return ["", "All rows of SiT are older than the present start of its networks and the choice of its layers."]


def filter_lines(rows: list[dict[str, Any]]) -> list[str]:
    """How well DL-ViT's filters rank patches of images that they did not learn from."""
    lines = ["| DL-ViT's filter | images labelled | patches kept | precision | recall |", "|---" * 5 + "|"]
    for row in rows:
        fit = row["filter"]
        lines.append(
            f"| share {row['share']:g}, seed {row['seed']} | {row['labels']['images']} | {fit['share_kept']:.2f} | "
            f"{fit['precision']:.2f} | {fit['recall']:.2f} |"
        )
    return lines


def draw(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Differences to the dense control with their intervals, methods one below the other, a colour per share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for line in lines if line["difference"] is not None]
    names = list(dict.fromkeys(line["name"] for line in sorted(lines, key=lambda line: _place(line["name"]))))
    shares = sorted({line["share"] for line in lines}, reverse=True)
    figure = Figure(figsize=(7, 1.4 + 0.34 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, share in enumerate(shares):
        some = [line for line in lines if line["share"] == share]
        places = [names.index(line["name"]) + 0.16 * (2 * number - len(shares) + 1) for line in some]
        middles = np.array([line["difference"] for line in some])
        low, high = np.array([line["interval"] for line in some]).T
        axis.errorbar(
            middles, places, xerr=[middles - low, high - middles], fmt="o", markersize=5, elinewidth=1,
            color=f"C{number}", label=f"{share:g} of the multiply-adds",
        )  # fmt: skip
    axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(names)), [title_of(name) for name in names])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    axis.set_xlabel("top-1 less that of the dense control trained as long, points")
    axis.set_title(title)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
