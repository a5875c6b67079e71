"""The table of several model cards, made from their records."""

from typing import Any

from ..methods import DENSE, METHODS
from .card_text import plain
from .records import Record, accuracy, drop, duration, measured_on, number


def index_of(records: dict[str, Record]) -> str:
    """Make the table of several cards. records: the record of each card by the name of its file."""
    head = ["method", "base model", "data", "multiply-adds", "top-1, 95 % interval", "before"]
    with_control = any(record.get("control_top1") is not None for record in records.values())
    head += ["dense, trained as long"] if with_control else []
    head += ["lost", "speed-up", "epochs", "time", "seed"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]

    def order(item: tuple[str, Record]) -> tuple[Any, ...]:
        stem, record = item
        group = (record.get("base_model") or "", record.get("dataset") or "", record["method"] is not None)
        return (*group, record["method"] or "", -(record.get("mult_adds_ratio") or 0), stem)

    for stem, record in sorted(records.items(), key=order):
        dense = record["method"] is None
        cells = [
            f"[{(METHODS[record['method']] if record['method'] else DENSE).title}](<{stem}.md>)",
            plain(record.get("base_model") or ""),
            plain(measured_on(record) or ""),
            number(record, "mult_adds_ratio", 2),
            accuracy(record),
            None if dense or record.get("baseline_top1") is None else f"{record['baseline_top1']:.1f} %",
            *([record.get("control_top1") and f"{record['control_top1']:.1f} %"] if with_control else []),
            None if dense else drop(record),
            None if dense else number(record, "speedup", 2),
            None if record.get("epochs") is None or record.get("streamed_images") else f"{record['epochs']:g}",
            duration(record.get("seconds")),
            None if record.get("seed") is None else str(record["seed"]),
        ]
        lines.append(f"| {' | '.join(cell or '' for cell in cells)} |")
    table = "\n".join(lines)
    return (
        "# Models\n\n<!-- tokenreduce:begin table -->\n"
        "Multiply-adds and speed-up are compared with the dense model. *Before* is its top-1 before reduction and "
        "training. *Lost*: how many points of top-1 the model is below the dense model that was trained as long. "
        "Where there is none: below the model before. What was not measured is left empty.\n\n"
        f"{table}\n<!-- tokenreduce:end table -->\n"
    )
