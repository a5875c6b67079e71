"""The page of results in the documentation, made from what the benchmarks recorded.

    python benchmarks/results_page.py

Reads `benchmarks/results/`, and writes `docs/results.md`. A record that is not there leaves its section out.
"""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import authors_tome
import claims
import cuda_report
import speed_table
from cuda_report import title_of
from page_parts import ROOT, bold, known, link, row_of, rule, signed, unique, with_interval
from train_report import former_slimming, summarise, to_markdown

from hf_tokenreduce.evaluation.accuracy import wilson_interval
from hf_tokenreduce.files import write_whole


RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
INTRODUCTION = """\
# Results

<!-- Made by python benchmarks/results_page.py. Run it again after a measurement; do not change this page by hand. -->

Every number on this page comes from a record in this repository, and the command that made the record stands above
the table. [The data](data.md) describes the photographs and the weights. [The glossary](glossary.md) explains the
words.

- **Top-1** is the accuracy in percent. The **drop** is the accuracy of the dense model less that of the reduced
  model, in points, so a negative drop is a gain.
- **Same class** is the percentage of the images that get the same class from the reduced model as from the dense one.
- Brackets hold 95 % intervals. Those of accuracies and drops are for other images of the same kind.
- A **speed-up** of 1.5 means 1.5 times as many images per second as the dense model. The models of a table take turns
  in one run. Speed-ups change from machine to machine, so measure on yours.
- **Share** is the share of the multiply-adds of the encoder that is kept.
"""
Table = Callable[[Path], list[str]]


def page(results: Path = RESULTS) -> str:
    """Make the page from the records in a folder."""
    sections: list[tuple[Iterable[Path], Table]] = [
        (results.glob("training-free-*.json"), training_free),
        (results.glob("compare-*.csv"), comparison),
        ([results] if any(results.glob("tune-*.json")) else [], tuned),
        ([results] if any(results.glob("speed-*.json")) else [], speed_table.in_short),
        (results.glob("speed-*.json"), speed_table.section),
        ([results] if any(results.glob("authors-tome-*.json")) else [], authors_tome.table),
        (results.glob("cuda-nvidia-*.json"), lambda file: cuda_report.section(file, link(file))),
        (results.glob("int8-accuracy-*.json"), int8),
        ([results] if any(results.glob("train-*/*.json")) else [], claims.table),
        ((folder for folder in results.glob("**/train-*") if any(folder.glob("*.json"))), trained),
        (results.glob("loader-speed.json"), loader),
        ([results / "trashnet"] if any(results.glob("trashnet/*.json")) else [], trashnet),
    ]
    lines = [INTRODUCTION]
    for files, table in sections:
        for file in sorted(files):
            lines += [*table(file), ""]
    return "\n".join(lines).rstrip() + "\n"


def training_free(file: Path) -> list[str]:
    """Every method without training at equal multiply-adds: accuracy, and closeness to the dense model."""
    found = json.loads(file.read_text())
    lines = [
        "## Without training, at equal multiply-adds",
        "",
        f"Every method got its own setting for the same share, and all saw the same {found['settings']['images']} "
        "photographs. The defaults of protected merging and DiffRate, and the layers in which LTMP's calibration "
        "removes nothing, were chosen on other photographs of the same set. The split of BAT was chosen on the whole "
        "set. Methods that learn from unlabelled images learned from other photographs. Command: "
        "`python benchmarks/training_free_table.py --models MODEL --data_dir PHOTOS`. "
        f"[The longer table]({link(file.with_suffix('.md'))}) also has the divergence from the dense model's "
        "probabilities.",
        "",
        "On so few photographs, top-1 hardly tells the better methods apart; the share of images with the same class "
        "does so better. An empty cell was not measured. ATS can keep less than its share, because the scores of an "
        "image alone decide.",
    ]
    for model in unique(row["model"] for row in found["results"]):
        rows = {(row["method"], row["share"]): row for row in found["results"] if row["model"] == model}
        shares = sorted({share for method, share in rows if method}, reverse=True)
        dense = rows[None, 1.0]
        lines += ["", f"### {model}", "", f"The dense model has {with_interval(dense, 'top1')} % top-1."]
        lines += [
            "",
            f"| method | {' | '.join(f'top-1 and drop at {share}' for share in shares)} |",
            rule(1 + len(shares)),
        ]
        for method in known(method for method, _ in rows):
            lines.append(row_of(title_of(method), *(drop_cell(rows.get((method, share))) for share in shares)))
        lines += [
            "",
            f"| method (bold: the best of a column) | {' | '.join(f'same class at {share}, %' for share in shares)} |",
            rule(1 + len(shares)),
        ]
        best = {
            share: max(row.get("agreement", 0) for (_, at), row in rows.items() if at == share) for share in shares
        }
        for method in known(method for method, _ in rows):
            cells = [rows.get((method, share), {}).get("agreement") for share in shares]
            shown = [
                bold(f"{value:.1f}", value == best[share]) if value else ""
                for value, share in zip(cells, shares, strict=True)
            ]
            lines.append(row_of(title_of(method), *shown))
        lines += training_free_speed([row for row in found["speed"] if row["model"] == model])
    return lines


def training_free_speed(rows: list[dict[str, Any]]) -> list[str]:
    """How much faster than dense the models of the table are, where it was timed."""
    lines = []
    for row in sorted(rows, key=lambda row: -row["share"]):
        lines += [
            "",
            f"Speed-up over dense at {row['share']}, batch {row['batch_size']}, {row['threads']} threads:",
            "",
            "| method | PyTorch | ONNX Runtime |",
            rule(3),
        ]
        ways = (row["eager"], row["onnxruntime"])
        lines += [
            row_of(title_of(method), *(f"{way[method][0]:.2f}" if method in way else "" for way in ways))
            for method in known(row["eager"])
        ]
    return lines


def drop_cell(row: dict[str, Any] | None) -> str:
    if row is None or "top1" not in row:
        return "cannot keep so little" if row else ""
    low, high = row["drop_interval"]
    less = f", keeps {row['kept']:.2f}" if row["kept"] < row["share"] - 0.05 else ""
    return f"{row['top1']:.1f}, {signed(row['drop'])} ({signed(low)} to {signed(high)}){less}"


def comparison(file: Path) -> list[str]:
    """What `tokenreduce compare` measured: accuracy and speed of one model."""
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    lines = [
        "## One model, accuracy and speed",
        "",
        "DeiT-Tiny with its ImageNet weights on 1,000 photographs, without training. LTMP and SiT were calibrated on "
        "100 of these photographs without labels, and two shares of BAT were chosen on them, so these three methods "
        "have an advantage. G is billions of multiply-adds of the whole model: their mean over the images, and their "
        "95th percentile. Command: `tokenreduce compare facebook/deit-tiny-patch16-224 PHOTOS -o comparison`, which "
        "also draws the picture. This is an older record, with seven methods, fixed numbers of samples for ATS, and "
        "the former calibration of LTMP and SiT. Today the command measures more methods, and fits ATS to the shares.",
        "",
        "| setting | top-1 | drop | same class, % | top-5 | share | G, mean and p95 | tokens that leave the last "
        "layer | speed-up, batch 32 |",
        rule(9),
    ]
    for row in rows:
        value = {
            key: float(text)
            for key, text in row.items()
            if key not in ("name", "method", "settings", "skipped") and text
        }
        if "top1" not in value:
            continue
        drop = speedup = ""
        if "drop" in value:
            drop = f"{signed(value['drop'])} ({signed(value['drop_low'])} to {signed(value['drop_high'])})"
            speedup = f"{value['speedup']:.2f} ({value['speedup_low']:.2f} to {value['speedup_high']:.2f})"
        lines.append(
            row_of(
                row["name"],
                f"{value['top1']:.1f} ({value['top1_low']:.1f} to {value['top1_high']:.1f})",
                drop,
                f"{value['agreement']:.1f}" if "agreement" in value else "",
                f"{value['top5']:.1f}",
                f"{value['mult_adds_ratio']:.2f}",
                f"{value['multiply_adds'] / 1e9:.2f}, {value['multiply_adds_p95'] / 1e9:.2f}",
                f"{value['tokens']:.0f}",
                speedup,
            )
        )
    return [*lines, "", "![Accuracy against multiply-adds, and against speed](images/compare.png)"]


def tuned(results: Path) -> list[str]:
    """What the tuner chose, beside the best single default."""
    lines = [
        "## What the tuner finds",
        "",
        "The tuner searched on one half of the photographs, and this table was measured on the other half, so a drop "
        "can be above its target. The best default is the best of the searched methods as they come, at the same "
        "share. The rows with 6 methods are older: Protected and five others were not there yet, and LTMP had its "
        "former calibration. Command: `python "
        "benchmarks/tune.py --models MODEL --data_dir PHOTOS --work_dir FOLDER`. For the targets without a speed-up, "
        "`--no_speed` was added.",
        "",
        "| model | target | chosen | share | drop | best default | its drop | methods searched | settings tried "
        "| minutes |",
        rule(10),
    ]
    for file in sorted(results.glob("tune-*.json")):
        found = json.loads(file.read_text())
        default = next((row for row in found["rows"] if "default" in row["roles"]), None)
        target = found["target"]
        kinds = {"share": "share {:g}", "max_drop": "drop at most {:g}", "speedup": "speed-up {:g}"}
        same = default is not None and default["name"] == found["chosen"]["name"]
        lines.append(
            row_of(
                found["model"],
                kinds[target["kind"]].format(target["value"]),
                found["chosen"]["name"],
                f"{found['chosen']['mult_adds_ratio']:.2f}",
                tuned_drop(found["chosen"]),
                "the same" if same else "" if default is None else default["name"],
                "" if same or default is None else tuned_drop(default),
                str(len(found["methods"])),
                str(found["tried"]),
                f"{found['seconds'] / 60:.0f}",
            )
        )
    return lines


def tuned_drop(row: dict[str, Any]) -> str:
    if row.get("drop") is None:
        return ""
    return f"{signed(row['drop'])} ({signed(row['drop_interval'][0])} to {signed(row['drop_interval'][1])})"


def loader(file: Path) -> list[str]:
    """How fast images come, and how fast training takes them."""
    found = json.loads(file.read_text())
    settings = found["settings"]
    lines = [
        "## Images per second in training",
        "",
        f"{settings['threads']} CPU threads, {settings['model']}, batches of {settings['batch_size']}, augmentation "
        f"`{settings['augmentation']}`, PyTorch {settings['torch']}, share {settings['share']:g}. Command: `python "
        f"benchmarks/loader_speed.py --model_name_or_path MODEL --train_dir IMAGES` ([record]({link(file)})).",
        "",
        "| what | images per second |",
        rule(2),
    ]
    for count, rate in found["loader"].items():
        lines.append(row_of(f"the loader alone, number of workers {count}", f"{rate:.0f}"))
    lines += [row_of(f"the training step, {title_of(name)}", f"{rate:.0f}") for name, rate in found["step"].items()]
    return lines


def int8(file: Path) -> list[str]:
    """What 8 bits cost in accuracy."""
    found = json.loads(file.read_text())
    model = file.stem.removeprefix("int8-accuracy-")
    lines = [
        "## Accuracy in 8 bits",
        "",
        f"{model} as a graph of OpenVINO in 8 bits, beside the same model in float32, on {found['images']} "
        f"photographs. The reduced models keep a share of {found['share']}. Command: `python "
        f"benchmarks/int8_accuracy.py MODEL PHOTOS` ([record]({link(file)})).",
        "",
        "| method | top-1 in float32 | top-1 in 8 bits | points lost by 8 bits | same class in both, % |",
        rule(5),
    ]
    for name, row in found["rows"].items():
        low, high = row["interval"]
        lost = row["float32"] - row["int8"]
        lines.append(
            row_of(
                title_of(name),
                f"{row['float32']:.1f}",
                f"{row['int8']:.1f}",
                f"{signed(lost)} ({signed(low)} to {signed(high)})",
                f"{row['same_class']:.1f}",
            )
        )
    return lines


def trained(folder: Path) -> list[str]:
    """The table of one folder of training runs, as `train_report.py` makes it."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    title, *text = to_markdown(rows, summarise(rows)).rstrip().splitlines()
    lines = [f"## After training: {title.removeprefix('# ')}", *text, *former_slimming(rows)]
    picture = folder.with_name(folder.name + ".png")
    return [*lines, "", f"![Differences to the dense control]({link(picture)})"] if picture.is_file() else lines


def trashnet(folder: Path) -> list[str]:
    """The first runs on TrashNet, each with one seed."""
    records = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    first = next(iter(records.values()))
    lines = [
        "## After training: the first runs",
        "",
        f"Each method began with the same fine-tuned dense model, and was measured on {first['eval_images']} images. "
        "There is one seed each, and no dense model that was trained for as many more epochs. So these runs show that "
        "a reduced model can keep the accuracy. They do not show which method is best. The speed-ups are those of one "
        f"shared machine ({first['machine']}, batch {first['speed_batch_size']}). There the dense model measured "
        "against itself gave the value in its row, so differences of a tenth mean little. The records have the "
        "commands.",
        "",
        "| model | share | epochs | top-1 | speed-up |",
        rule(5),
    ]
    for name, row in sorted(records.items(), key=lambda item: (-item[1]["mult_adds_ratio"] // 0.1, item[0])):
        low, high = wilson_interval(row["top1"] / 100 * row["eval_images"], row["eval_images"])
        called = name.removeprefix("deit-tiny-trashnet-")
        lines.append(
            row_of(
                f"[{called}]({link(folder)}/{name}.json)",
                f"{row['mult_adds_ratio']:.2f}",
                f"{row['epochs']:g}",
                f"{row['top1']:.1f} ({low:.1f} to {high:.1f})",
                f"{row['speedup']:.2f}" if row["speedup"] else "",
            )
        )
    return [
        *lines,
        "",
        "In the names of the SiT models, `plain` means without distillation, `logits` means with distillation of the "
        "logits alone, and `random-start` means that the slimming networks began with random weights and were not "
        "calibrated.",
    ]


if __name__ == "__main__":
    write_whole(PAGE, page())
    print(f"Written to {PAGE}.")
