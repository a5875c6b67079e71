"""The sections of the records of `speed.py` in the page of results: all of them in short, and each one whole."""

import json
from pathlib import Path
from typing import Any

from cuda_report import title_of
from page_parts import link, row_of, rule, unique


RUNTIMES = {
    "eager": "PyTorch",
    "compiled": "PyTorch, compiled",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-int8": "OpenVINO, 8 bits",
}
HEADINGS = {
    "compiled": ", compiled",
    "onnx": ", in ONNX Runtime",
    "onnx openvino": ", in ONNX Runtime and OpenVINO",
    "onnx openvino openvino-int8": ", in three runtimes",
    "openvino": ", in OpenVINO",
    "openvino openvino-int8": ", in OpenVINO",
    "openvino-int8": ", in 8 bits",
}


def in_short(results: Path) -> list[str]:
    """Show the slowest and the fastest even method in each runtime, one row for each record and batch size."""
    lines = [
        "## Speed on a CPU, in short",
        "",
        "Even methods that keep 65 % of the multiply-adds, on two threads. A cell has the speed-up of the slowest and "
        "of the fastest method over the dense model in the same runtime. In brackets is their speed-up over the dense "
        "model in PyTorch. The sections below have each method. In DeiT-S and ViT-B, SiT has its default layers, "
        "5, 8 and 9. In DeiT-Tiny it has the layer that a share gives it.",
        "",
        f"| model | processor | images at once | {' | '.join(RUNTIMES.values())} |",
        rule(3 + len(RUNTIMES)),
    ]
    for file in sorted(results.glob("speed-*.json")):
        found = json.loads(file.read_text())
        for batch in unique(row["batch_size"] for row in found["rows"]):
            even = [row for row in found["rows"] if row["batch_size"] == batch and _is_even(row)]
            cells = [_range([row for row in even if row["runtime"] == name]) for name in RUNTIMES]
            lines.append(row_of(_size(file, found), _processor(found), str(batch), *cells))
    return lines


def _is_even(row: dict[str, Any]) -> bool:
    return row["method"] is not None and row["tokens"]["min"] == row["tokens"]["max"]


def _range(rows: list[dict[str, Any]]) -> str:
    """The least and the most of the speed-ups of these rows."""
    if not rows:
        return ""
    texts = []
    for key in ("speedup", "speedup_over_first"):
        values = [row[key] for row in rows if row[key] is not None]
        texts.append(f"{min(values):.2f} to {max(values):.2f}" if values else "")
    return texts[0] if rows[0]["runtime"] == "eager" or not texts[1] else f"{texts[0]} ({texts[1]})"


def _size(file: Path, found: dict[str, Any]) -> str:
    return file.stem.removeprefix("speed-").removesuffix("-" + "-".join(found["settings"]["runtimes"]))


def _processor(found: dict[str, Any]) -> str:
    return f"{found['settings']['device']}{' with VNNI' if found.get('vnni') else ''}"


def section(file: Path) -> list[str]:
    """Speed-ups by batch and runtime, beside the dense model and beside the slice oracle of each runtime."""
    found = json.loads(file.read_text())
    settings, rows = found["settings"], found["rows"]
    runtimes, first = list(settings["runtimes"]), RUNTIMES[next(iter(settings["runtimes"]))]
    batches = unique(row["batch_size"] for row in rows)
    names = unique(row["name"] for row in rows)
    size = _size(file, found)
    versions = unique(f"{RUNTIMES[name].split(',')[0]} {it}" for name, it in settings["runtimes"].items())
    which = "--deit_tiny MODEL --images PHOTOS --sizes" if size == "deit-tiny" else f"--sizes {size}"
    which += "" if batches == [1, 8, 32] else f" --batch_sizes {' '.join(map(str, batches))}"
    which += f" --repeats {settings['repeats']} --runtimes {' '.join(runtimes)}"
    more = HEADINGS.get(" ".join(runtimes[1:]), f", {batches[0]} images at once" if len(batches) == 1 else "")
    lines = [
        f"## Speed of {size}{more}",
        "",
        f"{_processor(found)}, {settings['threads']} threads, "
        f"{', '.join([*settings['dtypes'], *versions])}. Medians of {settings['repeats']} repeats. Command: `python "
        f"benchmarks/speed.py {which}` ([record]({link(file)})).",
        "",
        "The first number of a cell is the speed-up over the dense model in the same runtime. The number after the "
        "slash is the speed-up over the dense model in PyTorch. `nothing reduced` is the model that "
        "`reduce_tokens(model, None)` makes: its last layer computes only what the classifier reads."
        + ("" if size == "deit-tiny" else " Weights are random and images are noise, so only even methods are timed."),
    ]
    by_key = {(row["name"], row["batch_size"], row["runtime"]): row for row in rows}
    for batch in batches:
        lines += ["", f"Batch {batch}:", "", f"| method | {' | '.join(RUNTIMES[name] for name in runtimes)} |"]
        lines.append(rule(1 + len(runtimes)))
        for name in names:
            cells = [by_key.get((name, batch, runtime)) for runtime in runtimes]
            lines.append(row_of(title_of(name), *map(_speedups, cells)))
    reasons: dict[str, list[str]] = {}
    for text in found["left_out"]:
        what, _, reason = text.partition(": ")
        reason = reason.replace("its graph takes", "their graphs take").replace("its shapes", "their shapes")
        reasons.setdefault(reason, []).append(title_of(what.split(" in ")[0]))
    lines += [""] if reasons else []
    lines += [
        f"Some cells of {' and '.join(unique(of))} are empty, because {reason}." for reason, of in reasons.items()
    ]
    lines += [
        "",
        "What each model reaches of the speed of its slice oracle, which is the dense model cut to the same numbers "
        f"of tokens at no cost. In brackets is the interval of the speed-up in {first}. The peak memory is that in "
        "PyTorch, divided by the dense model's.",
        "",
        "| method | batch | tokens that leave the last layer | speed-up in "
        f"{first} | peak memory | "
        f"{' | '.join(f'of the oracle, {RUNTIMES[name]}' for name in runtimes)} |",
        rule(5 + len(runtimes)),
    ]
    for batch in batches:
        for name in names:
            row = by_key.get((name, batch, runtimes[0]))
            if row is None or name == "dense":
                continue
            least, mean, most = (row["tokens"][key] for key in ("min", "mean", "max"))
            low, high = row["speedup_interval"]
            lines.append(
                row_of(
                    title_of(name),
                    str(batch),
                    f"{mean:.0f}" if least == most else f"{mean:.0f} ({least:.0f} to {most:.0f})",
                    f"{row['speedup']:.2f} ({low:.2f} to {high:.2f})",
                    _number(row["memory_over_dense"]),
                    *(_number(by_key.get((name, batch, way), {}).get("oracle_share")) for way in runtimes),
                )
            )
    return lines


def _speedups(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    own, over_first = f"{row['speedup']:.2f}", row["speedup_over_first"]
    return own if row["runtime"] == "eager" or over_first is None else f"{own} / {over_first:.2f}"


def _number(value: float | None) -> str:
    return f"{value:.2f}" if value else ""
