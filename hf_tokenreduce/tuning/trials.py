"""`Trials`: what is known of each setting on the images that are searched on. Each result is kept as it comes."""

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
from ..evaluation.compute import facts_on, tokens_entering
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
from ..tasks import all_layers_act, image_side
from .space import Variant, even_setting


CALIBRATION_IMAGES = 100
TIMED_REPEATS = 5
# By how many points the accuracy drops, as a rule, for a divergence of 1: seen with all methods on photographs, for
# divergences from 0.04 to 0.5. A drop on some hundreds of images is uncertain by about a point, and so is this.
POINTS_OF_DISTANCE = 35.0


@dataclass(frozen=True)
class Quality:
    """What a setting does to images that were searched on.

    images: how many
    distance: the mean over them of the Kullback-Leibler divergence from the dense model's classes to these; of
        features one less their cosine
    agreement: percent of them whose first class is that of the dense model
    drop: of the accuracy, in percent; without labels what agreement lacks of 100. None for features.
    share: of the encoder's multiply-adds
    """

    images: int
    distance: float
    agreement: float | None
    drop: float | None
    share: float


class Trials:
    """Tries settings on a model, and remembers.

    model: a classifier or an encoder, stock or reduced
    dataset: the images to search on; each prefix of it is a sample
    labels: the class of each image in the model; None where features are compared. Without labels of its own a data
        set takes the dense model's classes for them.
    folder: keeps what was measured; called again with the same settings, it is read there
    calibrated: the folder for what methods learn
    """

    def __init__(
        self,
        model: Any,
        dataset: Dataset,
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
        self.dataset, self.processor, self.image_column = dataset, processor, image_column
        self.labelled = labels is not None
        self.of_features, self.batch_size, self.calibrated = of_features, batch_size, calibrated
        self.runtime = runtime
        self.file = folder / "trials.jsonl"
        self.qualities: dict[str, list[dict[str, Any]]] = {}
        self.speeds: dict[str, dict[str, Any]] = {}
        self.fits: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.clock = 0.0  # seconds that the trials took which were asked for, also if that was before a resumption
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
        self.labels = self.classes if labels is None or self.classes is None else torch.tensor(list(labels))

    def order(self, quality: Quality) -> float:
        """By what settings are sorted, the best first: the distance; where there are labels and all images were seen,
        the drop of the accuracy in points, and as much again by what the distance says of it."""
        if self.labelled and quality.drop is not None and quality.images == len(self.dataset):
            return quality.drop + POINTS_OF_DISTANCE * quality.distance
        return quality.distance

    def plan(self, images: int, end: float) -> None:
        """Begin the bar that says how long it takes: the forwards of single images that are planned, or the seconds
        until the clock ends."""
        self.bar.close()
        self.timed = math.isfinite(end)
        total, unit = (round(end - self.clock), "s") if self.timed else (images, "image")
        self.bar = logging.tqdm(desc="searching", total=total, unit=unit, disable=not self.progress)

    def setting_at(self, variant: Variant, share: float) -> ReductionConfig | None:
        """The setting of a variant that keeps at most a share of the multiply-adds; None if there is none."""
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
                found = method.fit_share(dense, pixels.to(dense.device), share, **variant.settings).to_dict()
            except ValueError:  # out of reach
                pass
            self._keep({"fit": key, "setting": found, "seconds": time.perf_counter() - begin})
        self._ask(self.fits[key])
        values = self.fits[key]["setting"]
        fields = {name: value for name, value in (values or {}).items() if name != "method"}
        return None if values is None else method.config_class(**fields)

    def quality(self, setting: ReductionConfig, count: int) -> Quality | None:
        """Measure a setting on the first `count` images, of which those that were seen before are not seen again. None
        if it cannot run in this model."""
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
        """What is known of a setting on the first `count` images, by default all; None if that is not known yet."""
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
        """Time a setting in turn with the dense model on this device. None if it cannot run in this model."""
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
        return self.speeds.get(self.key(setting), {}).get("speedup")

    def tried(self) -> list[ReductionConfig]:
        """All settings that were measured on images, in the order in which they were tried."""
        return [self.settings[key] for key in self.qualities]

    def reduced(self, setting: ReductionConfig) -> tuple[Any, str | None]:
        """The model with a setting, and what it has to learn learned; or why that cannot be."""
        model = reduced_as(self.model, setting)
        reason = why_it_cannot_run(model, self.facts)
        if reason is None and method_of(setting).prepare is not None and not self._is_own(setting):
            file = self.calibrated / f"{self.key(setting)}.safetensors"
            reason = calibrate_once(
                inside(model), file, self.dataset, self.processor, self.image_column, CALIBRATION_IMAGES
            )
        return model, reason

    def key(self, setting: ReductionConfig) -> str:
        key = key_of(setting, "")
        self.settings.setdefault(key, setting)
        return key

    def _is_own(self, setting: ReductionConfig) -> bool:
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
                check_finite(outputs, range(end)[rows])
                found["distance"] += _distances(self.outputs[rows], outputs, self.of_features)
                found["share"] += self._shares(setting, counts, len(outputs))
                if self.classes is not None and self.labels is not None:
                    first_class = outputs.argmax(dim=-1)
                    found["same"] += (first_class == self.classes[rows]).int().tolist()
                    found["right"] += (first_class == self.labels[rows]).int().tolist()
        return line | found | {"seconds": time.perf_counter() - start}

    def _run(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs in float32, and the tokens that leave each layer where they differ between images."""
        one = inside(model)
        pixels = pixels.to(one.device)
        if self.of_features:
            output = image_side(one)(pixels, output_patch_map=True)
            return pooled_features(one, output).cpu(), output.token_counts.cpu()
        adaptive = one.config.reduction is not None and method_of(one.config.reduction).is_adaptive(
            one.config.reduction
        )
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
                check_finite(found[-1], range(len(self.pixels))[rows], "dense model")
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
        """Count a result's time when it is asked for first: so a search that goes on after it was stopped decides by
        the clock what it would have decided without the stop."""
        if id(line) in self.asked:
            return
        self.asked.add(id(line))
        self.clock += line["seconds"]
        self.bar.update(round(self.clock) - self.bar_at if self.timed else line.get("end", 0) - line.get("begin", 0))
        self.bar_at = round(self.clock)


def _distances(dense: Tensor, reduced: Tensor, of_features: bool) -> list[float]:
    dense, reduced = dense.double(), reduced.double()
    if of_features:
        return (1 - F.cosine_similarity(dense, reduced, dim=-1)).tolist()
    log_dense, log_reduced = dense.log_softmax(dim=-1), reduced.log_softmax(dim=-1)
    return (log_dense.exp() * (log_dense - log_reduced)).sum(dim=-1).clamp(min=0.0).tolist()
