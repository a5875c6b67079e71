"""Write model cards from the configuration in a folder and the record of its run. What is unknown is left out."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoImageProcessor

from ..blame import blaming
from ..files import write_whole
from ..methods import METHODS, Method, method_of
from ..modeling.encoders import EncoderFacts, encoder_config, facts_of
from ..modeling.methods import parse_reduction
from ..modeling.multiply_adds import even_counts, even_share
from ..tasks import size_made_by
from .card_check import settings_rows
from .card_index import index_of
from .card_text import code, id_in, merge_body, merge_metadata, parse_metadata, plain, read_card, split
from .configuration import check_config, main_input_of, tower_of
from .contents import one_line
from .records import Record, accuracy, drop, measured_on, number, read_record, read_report, trained_how
from .usage import LEAST_TRANSFORMERS, NOT_NAMED, pipeline_tag, run, stock_of, usage


TEMPLATE = Path(__file__).with_name("card_template.md")
METRIC = "Top-1 accuracy, by hf_tokenreduce"  # an owner's own results have other names, and stay
PICTURES = ("token_map.png", "images/token_map.png")
ALWAYS_OURS = {"library_name", "model-index"}
BAR = 40


def model_card(
    folder: str | Path | None,
    *,
    record: Record | str | Path | None = None,
    base_model: str | None = None,
    base_license: str | None = None,
    dataset: str | None = None,
    repo_id: str | None = None,
    machine: str | None = None,
    report: str | Path | None = None,
    previous: str | None = None,
) -> str:
    """Make the card of a saved model.

    If the folder has a card already, only the sections and the metadata that this library writes are renewed; the
    owner's text stays.

    Args:
        folder: The folder that `save_pretrained` wrote. None makes the card of a record alone.
        record: The record of the run that made the model, or its file. By default record.json in the folder, if it is
            there.
        base_model: The Hub id of the base model, for the metadata. The record's own name for it stands in the text.
        base_license: The licence of the base model's weights, such as "apache-2.0". It holds for this model too.
        dataset: The Hub id of the data set, for the metadata. The record's own name for it stands in the text.
        repo_id: The Hub id under which the model will be published.
        machine: The machine on which the record's speed-up was measured, unless the record names it.
        report: The report.json that `evaluate_model` or `tokenreduce evaluate -o` wrote for this model. The card shows
            its numbers instead of those of the record.
        previous: The text of the card to renew. By default the folder's README.md.

    Returns:
        The text of the card: metadata in YAML, then Markdown.

    Example:
        >>> text = model_card("deit-tome", base_model="facebook/deit-small-patch16-224", base_license="apache-2.0")
    """
    for name, value in (("base_model", base_model), ("dataset", dataset), ("repo_id", repo_id)):
        _check_id(name, value)
    folder = None if folder is None else Path(folder)
    config = None
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} has no config.json. Save the model there first: model.save_pretrained(folder)."
            )
        config = check_config(folder)
        if record is None and (folder / "record.json").is_file():
            record = folder / "record.json"
    elif record is None:
        raise ValueError("A card needs a folder, a record, or both.")
    known = {} if record is None else dict(read_record(record))
    if report is not None:
        own = getattr(config, "reduction", None)
        evaluated = read_report(report)
        if config is not None and parse_reduction(evaluated.get("settings", own)) != own:
            raise ValueError(f"{report} is of a model with another reduction. Evaluate the model in {folder}.")
        if known.get("epochs") and evaluated.pop("dense", None):  # it was trained, so that model is beside it
            evaluated |= {"control_top1": evaluated["baseline_top1"], "baseline_top1": None}
        known = {"method": own and own.method, "settings": own and own.to_dict(), **known, **evaluated}
        known["evaluated_again"] = True
    if machine is not None and known.get("machine") is None:
        known["machine"] = machine
    reduction = _reduction(config, known)
    method = method_of(reduction)
    if config is not None and facts_of(config).num_prefix_tokens == 0:
        method = replace(
            method, summary=method.summary.replace("the class token attends", "the mean of all tokens attends")
        )
    if previous is None:
        previous = "" if folder is None else read_card(folder / "README.md")
    line_break = "\r\n" if "\r\n" in previous else "\n"
    block, old_body = split(previous.replace("\r\n", "\n"))
    named = id_in(old_body)
    repo_id = repo_id or (None if named == NOT_NAMED else named)
    title = repo_id.split("/")[-1] if repo_id else (folder.resolve().name if folder else _stem(record))
    present_metadata = parse_metadata(block)
    given = {"base_model": base_model, "license": base_license, "datasets": dataset}
    explicit = {name for name, value in given.items() if value}
    # What the card says already holds until something else is given.
    base_model, base_license = (given[name] or _one(present_metadata.get(name)) for name in ("base_model", "license"))
    task = "image-classification" if config is None else pipeline_tag(config)
    data = _metadata(
        known, method, title, base_model, base_license, dataset or _one(present_metadata.get("datasets")), task
    )
    block = merge_metadata(block, _changes(present_metadata, data, explicit))
    body = _body(folder, config, known, reduction, method, title, base_model, base_license, repo_id)
    if folder is not None and repo_id is not None:  # a title that this function wrote, before the id was known
        first = re.compile(rf"^# {re.escape(folder.resolve().name)}$", re.MULTILINE)
        old_body = first.sub(f"# {title}", old_body, count=1)
    text = f"---\n{block}---\n{merge_body(old_body, body)}"
    return text.replace("\n", line_break)


def write_card(folder: str | Path, **options: Any) -> Path:
    """Write the card of a saved model to README.md in its folder.

    Args:
        folder: The folder that `save_pretrained` wrote.
        options: The other arguments of `model_card`.

    Returns:
        The path of README.md.

    Example:
        >>> write_card("deit-tome", repo_id="your-name/deit-tome")
    """
    path = Path(folder) / "README.md"
    write_whole(path, model_card(folder, **options))
    return path


def write_cards(records_dir: str | Path, output_dir: str | Path, **options: Any) -> list[Path]:
    """Write a card for every JSON record of a folder, and README.md with a table that compares them.

    Args:
        records_dir: The folder with the records.
        output_dir: The folder for the cards. Cards that are there are renewed.
        options: Other arguments of `model_card`, the same for every card.

    Returns:
        The paths of the files that were written.
    """
    files = sorted(Path(records_dir).glob("*.json"))
    if not files:
        raise ValueError(f"There are no records in {records_dir}. They are the record.json files of training runs.")
    records = {file.stem: read_record(file) for file in files}
    if "README" in records:
        raise ValueError(f"{Path(records_dir) / 'README.json'}: give it another name, README.md is the table.")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for file in files:
        written.append(output_dir / f"{file.stem}.md")
        write_whole(written[-1], model_card(None, record=file, previous=read_card(written[-1]), **options))
    index = output_dir / "README.md"
    write_whole(index, merge_body(read_card(index), index_of(records)))
    return [*written, index]


def _reduction(config: Any, record: Record) -> Any:
    """Find the setting of the configuration. A record that names another setting is of another model: ValueError."""
    recorded = None
    if record.get("method") is not None:
        recorded = parse_reduction({**(record.get("settings") or {}), "method": record["method"]})
    if config is None:
        return recorded
    if record and (recorded is None) != (config.reduction is None):
        raise ValueError(f"The record is of another model: {recorded} there, {config.reduction} in config.json.")
    if recorded is not None and recorded.to_dict() != config.reduction.to_dict():
        raise ValueError(f"The record is of another model: {recorded} there, {config.reduction} in config.json.")
    tokens = record.get("tokens_per_layer")
    layers = facts_of(config).num_hidden_layers
    if tokens is not None and len(tokens) != layers:
        raise ValueError(f"The record is of another model: it has {len(tokens)} layers, config.json {layers}.")
    return config.reduction


def _body(
    folder: Path | None,
    config: Any,
    record: Record,
    reduction: Any,
    method: Method,
    title: str,
    base_model: str | None,
    base_license: str | None,
    repo_id: str | None,
) -> str:
    """Fill the template: everything of a card but its metadata."""
    import jinja2

    base = plain(record.get("base_model") or "")
    if base_model:
        base = f"[{base_model}](https://huggingface.co/{base_model})"
    audio = config is not None and main_input_of(stock_of(config)) == "input_values"
    kind = "An audio transformer" if audio else "A vision transformer"
    what = f"{base or kind} with token reduction by {method.title}" if reduction else base
    ratio, tokens = record.get("mult_adds_ratio"), record.get("tokens_per_layer")
    adaptive = reduction is not None and method.is_adaptive(reduction)
    if config is not None and reduction is not None and not adaptive:
        # By arithmetic, where no run says it: these methods keep the same of every image.
        facts = _facts_of_images(folder, config)
        try:
            tokens = even_counts(reduction, facts) if tokens is None else tokens
            ratio = even_share(reduction, facts) if ratio is None else ratio
        except ValueError:  # a method that came with a folder need not say how many tokens it keeps
            adaptive = True
    speedup = number(record, "speedup", 2)
    control = accuracy(record, "control_top1")
    lost = drop(record)
    gains = lost is not None and lost.startswith("-")
    lost = lost and lost.removeprefix("-")
    rows = [
        ("top-1", accuracy(record, "baseline_top1") or "", accuracy(record)),
        ("top-1 of a dense model, trained as long", control, None if control is None or reduction is None else ""),
        (
            f"points of top-1 {'gained' if gains else 'lost'}",
            "",
            lost and lost.removeprefix("-") if reduction else None,
        ),
        ("multiply-adds of the encoder", "1", None if ratio is None or reduction is None else f"{ratio:.2f}"),
        ("images per second", "1", speedup if reduction else None),
    ]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=plain(title),
        intro=f"{what or f'{kind}, not reduced'}, made with hf_tokenreduce.",
        method=method,
        picture=next((name for name in PICTURES if folder is not None and (folder / name).is_file()), None),
        settings=[] if reduction is None else settings_rows(reduction),
        results=[row for row in rows if row[2] is not None],
        has_baseline=reduction is not None,
        conditions=_conditions(record, speedup if reduction else None),
        tokens=None if tokens is None else _bars(tokens),
        prefix=_prefix(config),
        training=trained_how(record),
        commands=code("\n".join([*(record.get("earlier_commands") or []), record["command"]]))
        if record.get("command")
        else None,
        usage=None if config is None else usage(config, repo_id or NOT_NAMED),
        needs=LEAST_TRANSFORMERS,
        run=None if config is None else run(config),
        mixes=method.token_decoder is not None,
        adaptive=adaptive,
        limits=_limits(config, record, reduction, adaptive, base_license, "sound" if audio else "image"),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _facts_of_images(folder: Path | None, config: Any) -> EncoderFacts:
    """Return the facts of an encoder for images as the folder's image processor makes them. DINOv2 gets smaller ones
    than its configuration says."""
    facts = facts_of(config)
    if folder is None or not tower_of(config).any_size or not (folder / "preprocessor_config.json").is_file():
        return facts
    with blaming(str(folder), "preprocessor_config.json"):
        height, width = size_made_by(AutoImageProcessor.from_pretrained(folder))[1:]
    sides = tower_of(config).inputs(encoder_config(config))[1:]
    patch = [side // count for side, count in zip(sides, facts.grid, strict=True)]
    return facts._replace(grid=(height // patch[0], width // patch[1]))


def _prefix(config: Any) -> str:
    """Say in words which tokens are counted besides patches."""
    count = 1 if config is None else facts_of(config).num_prefix_tokens
    if count == 0:
        return ""
    if count == 1:
        return ", the class token included"
    registers = getattr(encoder_config(config), "num_register_tokens", 0)
    more = "the distillation token" if count == 2 and not registers else f"{count - 1} register{'s' * (count > 2)}"
    return f", the class token and {more} included"


def _conditions(record: Record, speedup: str | None) -> str:
    """Say on which images, data and machine the table's numbers were measured."""
    parts = []
    if record.get("top1") is not None:
        images, dataset = record.get("eval_images"), measured_on(record)
        counted = [f"{images:,} images"] if images else []
        seen = " of ".join(counted + ([plain(dataset)] if dataset else []))
        interval = ", with its 95 % interval by Wilson" if images else ""
        parts.append(f"Top-1{f' on {seen}' if seen else ''}{interval}.")
        if record.get("control_top1") is not None:
            parts.append("Points are counted against the dense model that was trained as long.")
    if speedup is not None:
        batch = record.get("speed_batch_size")
        on = plain(record["machine"]) if record.get("machine") else None
        known = ", ".join(filter(None, [batch and f"batch {batch}", on]))
        parts.append(f"Images per second against the dense model side by side{f' ({known})' if known else ''}.")
    return " ".join(parts)


def _limits(
    config: Any, record: Record, reduction: Any, adaptive: bool, base_license: str | None, thing: str
) -> list[str]:
    limits = []
    if record.get("top1") is not None:
        limits.append("The accuracy is that of the images named above; measure it on your own before you rely on it.")
    if record.get("chosen_by_evaluation"):
        where, there = "these images", ""
        if record.get("evaluated_again"):  # maybe on other images than those of the choice
            where, there = "the evaluation images of the training", " on those images"
        limits.append(f"Of several epochs the best on {where} was kept, so the accuracy{there} is somewhat too high.")
    if record.get("speedup") is not None and reduction is not None:
        limits.append("The speed-up is that of one machine and batch size; small batches and small models gain less.")
    if adaptive:
        limits.append(f"How many tokens are kept depends on the {thing}, and so does the time it takes.")
    elif reduction is not None:
        shows = "is heard" if thing == "sound" else "it shows"
        limits.append(f"Every {thing} keeps the same number of tokens, however much {shows}.")
    if reduction is not None and (config is None or not tower_of(config).wants_grid):
        limits.append(f"`last_hidden_state` has fewer tokens than the {thing} has patches.")
    elif reduction is not None:
        limits.append("Patches that share a token have equal features.")
    if config is not None:
        limits.append("Loading it runs the code of this repository: read it, and pin `revision`.")
    license_text = f"This card names {plain(base_license)}." if base_license else ""
    limits.append(f"The licence of the base model's weights holds for these too. {license_text}".strip())
    return limits


def _bars(tokens: list[float]) -> str:
    most = max(tokens) or 1
    lines = [f"layer {i:>2}  {n:>6.4g}  {'█' * round(BAR * n / most)}" for i, n in enumerate(tokens)]
    return code("\n".join(lines))


def _metadata(
    record: Record,
    method: Method,
    title: str,
    base_model: str | None,
    base_license: str | None,
    dataset: str | None,
    task: str,
) -> dict[str, Any]:
    tags = ["token-reduction", *([] if task.startswith("audio") else ["vision-transformer"]), "hf_tokenreduce"]
    tags += _tags_of(method)
    results = None
    name = measured_on(record)  # not `dataset`, which it was trained on
    if record.get("top1") is not None and name:
        results = [
            EvalResult(
                task_type=task,
                task_name=task.replace("-", " ").title(),
                dataset_type=dataset if dataset == name else "imagefolder",
                dataset_name=name,
                metric_type="accuracy",
                metric_name=METRIC,
                metric_value=round(record["top1"] / 100, 6),
            )
        ]
    return ModelCardData(
        base_model=base_model,
        license=base_license,
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=tags,
        metrics=["accuracy"] if results else None,
        model_name=title if results else None,
        eval_results=results,
    ).to_dict()


def _tags_of(method: Method) -> list[str]:
    """Return the tags that name a method and its paper."""
    if method.config_class.method is None:  # the dense model
        return []
    return [method.title.lower(), *([f"arxiv:{method.arxiv}"] if method.arxiv else [])]


def _changes(present_metadata: dict[str, Any], new_metadata: dict[str, Any], explicit: set[str]) -> dict[str, Any]:
    """Which metadata of the owner to change, and to what.

    Tags are added, but those of another method are removed. Results of other metrics are kept. The owner's value
    stands, unless this library always writes the key (`ALWAYS_OURS`) or its value was given just now (`explicit`).
    """
    changes = {
        name: value
        for name, value in new_metadata.items()
        if name not in present_metadata or name in ALWAYS_OURS | explicit
    }
    if "tags" in present_metadata:
        tags = present_metadata["tags"] if isinstance(present_metadata["tags"], list) else [present_metadata["tags"]]
        for others in map(_tags_of, METHODS.values()):
            if set(others) <= set(tags) and not set(others) & set(new_metadata["tags"]):  # it had this method before
                tags = [tag for tag in tags if tag not in others]
        changes["tags"] = tags + [tag for tag in new_metadata["tags"] if tag not in tags]
    if present_metadata.get("model-index"):
        try:
            name, present = model_index_to_eval_results(present_metadata["model-index"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"The card's model-index is malformed ({one_line(repr(error))}). Mend it first."
            ) from None
        kept = [result for result in present if result.metric_name != METRIC]
        if "model-index" in new_metadata:
            _, renewed = model_index_to_eval_results(new_metadata["model-index"])
            changes["model-index"] = eval_results_to_model_index(name, kept + renewed)
        elif len(kept) < len(present):  # an old result of ours would contradict the card
            changes["model-index"] = eval_results_to_model_index(name, kept) if kept else None
    return changes


def _check_id(name: str, value: str | None) -> None:
    if value is not None:
        try:
            validate_repo_id(value)
        except HFValidationError as error:
            raise ValueError(f"{name} must be an id on the Hub, got {value!r}: {one_line(error)}") from None


def _stem(record: Any) -> str:
    return Path(record).stem if isinstance(record, (str, Path)) else "A reduced vision transformer"


def _one(value: Any) -> str | None:
    """Return the name in metadata that can be one name or a list of names; None if there are several."""
    names = value if isinstance(value, list) else [value]
    return names[0] if len(names) == 1 and isinstance(names[0], str) else None
