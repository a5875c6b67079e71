"""The results of the demonstration: a table, and a page with the table and the pictures."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..methods import METHODS
from ..tuning.report import ROLES


NAMES = {"dense": "dense", **{name: method.title for name, method in METHODS.items()}}
COLUMNS = ("method", "trained", "top-1 %", "drop", "tokens leaving", "multiply-adds", "speed-up", "of the ideal")
TUNED_COLUMNS = ("setting", "role", "top-1 %", "drop", "multiply-adds", "speed-up")

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Demonstration of token reduction</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #444; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
pre { background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; font-size: .9rem; } a { color: #1b4f9c; }
</style>
</head>
<body>
<h1>Demonstration of token reduction</h1>
<p>A small vision transformer was trained on drawn images. Each shows one shape on a cluttered background, so most
patches do not help to find the class. Then every method made the model process fewer tokens.</p>
<p>The accuracy was measured on {{ images }} images that no model was trained on. The numbers in parentheses are
95&nbsp;% intervals. Those of the drop compare both models on the same images. The ideal is a dense model whose
sequence is cut to the same lengths at no cost.</p>
<div class="scroll"><table>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>{% for cell in row.cells %}<td>{% if loop.first and row.page %}<a href="{{ row.page }}">\
{{ cell }}</a>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p>Click on a method to see what it did to single images.</p>
<h2>Accuracy against cost</h2>
<figure><img src="{{ pareto }}" alt="Accuracy of every method against its multiply-adds and its speed"></figure>
<h2>What the tuner found</h2>
<p>The tuner chose <b>{{ tuned.chosen.name }}</b>.{% if tuned.why %} {{ tuned.why }}{% endif %} It tried
{{ tuned.tried }} settings of {{ tuned.methods | length }} methods on {{ tuned.images.search }} of the images, without
training. The table shows the results on the other {{ tuned.images.report }} images, which the search did not use:</p>
<div class="scroll"><table>
<thead><tr>{% for column in tuned_columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in tuned_rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<h2>The tokens that are left of an image</h2>
{% for picture in pictures %}<figure><img src="{{ picture }}" alt="An image and its tokens by each method"></figure>
{% endfor %}<p>Faded patches were dropped. Each outlined area became one token and is filled with its mean colour.</p>
<h2>Load a model</h2>
<p>The folders of the methods are beside this page. Each holds weights, code and a model card, and loads without this
package:</p>
<pre>from transformers import pipeline
classify = pipeline("image-classification", model="{{ folder }}", trust_remote_code=True)</pre>
</body>
</html>
"""


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row, in the order of `COLUMNS`."""
    tokens, is_dense = row["tokens"], row["method"] is None
    spread = "" if tokens["min"] == tokens["max"] else f" ({tokens['min']:.0f}-{tokens['max']:.0f})"
    drop = "" if is_dense else "{:.1f} ({:.1f} to {:.1f})".format(row["drop"], *row["drop_interval"])
    return [
        row["name"],
        "" if is_dense else "yes" if row["trained"] else "no",
        "{:.1f} ({:.1f}-{:.1f})".format(row["top1"], *row["top1_interval"]),
        drop,
        f"{tokens['mean']:.0f}{spread}",
        f"{100 * row['mult_adds_ratio']:.0f} %",
        f"{row['speedup']:.2f}",
        "" if row["oracle_share"] is None else f"{row['oracle_share']:.2f}",
    ]


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tuned_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the tuner's report, in the order of `TUNED_COLUMNS`."""
    is_dense = row["method"] is None
    return [
        row["name"],
        ", ".join(ROLES[role] for role in row["roles"]),
        "{:.1f} ({:.1f}-{:.1f})".format(row["top1"], *row["top1_interval"]),
        "" if is_dense else "{:.1f} ({:.1f} to {:.1f})".format(row["drop"], *row["drop_interval"]),
        f"{100 * row['mult_adds_ratio']:.0f} %",
        f"{row['speedup']:.2f}",
    ]


def write_report(
    path: Path, rows: Sequence[dict[str, Any]], pareto: Path, pictures: Sequence[Path], tuned: dict[str, Any]
) -> None:
    """Write an HTML file that contains the tables and the pictures, and links to the pages of the methods beside it.

    Args:
        path: The file to write.
        rows: Rows of the demonstration's table.
        pareto: Picture of accuracy against cost.
        pictures: Pictures that compare the methods on one image each.
        tuned: The report of the tuner, from `read_tuned`.
    """
    by_name = {name: method for method, name in NAMES.items()}
    listed = [
        {"cells": cells(row), "page": None if row["method"] is None else f"{by_name[row['name']]}.html"}
        for row in rows
    ]
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    text = template.render(
        columns=COLUMNS,
        rows=listed,
        images=rows[0]["images"],
        pareto=_inline(pareto),
        pictures=[_inline(picture) for picture in pictures],
        tuned=tuned,
        tuned_columns=TUNED_COLUMNS,
        tuned_rows=[tuned_cells(row) for row in tuned["rows"] if not row.get("skipped")],
        folder=str(path.parent / next(reversed(METHODS))),
    )
    path.write_text(text, encoding="utf-8")


def _inline(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
