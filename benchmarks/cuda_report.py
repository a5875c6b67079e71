"""What `cuda_device.py` found, as a table of its own and as a section of the page of results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hf_tokenreduce.methods import METHODS


CHECKED_IMAGES = 8  # on which the device is compared with the CPU
TITLES = {"dlvit": "DL-ViT with `threshold`", "dlvit-even": "DL-ViT with `keep_rate`"}


def table(found: dict[str, Any], meanings: dict[str, str]) -> str:
    """Write all results as Markdown. meanings: what each part checks or measures."""
    lines = [f"# {found['device']}", "", f"torch {found['torch']}, transformers {found['transformers']}, "
             f"{found['date']}. By `benchmarks/cuda_device.py`.", ""]  # fmt: skip
    for part, rows in found["parts"].items():
        lines += [f"## {part}", "", meanings[part], ""]
        if part.startswith("speed"):
            lines += ["| | model | ms | over dense | of the oracle | peak over dense |", "|---|---|---|---|---|---|"]
            for row in rows:
                for one in row.get("found", ()):
                    oracle, memory = (_short(one[key] or "") for key in ("oracle_share", "memory_over_dense"))
                    low, high = one["speedup_interval"]
                    lines.append(
                        f"| {row['key']} | {one['name']} | {one['p50_ms']:.2f} | {one['speedup']:.2f} "
                        f"({low:.2f}-{high:.2f}) | {oracle} | {memory} |"
                    )
        else:
            for row in rows:
                told = ", ".join(f"{key} {_short(value)}" for key, value in row.get("found", {}).items())
                lines.append(f"- {row['key']}: {told or 'FAILED'}")
        lines += [f"- {row['key']}: {row['failed']}" for row in rows if "failed" in row]
        lines.append("")
    lines += [f"- **{part}: {why}**" for part, why in found["stopped"].items()]
    return "\n".join(lines).rstrip()


def section(file: Path, link: str) -> list[str]:
    """The section on one GPU, for the page of results."""
    found = json.loads(file.read_text())
    parts = {
        part: {row["key"]: row["found"] for row in rows if "found" in row} for part, rows in found["parts"].items()
    }
    lines = [
        f"## On a GPU: {found['device']}",
        "",
        f"torch {found['torch']}, transformers {found['transformers']}, bfloat16, random weights. Command: "
        f"`python benchmarks/cuda_device.py --minutes {found['minutes']:g}` ([record]({link})).",
        "",
        *_facts(parts),
    ]
    for part, title in (("speed_recorded", "Recorded as one CUDA graph"), ("speed", "In PyTorch as it is")):
        cells = parts.get(part, {})
        for newer in (False, True):
            some = {key: found for key, found in cells.items() if key.endswith("newer methods") == newer}
            if some:
                lines += ["", *_speeds(title, some)]
    failed = [row["key"] for rows in found["parts"].values() for row in rows if "failed" in row]
    if failed:
        lines += ["", f"These failed: {'; '.join(failed)}."]
    if found["stopped"]:
        lines += ["", f"The time ended before these parts were whole: {', '.join(found['stopped'])}."]
    return lines


def largest(errors: Iterable[float]) -> float:
    """Return the largest error, which is NaN if one of them is: Python's `max` would pass over it."""
    return float(np.max(list(errors)))


def _facts(parts: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    exact = {key.split(",")[0]: one for key, one in parts.get("correct", {}).items() if key.endswith("float32")}
    if exact:
        differing = [name for name, one in exact.items() if one.get("same_tokens", 1) < 1]
        worst = largest(one.get("error_of_same", one["error"]) for one in exact.values())
        lines.append(
            f"- **Correct.** In float32, {len(exact) - 1} methods and the dense model give the CPU's logits: the "
            f"largest difference is {worst:.0e} of the largest logit."
        )
        recorded = [one["recorded"] for one in parts["correct"].values() if "recorded" in one]
        if recorded:
            lines[-1] += f" Recorded models give the eager logits: the largest difference is {largest(recorded):.0e}."
        if differing:
            alike = min(exact[name]["same_tokens"] for name in differing)
            lines[-1] += (
                f" {' and '.join(map(_title, differing))} kept other tokens in {CHECKED_IMAGES * (1 - alike):.0f} of "
                f"{CHECKED_IMAGES} images, which are not counted in the difference."
            )
    waits = parts.get("waits", {})
    if waits:
        waiting = [f"{_title(name)} {one['waits']}" for name, one in waits.items() if one["waits"]]
        lines.append(
            "- **Waiting.** How often the host waits for the GPU in one forward of "
            f"{next(iter(waits.values()))['layers']} layers: "
            f"{', '.join([*waiting, 'all others never' if waiting else 'never'])}."
        )
    compiled = parts.get("compiled", {})
    if compiled:
        speeds = [
            f"{_title(key.split(', ')[-1])} {one['of_oracle']:.2f} ({one['over_eager']:.2f})"
            for key, one in compiled.items()
        ]
        worst = largest(one["error"] for one in compiled.values())
        slowest = max(one["seconds_to_compile"] for one in compiled.values())
        graphs, cell = max(one["graphs"] for one in compiled.values()), next(iter(compiled)).split(", ")[:2]
        lines.append(
            f"- **Compiled**, by `torch.compile(mode='reduce-overhead')`. Ready in time: "
            f"{' and '.join(_title(key.split(', ')[-1]) for key in compiled)}, with {graphs} graph for three batches, "
            f"in at most {slowest:.0f} s. Its logits differ from the eager ones by at most {worst:.3f} of the largest "
            "logit, in bfloat16. The part of the compiled slice oracle's speed, and in brackets the speed-up over the "
            f"same model in PyTorch as it is, for {', '.join(cell)}: {', '.join(speeds)}."
        )
    # With fewer images the time of the host counts too.
    weighing, merging = (
        [one for key, one in parts.get(part, {}).items() if key.startswith("batch 256")]
        for part in ("weighing", "merging")
    )
    if weighing:
        channels = _range(one["channels_over_mask"] for one in weighing)
        mask = _range(one["mask_ms"] / one["own_128_32_ms"] for one in weighing)
        lines.append(
            "- **Sizes of merged tokens.** In torch's attention a mask costs less time than extra channels of the "
            f"heads: with 256 images the channels take {channels} times as long. The mask takes {mask} times as long "
            "as our own kernel, which `sdpa` uses in half precision where no gradient is needed."
        )
    if merging:
        lines.append(
            "- **Merging.** With 256 images sums in float32 take "
            f"{_range(one['sums_over_product'] for one in merging)} times as long as one product in half precision, "
            "which is used there if there are not more tokens than features."
        )
    memory = [one["memory_over_dense"] for cell in parts.get("speed", {}).values() for one in cell[1:]]
    memory = [one for one in memory if one is not None]
    if memory:
        lines.append(f"- **Memory.** The peak of a forward is {min(memory):.2f} to {max(memory):.2f} of dense.")
    return lines


def _speeds(title: str, cells: dict[str, Any]) -> list[str]:
    keys = sorted(cells, key=_size_and_batch)
    names = list(dict.fromkeys(one["name"] for cell in cells.values() for one in cell))
    by_name = {key: {one["name"]: one for one in cell} for key, cell in cells.items()}
    lines = [
        f"{title}, the speed-up over dense and, in brackets, the part of the slice oracle's speed.",
        "",
        "| method | " + " | ".join(", ".join(key.split(", ")[:2]) for key in keys) + " |",
        "|" + "---|" * (len(keys) + 1),
    ]
    dense = [f"{cells[key][0]['p50_ms']:.1f}" for key in keys]
    lines.append(f"| dense, ms | {' | '.join(dense)} |")
    for name in names[1:]:
        row = [by_name[key].get(name) for key in keys]
        told = ["" if one is None else f"{one['speedup']:.2f} ({one['oracle_share']:.2f})" for one in row]
        lines.append(f"| {_title(name)} | {' | '.join(told)} |")
    return lines


def _size_and_batch(key: str) -> tuple[Any, ...]:
    """Order cells such as "DeiT-S, batch 8, bfloat16" by the model, and then by the number of images."""
    model, batch = key.split(", ")[:2]
    return model, int(batch.split()[-1])


def _range(values: Iterable[float]) -> str:
    numbers = sorted({f"{value:.1f}" for value in values}, key=float)
    return " to ".join(dict.fromkeys((numbers[0], numbers[-1])))


def title_of(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


def _title(name: str) -> str:
    return TITLES.get(name) or title_of(name)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
