"""`Trials`: measure settings on the images of a search, and keep each result as it comes."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ..evaluation.accuracy import check_finite
from ..evaluation.compare import calibrate_once, key_of, reduced_as, timed, why_it_cannot_run
from ..evaluation.compute import tokens_entering
from ..evaluation.features import pooled_features
from ..evaluation.reading import batches, sample_pixels
from ..evaluation.resume import append_line, digest, read_lines
from ..evaluation.zero_shot import inside
from ..files import whole
from ..methods import METHODS, method_of
from ..modeling.configuration_base import ReductionConfig
from ..modeling.methods import parse_reduction
from ..modeling.multiply_adds import even_share, shares_kept
from ..modes import evaluating
from ..tasks import all_layers_act, facts_on, image_side
from .space import Variant, even_setting


CALIBRATION_IMAGES = 100
TIMED_REPEATS = 5
# As a rule, the accuracy drops by so many points for a divergence of 1. This was measured with all methods on
# photographs, for divergences from 0.04 to 0.5. A drop that is measured on some hundreds of images is uncertain by
# about one point, and so is a drop that is estimated from the divergence.
POINTS_OF_DISTANCE = 35.0


@dataclass(frozen=True)
class Quality:
    """The quality and the cost of a setting on images of the search.

    Attributes:
        images: Number of images.
        distance: Mean Kullback-Leibler divergence from the dense model's class probabilities to those of the setting.
            For features, 1 minus the cosine.
        agreement: Percentage of the images that get the dense model's class. None for features.
        drop: Drop of the accuracy in percentage points. Without labels, 100 minus the agreement. None for features.
        share: Share of the encoder's multiply-adds that is kept.
    """

    images: int
    distance: float
    agreement: float | None
    drop: float | None
    share: float


class Trials:
    """Try settings on a model, and remember the results.

    Args:
        model: A classifier or an encoder, stock or reduced.
        dataset: All images.
        search: Rows of the images to search on. The first of them are a sample of all.
        labels: The model's index of the class of each image of the data set. None: features are compared, or the
            images have no labels and the dense model's classes take their place.
        processor: The image processor of the model.
        folder: Folder that keeps the results. A later search with the same settings reads them there.
        calibrated: Folder for what methods learn.
        of_features: Compare features, not classes.
        batch_size: Number of images per batch, also when time is measured.
        runtime: Where time is measured.
        image_column: Column of the data set that holds the images.
        num_workers: Number of processes that read images.
        progress: Show progress bars.
    """

    def __init__(
        self,
        model: Any,
        dataset: Dataset,
        search: Sequence[int],
        labels: Sequence[int] | None,
        processor: Any,
        folder: Path,
        calibrated: Path,
        *,
        of_features: bool,
        batch_size: int,
        runtime: str,
        image_column: str,
        num_workers: int = 0,
        progress: bool = True,
    ):
        self.model, self.dense = model, reduced_as(model, None)
        dataset, self.rows = dataset.select(search), list(search)
        self.dataset, self.processor, self.image_column = dataset, processor, image_column
        self.labelled = labels is not None
        self.of_features, self.batch_size, self.calibrated = of_features, batch_size, calibrated
        self.runtime = runtime
        self.file = folder / "trials.jsonl"
        self.qualities: dict[str, list[dict[str, Any]]] = {}
        self.speeds: dict[str, dict[str, Any]] = {}
        self.fits: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.clock = 0.0  # seconds that all requested trials took, also those of an earlier run that was stopped
        self.asked: set[int] = set()
        self.progress, self.bar, self.bar_at, self.timed = progress, logging.tqdm(disable=True), 0, False
        for line in read_lines(self.file):
            self._take(line)
        pixels = batches(
            dataset, list(range(len(dataset))), processor, batch_size=batch_size, image_column=image_column,
            num_workers=num_workers, title="reading images", progress=progress,
        )  # fmt: skip
        self.pixels = torch.cat([part for _, part in pixels])
        self.facts = facts_on(inside(self.dense), self.pixels[:1])
        self.outputs = self._dense_outputs(folder / "dense.safetensors")
        self.classes = None if of_features else self.outputs.argmax(dim=-1)
        self.labels = (
            self.classes if labels is None or self.classes is None else torch.tensor([labels[row] for row in search])
        )

    def order(self, quality: Quality) -> float:
        """Return the number by which settings are sorted, the lowest and best first.

        This is the distance. If there are labels and the setting was measured on all images, it is the drop of the
        accuracy in points, plus the drop that the distance predicts.
        """
        if self.labelled and quality.drop is not None and quality.images == len(self.dataset):
            return quality.drop + POINTS_OF_DISTANCE * quality.distance
        return quality.distance

    def plan(self, images: int, end: float) -> None:
        """Begin the progress bar: over `images` forward passes of one image, or over seconds if `end` is finite."""
        self.bar.close()
        self.timed = math.isfinite(end)
        total, unit = (round(end - self.clock), "s") if self.timed else (images, "image")
        self.bar = logging.tqdm(desc="searching", total=total, unit=unit, disable=not self.progress)

    def setting_at(self, variant: Variant, share: float) -> ReductionConfig | None:
        """Find the setting of a variant that keeps at most a share of the multiply-adds. None: there is none."""
        method = METHODS[variant.method]
        if method.at_share is not None:
            return even_setting(variant, self.facts, share)
        key = digest([json.dumps([asdict(variant), share], sort_keys=True).encode()])
        if key not in self.fits:
            begin, found = time.perf_counter(), None
            try:
                pixels = sample_pixels(self.dataset, self.processor, self.image_column, CALIBRATION_IMAGES)
                dense = inside(self.dense)
                assert method.fit_share is not None
                inputs = pixels.to(dense.device, dense.dtype)
                found = method.fit_share(dense, inputs, share, **variant.settings).to_dict()
            except ValueError:  # the share is out of reach
                pass
            self._keep({"fit": key, "setting": found, "seconds": time.perf_counter() - begin})
        self._ask(self.fits[key])
        values = self.fits[key]["setting"]
        fields = {name: value for name, value in (values or {}).items() if name != "method"}
        return None if values is None else method.config_class(**fields)

    def quality(self, setting: ReductionConfig, count: int) -> Quality | None:
        """Measure a setting on the first `count` images. None: it cannot run in this model.

        Images on which it was measured before are not computed again.
        """
        key = self.key(setting)
        known = self.qualities.get(key, [])
        begin = known[-1]["end"] if known else 0
        if begin < count and not (known and known[-1].get("failed")):
            self._keep(self._measured(key, setting, begin, count))
        for line in self.qualities[key]:
            if line["begin"] < count:
                self._ask(line)
        return self.known_quality(setting, count)

    def known_quality(self, setting: ReductionConfig, count: int | None = None) -> Quality | None:
        """Return the quality of a setting on the first `count` images, by default all. None: it is not known yet."""
        lines = self.qualities.get(self.key(setting), [])
        count = len(self.dataset) if count is None else count
        if not lines or lines[-1].get("failed") or lines[-1]["end"] < count:
            return None
        column = {
            name: [value for line in lines for value in line[name]][:count]
            for name in ("distance", "same", "right", "share")
        }
        agreement, drop = None, None
        if self.classes is not None and self.labels is not None:
            was_right = int((self.classes[:count] == self.labels[:count]).sum())
            agreement = 100 * sum(column["same"]) / count
            drop = 100 * (was_right - sum(column["right"])) / count
        return Quality(count, sum(column["distance"]) / count, agreement, drop, sum(column["share"]) / count)

    def speedup(self, setting: ReductionConfig) -> float | None:
        """Time a setting in turn with the dense model on this device. None: it cannot run in this model."""
        key = self.key(setting)
        if key not in self.speeds:
            begin = time.perf_counter()
            reduced, reason = self.reduced(setting)
            row: dict[str, Any] = {"speedup": None}
            if reason is None:
                images = self.pixels[: 2 * self.batch_size].to(inside(reduced).device)
                row = timed(inside(reduced), inside(self.dense), images, self.batch_size, TIMED_REPEATS, self.runtime)
            self._keep(
                {
                    "speed": key,
                    "setting": setting.to_dict(),
                    "speedup": row["speedup"],
                    "seconds": time.perf_counter() - begin,
                }
            )
        self._ask(self.speeds[key])
        return self.speeds[key]["speedup"]

    def known_speedup(self, setting: ReductionConfig) -> float | None:
        """Return the speed-up of a setting. None: it was not timed."""
        return self.speeds.get(self.key(setting), {}).get("speedup")

    def tried(self) -> list[ReductionConfig]:
        """List all settings that were measured on images, in the order in which they were tried."""
        return [self.settings[key] for key in self.qualities]

    def reduced(self, setting: ReductionConfig) -> tuple[Any, str | None]:
        """Return the model with a setting, calibrated if the method needs it, and the reason if it cannot run."""
        model = reduced_as(self.model, setting)
        reason = why_it_cannot_run(model, self.facts)
        if reason is None and method_of(setting).prepare is not None and not self._is_own(setting):
            file = self.calibrated / f"{self.key(setting)}.safetensors"
            reason = calibrate_once(
                inside(model), file, self.dataset, self.processor, self.image_column, CALIBRATION_IMAGES
            )
        return model, reason

    def key(self, setting: ReductionConfig) -> str:
        """Return the name under which the results of a setting are kept."""
        key = key_of(setting, "")
        self.settings.setdefault(key, setting)
        return key

    def _is_own(self, setting: ReductionConfig) -> bool:
        """Return whether the given model is reduced by this setting. Then it has learned already."""
        own = getattr(self.model.config, "reduction", None)
        return own is not None and own.to_dict() == setting.to_dict()

    @torch.no_grad()
    def _measured(self, key: str, setting: ReductionConfig, begin: int, end: int) -> dict[str, Any]:
        start = time.perf_counter()
        line: dict[str, Any] = {"quality": key, "setting": setting.to_dict(), "begin": begin, "end": end}
        reduced, reason = self.reduced(setting)
        if reason is not None:
            return line | {"failed": reason, "seconds": time.perf_counter() - start}
        found: dict[str, list[Any]] = {"distance": [], "same": [], "right": [], "share": []}
        with evaluating(reduced):
            for first in range(begin, end, self.batch_size):
                rows = slice(first, min(first + self.batch_size, end))
                outputs, counts = self._run(reduced, self.pixels[rows])
                check_finite(outputs, self.rows[rows])
                found["distance"] += _distances(self.outputs[rows], outputs, self.of_features)
                found["share"] += self._shares(setting, counts, len(outputs))
                if self.classes is not None and self.labels is not None:
                    first_class = outputs.argmax(dim=-1)
                    found["same"] += (first_class == self.classes[rows]).int().tolist()
                    found["right"] += (first_class == self.labels[rows]).int().tolist()
        return line | found | {"seconds": time.perf_counter() - start}

    def _run(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return outputs in float32, and the tokens that leave each layer if images may differ in them."""
        one = inside(model)
        pixels = pixels.to(one.device, one.dtype)
        if self.of_features:
            output = image_side(one)(pixels, output_patch_map=True)
            return pooled_features(one, output).cpu(), output.token_counts.cpu()
        adaptive = method_of(one.config.reduction).is_adaptive(one.config.reduction)
        output = model(pixels, **(all_layers_act(one) if adaptive else {}))
        return output.logits.float().cpu(), output.token_counts.cpu() if adaptive else None

    def _shares(self, setting: ReductionConfig, counts: Tensor | None, images: int) -> list[float]:
        if not method_of(setting).is_adaptive(setting):
            return [even_share(setting, self.facts)] * images
        assert counts is not None
        entering = tokens_entering(inside(self.dense), self.pixels[:1])
        return shares_kept(inside(self.dense).config, counts, entering, setting).tolist()

    @torch.no_grad()
    def _dense_outputs(self, file: Path) -> Tensor:
        if file.is_file():
            return load_file(file)["outputs"]
        found: list[Tensor] = []
        with evaluating(self.dense):
            for first in range(0, len(self.pixels), self.batch_size):
                rows = slice(first, first + self.batch_size)
                found.append(self._run(self.dense, self.pixels[rows])[0])
                check_finite(found[-1], self.rows[rows], "dense model")
        outputs = torch.cat(found).contiguous()
        with whole(file) as unfinished:
            save_file({"outputs": outputs}, unfinished)
        return outputs

    def _keep(self, line: dict[str, Any]) -> None:
        append_line(self.file, line)
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "quality" in line:
            self.qualities.setdefault(line["quality"], []).append(line)
            self.settings.setdefault(line["quality"], parse_reduction(line["setting"]))
        elif "speed" in line:
            self.speeds[line["speed"]] = line
        else:
            self.fits[line["fit"]] = line

    def _ask(self, line: dict[str, Any]) -> None:
        """Add the time of a result to the clock when it is first asked for.

        So a search that was stopped and continues makes the same decisions by the clock as one without the stop.
        """
        if id(line) in self.asked:
            return
        self.asked.add(id(line))
        self.clock += line["seconds"]
        self.bar.update(round(self.clock) - self.bar_at if self.timed else line.get("end", 0) - line.get("begin", 0))
        self.bar_at = round(self.clock)


def _distances(dense: Tensor, reduced: Tensor, of_features: bool) -> list[float]:
    """Return the distance of each image, see `Quality`."""
    dense, reduced = dense.double(), reduced.double()
    if of_features:
        return (1 - F.cosine_similarity(dense, reduced, dim=-1)).tolist()
    log_dense, log_reduced = dense.log_softmax(dim=-1), reduced.log_softmax(dim=-1)
    return (log_dense.exp() * (log_dense - log_reduced)).sum(dim=-1).clamp(min=0.0).tolist()
