"""`evaluate_features`: measure what a reduction does to the features of an encoder without a classifier."""

import base64
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..convert import reduce_tokens
from ..modeling.encoders import encoder_of
from ..modeling.grid import unmerge
from ..modeling.version import __version__
from ..modes import evaluating
from ..tasks import image_side, task_of_model
from .accuracy import check_finite, costs_of, paired_bootstrap, wilson_interval
from .compute import tokens_entering
from .reading import batches, check_data, sample_pixels
from .resume import Processes, Progress, Records, digest_of_data, digest_of_model
from .zero_shot import TASK as ZERO_SHOT


TASKS = ("image-feature-extraction", ZERO_SHOT)
NEIGHBOURS = 20
TEMPERATURE = 0.07
QUERIES_AT_ONCE = 1024
BANK_AT_ONCE = 2**17


@dataclass
class FeatureReport:
    """The quality of a model's features, and what the model costs. Accuracies are in percent; intervals cover 95 %.

    Attributes:
        images: Number of images.
        method: Name of the reduction method. None: the model is not reduced.
        settings: Fields of the method's configuration.
        tokens: Number of tokens that leave the last layer: mean, quantiles, least and most over the images.
        tokens_per_layer: Mean number of tokens that leave each layer.
        multiply_adds: Multiply-adds of the whole model, summarised over the images like `tokens`.
        mult_adds_ratio: Share of the encoder's multiply-adds that is kept.
        pooled_cosine: Cosine between the pooled features of the model and of the dense model, as a mean over images.
        patch_cosine: Cosine between the last hidden states of both models, put back on the grid of patches, as a mean
            over patches and images.
        knn: Accuracy of the class that the nearest neighbours vote for. None: there are no labels.
        knn_interval: Wilson's interval of `knn`.
        neighbours: Number of neighbours that vote.
        bank_images: Number of images from which the neighbours are taken.
        alone: Number of images for which none of these images has the same class.
        baseline_knn: `knn` of the model before reduction. Its neighbours are found by its own features.
        drop: `baseline_knn` minus `knn`.
        drop_interval: Interval of `drop` by a paired bootstrap.
        agreement: Percentage of the images for which the neighbours by both models vote for the same class.
        per_image: One value per image: pooled features, cosines, tokens and multiply-adds; with labels also the labels
            and the classes that were voted for.
    """

    images: int
    method: str | None
    settings: dict[str, Any] | None
    tokens: dict[str, float]
    tokens_per_layer: list[float]
    multiply_adds: dict[str, float]
    mult_adds_ratio: float
    pooled_cosine: float | None = None
    patch_cosine: float | None = None
    knn: float | None = None
    knn_interval: tuple[float, float] | None = None
    neighbours: int | None = None
    bank_images: int | None = None
    alone: int | None = None
    baseline_knn: float | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    agreement: float | None = None
    per_image: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but `per_image`."""
        values = asdict(self)
        del values["per_image"]
        return values


def evaluate_features(
    model: PreTrainedModel,
    dataset: Dataset,
    processor: Any,
    *,
    bank: Dataset | None = None,
    baseline: FeatureReport | None = None,
    batch_size: int = 32,
    output_dir: str | Path | None = None,
    num_workers: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    progress: bool = True,
) -> FeatureReport:
    """Compare the features of an encoder with those of the model before reduction, by cosines and by neighbours.

    Args:
        model (`PreTrainedModel`): An encoder without a classifier, such as a `Dinov2Model`, or a model of images and
            texts, such as a `CLIPModel`, whose image side is used. It may be reduced or not.
        dataset (`Dataset`): Images. Without a column of labels only cosines are measured.
        processor: The image processor of the model.
        bank (`Dataset`, *optional*): Labelled images from which the neighbours are taken. By default those of
            `dataset`, each without itself.
        baseline (`FeatureReport`, *optional*): Report of the model before reduction on the same images. By default
            that model is measured too.
        batch_size: Number of images per batch.
        output_dir: Folder that keeps each result as it comes, and at the end the report in `report.json`. If you call
            again after a crash, only the missing images are computed.
        num_workers: Number of processes that read images.
        image_column: Column of the data set that holds the images.
        label_column: Column of the data set that holds the classes.
        progress: Show a progress bar.

    Returns:
        `FeatureReport`. It has no cosines if the model is not reduced.

    Example:
        >>> report = evaluate_features(reduce_tokens(model, ToMeConfig(r=8)), photos, processor)
        >>> report.pooled_cosine, report.knn, report.drop
    """
    check_features_model(model)
    labelled = label_column in getattr(dataset, "column_names", ())
    columns = {"image_column": image_column, **({"label_column": label_column} if labelled else {})}
    check_data(dataset, batch_size, **columns)
    if bank is not None:
        if not labelled:
            raise ValueError("bank gives the classes of neighbours, but the data set has no labels. Leave bank out.")
        check_data(bank, batch_size, **columns)
    labels, bank_labels = voting_labels(dataset, bank, label_column) if labelled else (None, None)
    folder = None if output_dir is None else Path(output_dir)
    options: dict[str, Any] = {
        "batch_size": batch_size, "num_workers": num_workers, "image_column": image_column, "progress": progress,
    }  # fmt: skip
    dense = reduce_tokens(model, None)
    if getattr(model.config, "reduction", None) is None:
        model, beside = dense, None
    else:
        beside = dense
        if baseline is None:
            baseline = evaluate_features(
                dense, dataset, processor, bank=bank, label_column=label_column, **options,
                output_dir=None if folder is None else folder / "dense",
            )  # fmt: skip
        if baseline.images != len(dataset) or (labelled and "predictions" not in baseline.per_image):
            raise ValueError(
                f"baseline is a report on {baseline.images} images, and the data set has {len(dataset)} images. Give "
                "the report that evaluate_features returned for the same images, unchanged, or leave baseline out."
            )

    found, done = _extract(model, beside, dataset, processor, labels or [], folder, **options)
    voting = found["pooled"]
    if labelled and bank is not None:
        where = None if folder is None else folder / "bank"
        voting = _extract(model, None, bank, processor, bank_labels or [], where, **options)[0]["pooled"]
    num_tokens = tokens_entering(model, sample_pixels(dataset, processor, image_column, 1))
    costs, per_image = costs_of(model, found.pop("tokens").long(), num_tokens)
    report = FeatureReport(images=len(dataset), per_image={**found, **per_image}, **costs)
    if beside is not None:
        report.pooled_cosine = found["pooled_cosine"].mean().item()
        report.patch_cosine = found["patch_cosine"].mean().item()
    if labels is not None and bank_labels is not None:
        votes = nearest_neighbour_classes(
            found["pooled"], voting, torch.tensor(bank_labels), leave_one_out=bank is None
        )
        _count_votes(report, votes, torch.tensor(labels), baseline)
        report.bank_images = len(voting) - (bank is None)
        report.neighbours = min(NEIGHBOURS, report.bank_images)
        of_class = Counter(bank_labels)
        report.alone = sum(of_class[label] <= (bank is None) for label in labels)
    done.finish(report.to_dict())
    return report


def pooled_features(model: PreTrainedModel, output: Any) -> Tensor:
    """Return one feature vector per image.

    This is what the model pools or projects. A model that does neither gives its class token, if users of the model
    read that token, else the mean of its patches.

    Args:
        model: A model made by `reduce_tokens`, also by `reduce_tokens(model, None)`.
        output: Output of `image_side(model)`, called with `output_patch_map=True`.

    Returns:
        `Tensor` of shape `(batch, features)`, float32.

    Example:
        >>> pooled = pooled_features(model, image_side(model)(pixel_values, output_patch_map=True))
    """
    for name in ("image_embeds", "pooler_output"):
        if output.get(name) is not None:
            return output[name].float()
    if not encoder_of(model).tower.wants_grid:
        return output.last_hidden_state[:, 0].float()
    return patch_features(model, output).mean(dim=1)


def patch_features(model: PreTrainedModel, output: Any) -> Tensor:
    """Put the last hidden states back on the grid of patches.

    A merged token is repeated for each of its patches. A dropped patch gets the mean of the others.

    Args:
        model: A model made by `reduce_tokens`, also by `reduce_tokens(model, None)`.
        output: Output of `image_side(model)`, called with `output_patch_map=True`.

    Returns:
        `Tensor` of shape `(batch, patches, features)`, float32.

    Example:
        >>> patches = patch_features(model, image_side(model)(pixel_values, output_patch_map=True))
    """
    encoder, hidden = encoder_of(model), output.last_hidden_state.float()
    if encoder.tower.wants_grid:
        return hidden[:, encoder.facts.num_prefix_tokens :]
    return unmerge(hidden, output.patch_weights if output.patch_map is None else output.patch_map)


def nearest_neighbour_classes(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    leave_one_out: bool = False,
) -> Tensor:
    """Return the class that each query's nearest neighbours vote for, with weights `exp(cosine / temperature)`.

    Args:
        queries (`Tensor`): Features of shape `(n, features)`.
        bank (`Tensor`): Features of shape `(m, features)`.
        labels (`Tensor`): Class of each row of the bank, long.
        k (`int`): Number of neighbours that vote. If the bank has fewer images, all of them vote.
        temperature (`float`): Temperature of the weights. With a lower temperature the nearest neighbours decide.
        leave_one_out (`bool`): Set this if the bank is the queries. Then no query votes for itself.

    Returns:
        `Tensor` of shape `(n,)`, long. If classes have equal votes, it is the first of them.

    Example:
        >>> classes = nearest_neighbour_classes(features, features, labels, leave_one_out=True)
    """
    k = min(k, len(bank) - leave_one_out)
    if k < 1:
        raise ValueError("There is no neighbour to vote. Give at least one more labelled image.")
    found = []
    for start, some in zip(range(0, len(queries), QUERIES_AT_ONCE), queries.split(QUERIES_AT_ONCE), strict=True):
        values, indices = _nearest(some, bank, k, start if leave_one_out else None)
        votes = torch.zeros(len(some), int(labels.max()) + 1, dtype=torch.float64)
        votes.scatter_add_(1, labels[indices], (values / temperature).exp())
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def _nearest(queries: Tensor, bank: Tensor, k: int, own: int | None) -> tuple[Tensor, Tensor]:
    """Return the cosines and rows of the k nearest in the bank, (n, k) each. own: the row of the bank that is the
    first query; no query finds itself. A part of the bank is compared at a time: all training images of ImageNet
    would not fit into memory."""
    queries = F.normalize(queries.double(), dim=-1)
    values, indices = [], []
    for first, part in zip(range(0, len(bank), BANK_AT_ONCE), bank.split(BANK_AT_ONCE), strict=True):
        cosines = queries @ F.normalize(part.double(), dim=-1).T
        if own is not None:
            place = torch.arange(len(queries))
            inside = (own + place >= first) & (own + place < first + len(part))
            cosines[place[inside], own + place[inside] - first] = -torch.inf
        nearest = cosines.topk(min(k, len(part)), dim=1)
        values.append(nearest.values)
        indices.append(nearest.indices + first)
    best = torch.cat(values, dim=1).topk(k, dim=1)
    return best.values, torch.cat(indices, dim=1).gather(1, best.indices)


def check_features_model(model: PreTrainedModel) -> None:
    """Raise a ValueError unless the features of this model can be compared."""
    task = task_of_model(model).name
    if task not in TASKS:
        raise ValueError(
            f"A {type(model).__name__} is for {task}: its features cannot be compared here. Give an image classifier, "
            "a model without a head such as AutoModel loads, a CLIPModel or a SiglipModel."
        )


def _extract(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    dataset: Dataset,
    processor: Any,
    labels: list[int],
    folder: Path | None,
    *,
    batch_size: int,
    num_workers: int,
    image_column: str,
    progress: bool,
) -> tuple[dict[str, Tensor], Records]:
    """Measure each row that `folder` lacks: pooled features, tokens of each layer, cosines with a dense model."""
    settings = {
        "version": __version__,
        "model": digest_of_model(model),
        "dense": None if dense is None else digest_of_model(dense),
        "data": digest_of_data(dataset, image_column, labels),
        "processor": processor.to_dict(),
    }
    records = Records(folder, settings, Processes())
    parts = batches(
        dataset, [row for row in range(len(dataset)) if row not in records.done], processor, batch_size=batch_size,
        image_column=image_column, num_workers=num_workers, title="extracting features", progress=progress,
    )  # fmt: skip
    with evaluating(*[model] if dense is None else [model, dense]), torch.no_grad():
        for rows, pixel_values in parts:
            records.add(_record(model, dense, rows, pixel_values.to(model.device, model.dtype)))
    found = [records.done[row] for row in range(len(dataset))]
    tensors = {name: torch.tensor([values[name] for values in found]) for name in found[0] if name != "pooled"}
    tensors["pooled"] = torch.from_numpy(np.stack([_decoded(values["pooled"]) for values in found]))
    return tensors, records


def _record(model: PreTrainedModel, dense: PreTrainedModel | None, rows: list[int], pixel_values: Tensor) -> Progress:
    output = image_side(model)(pixel_values, output_patch_map=True)
    pooled = pooled_features(model, output)
    check_finite(pooled, rows)
    record = {"rows": rows, "pooled": list(map(_encoded, pooled.cpu())), "tokens": output.token_counts.tolist()}
    if dense is not None:
        of_dense = image_side(dense)(pixel_values, output_patch_map=True)
        cosines = F.cosine_similarity(patch_features(model, output), patch_features(dense, of_dense), dim=-1)
        record["pooled_cosine"] = F.cosine_similarity(pooled, pooled_features(dense, of_dense), dim=-1).tolist()
        record["patch_cosine"] = cosines.mean(dim=1).tolist()
    return record


def _encoded(features: Tensor) -> str:
    """Encode features without loss, in a quarter of the characters that decimal digits would take."""
    return base64.b64encode(features.numpy().astype("<f4").tobytes()).decode()


def _decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)


def voting_labels(dataset: Dataset, bank: Dataset | None, label_column: str) -> tuple[list[int], list[int]]:
    """Return the labels of the images, and the labels of those that vote."""
    labels = list(dataset.with_format(None)[label_column])
    voting = labels if bank is None else list(bank.with_format(None)[label_column])
    if any(not isinstance(label, int) or label < 0 for label in (*labels, *voting)):
        raise ValueError(
            f"The column {label_column!r} must hold a class, from 0, of each image. Leave out the images without a "
            "class, or leave out the column: dataset.remove_columns(...), or --no-labels of tokenreduce tune."
        )
    named = getattr(dataset.features[label_column], "names", None)
    if bank is not None and getattr(bank.features[label_column], "names", None) != named:
        raise ValueError(
            "The classes of bank differ from the classes of the data set, or they are in another order. Use the same "
            "classes in the same order."
        )
    return labels, voting


def _count_votes(report: FeatureReport, votes: Tensor, truth: Tensor, baseline: FeatureReport | None) -> None:
    """Add to a report what the votes say: accuracy, and its drop from the baseline."""
    from .metrics.agreement.agreement import agreement

    right = (votes == truth).numpy()
    report.knn = 100 * float(right.mean())
    report.knn_interval = wilson_interval(int(right.sum()), len(right))
    report.per_image |= {"labels": truth, "predictions": votes}
    if baseline is not None:
        dense_votes = baseline.per_image["predictions"]
        was_right = (dense_votes == truth).numpy()
        report.baseline_knn = 100 * float(was_right.mean())
        report.drop = report.baseline_knn - report.knn
        report.drop_interval = paired_bootstrap(right, was_right)
        report.agreement = 100 * agreement(votes.numpy(), dense_votes.numpy())
