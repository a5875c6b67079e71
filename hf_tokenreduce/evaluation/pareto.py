"""`pareto_plot`: draw accuracy against multiply-adds and against speed, for many settings of many methods."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..methods import METHODS


# Marker, whether it is filled, line style and colour of each method, in the order in which the methods are listed.
# Lines can be told apart by marker, line style and label alone, so the picture also works without colour.
STYLES = [
    ("o", True, "-", "#1b4f9c"),
    ("s", True, "--", "#b8541a"),
    ("s", False, ":", "#8a6d1f"),
    ("D", True, "-.", "#2d7a3a"),
    ("^", True, "--", "#7a3b9c"),
    ("v", False, ":", "#555555"),
    ("P", True, "-", "#a3243b"),
    ("X", True, "-", "#111111"),
    ("<", True, "-.", "#336666"),
    (">", False, "--", "#664433"),
    ("p", True, ":", "#445588"),
    ("h", False, "-", "#2f5f2f"),
    ("*", True, "--", "#8a2f5f"),
    ("d", False, "-.", "#3d3d8f"),
    ("8", True, ":", "#5c5c1f"),
]
# For further lines: a second line of a method, or a method that is not listed here.
OTHERS = [
    ("<", False, "-", "#336666"),
    (">", True, ":", "#664433"),
    ("p", False, "-.", "#445588"),
    ("h", True, "--", "#555555"),
]


# Measures of quality with the names of their axes. The first one that the records have is drawn.
QUALITIES = {
    "top1": "top-1 accuracy, %",
    "knn": "accuracy of nearest neighbours, %",
    "pooled_cosine": "cosine to the dense model's features",
    "agreement": "images given the dense model's class, %",
}


class Point(NamedTuple):
    x: float
    y: float
    x_interval: tuple[float, float] | None
    y_interval: tuple[float, float] | None


def pareto_plot(
    rows: Sequence[Mapping[str, Any]] | str | Path, path: str | Path | Sequence[str | Path], title: str = ""
) -> None:
    """Draw quality against multiply-adds and against speed.

    A record has these keys:

    - `method`: name of the method, or None for the dense model.
    - `top1`: accuracy in percent. Where features were compared, `knn` takes its place in all keys, or `pooled_cosine`
      if there is no `knn` either.
    - `mult_adds_ratio` and `speedup`: the costs. One of the two may be missing in all records.
    - `label`, optional: name of the line, instead of the method's.
    - `top1_interval` and `speedup_interval`, optional.
    - `dense_images_per_second`, optional: with it speed is also shown in images/s.
    - `baseline_top1`, optional: accuracy of the dense model, if no record is about the dense model.

    Args:
        rows: Records, such as `Comparison.rows`, or a JSON file of them.
        path: The picture, or several of them. The suffix says which kind it is, such as .png or .svg.
        title: Title of the picture.

    Example:
        >>> pareto_plot("comparison/results.json", "pareto.svg")
    """
    given: Any = json.loads(Path(rows).read_text()) if isinstance(rows, (str, Path)) else rows
    quality = next((name for name in QUALITIES if any(row.get(name) is not None for row in given)), "top1")
    records: list[Any] = [row for row in given if row.get(quality) is not None]
    reduced = [row for row in records if row.get("method") is not None]
    if not reduced:
        raise ValueError("There is nothing to draw: no record has both a method and a top1.")
    panels = [name for name in ("mult_adds_ratio", "speedup") if any(row.get(name) is not None for row in reduced)]
    if not panels:
        raise ValueError("The records have neither mult_adds_ratio nor speedup to draw accuracy against.")

    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "hf_tokenreduce"}):
        figure = Figure(figsize=(5.6 * len(panels), 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, panels, strict=True):
            _draw_panel(axis, name, quality, records, reduced)
        axes[0].set_ylabel(QUALITIES[quality])
        if title:
            figure.suptitle(title)
        for file in [path] if isinstance(path, (str, Path)) else path:
            figure.savefig(file, dpi=160, metadata={"Date": None} if str(file).endswith(".svg") else None)


def _draw_panel(
    axis: Any, name: str, quality: str, rows: Sequence[Mapping[str, Any]], reduced: list[Mapping[str, Any]]
) -> None:
    speed = name == "speedup"
    styles = _styles(reduced)
    lines: dict[str, list[Point]] = {}
    for row in reduced:
        if row.get(name) is not None:
            lines.setdefault(_label(row), []).append(_point(row, name, quality))
    dense = _dense_point(rows, quality)
    if dense is not None:
        axis.axhline(dense.y, color="0.75", linewidth=0.8, zorder=0)
        axis.plot(dense.x, dense.y, marker="*", markersize=13, color="black", linestyle="none", zorder=4)
        axis.annotate("dense", (dense.x, dense.y), (0, -9), textcoords="offset points", ha="center", va="top")
    ends = []
    for label, points in lines.items():
        marker, filled, dash, color = styles[label]
        points = sorted(points, key=lambda point: point.x)
        xs, ys = [p.x for p in points], [p.y for p in points]
        axis.plot(
            xs, ys, linestyle=dash, color=color, marker=marker, markersize=7, linewidth=1.4,
            markerfacecolor=color if filled else "white", markeredgecolor=color, markeredgewidth=1.2, zorder=3,
        )  # fmt: skip
        for bars, values in (("xerr", [p.x_interval for p in points]), ("yerr", [p.y_interval for p in points])):
            drawn = [(p, v) for p, v in zip(points, values, strict=True) if v is not None]
            if drawn:
                middles = [p.x if bars == "xerr" else p.y for p, _ in drawn]
                lengths = [[max(0.0, m - v[0]) for m, (_, v) in zip(middles, drawn, strict=True)],
                           [max(0.0, v[1] - m) for m, (_, v) in zip(middles, drawn, strict=True)]]  # fmt: skip
                axis.errorbar(
                    [p.x for p, _ in drawn], [p.y for p, _ in drawn], **{bars: lengths},
                    fmt="none", ecolor=color, elinewidth=0.7, alpha=0.35, zorder=1,
                )  # fmt: skip
        ends.append((label, points[-1 if speed else 0], color))
    axis.margins(x=0.08)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines["right"].set_visible(False)
    axis.spines["top"].set_visible(False)
    if speed:
        _describe_speed(axis, rows)
    else:
        axis.set_xlabel("share of the encoder's multiply-adds kept")
    _label_ends(axis, ends, right=speed)


def _describe_speed(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    rate = dense_rate(rows)
    sizes = {row["speed_batch_size"] for row in rows if row.get("speed_batch_size")}
    batch = f", batch {sizes.pop()}" if len(sizes) == 1 else ""
    if rate is None:
        axis.set_xlabel(f"speed-up over dense{batch}")
        return
    axis.set_xlabel(f"images/s{batch}")
    axis.xaxis.set_major_locator(_round_steps(rate))
    axis.xaxis.set_major_formatter(lambda value, place: f"{value * rate:.4g}")
    above = axis.secondary_xaxis("top")
    above.set_xlabel("speed-up over dense")


def _round_steps(rate: float) -> Any:
    """Put ticks at round numbers of images/s, on an axis of speed-ups."""
    from matplotlib.ticker import Locator, MaxNLocator

    class RoundRates(Locator):
        def tick_values(self, low: float, high: float) -> Any:
            return [tick / rate for tick in MaxNLocator(6).tick_values(low * rate, high * rate)]

        def __call__(self) -> Any:
            axis: Any = self.axis
            return self.tick_values(*axis.get_view_interval())

    return RoundRates()


def _label_ends(axis: Any, ends: list[tuple[str, Point, str]], right: bool) -> None:
    """Write the names of the lines in a column beside their cheap ends, at the ends' heights, without overlap."""
    low, high = axis.get_xlim()
    room = (0.1 + 0.02 * max(len(label) for label, _, _ in ends)) * (high - low)
    axis.set_xlim(low - (0 if right else room), high + (room if right else 0))
    column = high + 0.06 * (high - low) if right else low - 0.06 * (high - low)
    bottom, top = axis.get_ylim()
    ends = sorted(ends, key=lambda end: end[1].y)
    heights = spread_apart([point.y for _, point, _ in ends], 0.052 * (top - bottom), bottom, top)
    for (label, point, color), height in zip(ends, heights, strict=True):
        axis.annotate(
            label, (point.x, point.y), (column, height), color=color, va="center", ha="left" if right else "right",
            fontweight="bold", fontsize=9.5, zorder=5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 5},
        )  # fmt: skip


def dense_rate(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the median images/s of the dense model, which was timed again beside each setting.

    The speed-up of a setting times this number gives images/s that can be compared. Images/s that were measured at
    different moments cannot, because the machine may have been slower.
    """
    rates = [row["dense_images_per_second"] for row in rows if row.get("dense_images_per_second")]
    return statistics.median(rates) if rates else None


def spread_apart(heights: Sequence[float], distance: float, bottom: float, top: float) -> list[float]:
    """Move ascending heights as little as possible until they are `distance` apart, within bounds if they fit."""
    groups: list[list[float]] = []  # wanted heights that would overlap; a group is centred on their mean
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _lowest(groups[-1], distance) < _highest(groups[-2], distance) + distance:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [_lowest(group, distance) + distance * i for group in groups for i in range(len(group))]
    for i in range(len(placed)):
        placed[i] = max(placed[i], bottom + distance * i)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], top - distance * (len(placed) - 1 - i))
    return placed


def _lowest(group: list[float], distance: float) -> float:
    return sum(group) / len(group) - distance * (len(group) - 1) / 2


def _highest(group: list[float], distance: float) -> float:
    return sum(group) / len(group) + distance * (len(group) - 1) / 2


def _label(row: Mapping[str, Any]) -> str:
    method = METHODS.get(row["method"])
    return row.get("label") or (row["method"] if method is None else method.title)


def _styles(reduced: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Choose a style for each line. A second line of a method, or an unknown method, takes one of `OTHERS`."""
    left, found, taken = list(OTHERS), {}, set()
    usual = dict(zip(METHODS, STYLES, strict=False))
    for row in reduced:
        label, method = _label(row), row["method"]
        if label in found:
            continue
        if method in usual and method not in taken:
            taken.add(method)
            found[label] = usual[method]
        else:
            found[label] = left[0]
            left.append(left.pop(0))
    return found


def _point(row: Mapping[str, Any], name: str, quality: str) -> Point:
    return Point(row[name], row[quality], row.get(f"{name}_interval"), row.get(f"{quality}_interval"))


def _dense_point(rows: Sequence[Mapping[str, Any]], quality: str) -> Point | None:
    for row in rows:
        if row.get("method") is None:
            return Point(1.0, row[quality], None, row.get(f"{quality}_interval"))
    baseline = f"baseline_{quality}"
    known = {row[baseline] for row in rows if row.get(baseline) is not None}
    return Point(1.0, known.pop(), None, None) if len(known) == 1 else None
