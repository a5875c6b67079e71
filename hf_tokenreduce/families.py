"""Print the table of all encoders that can be reduced, for the documentation: `python -m hf_tokenreduce.families`."""

import transformers

from .modeling.encoders import COMPOSITES, READ_EVERY_PATCH, TOWERS, Tower, facts_of
from .modeling.methods import METHOD_CLASSES
from .tasks import task_of


HEADER = (
    "| encoder | models, by task | patches are scored by | its readers get | methods |",
    "|---|---|---|---|---|",
)


def families_table() -> str:
    """Make the Markdown table with one row for every encoder, and one row for models that contain an encoder.

    Returns:
        `str`: The table, without a line break at the end.

    Example:
        >>> print(families_table())
    """
    parts = f"| any of these, inside | {_by_task(COMPOSITES)} | as there | {_rows(True, True)} | as there |"
    return "\n".join([*HEADER, *map(_row, TOWERS), parts])


def _row(tower: Tower) -> str:
    facts = facts_of(getattr(transformers, tower.models[0]).config_class())
    scored = "the class token's attention" if facts.num_prefix_tokens else "the attention of the mean token"
    refused = {}
    for name, (config_class, _) in METHOD_CLASSES.items():
        try:
            config_class().check_fit(facts)
        except ValueError as error:
            refused[name] = str(error).split(". ")[0]
    methods = "all"
    if refused:
        methods = f"all but `{'`, `'.join(refused)}` ({'; '.join(refused.values())})"
    rows = _rows(tower.wants_grid, False)
    if set(tower.models) & set(READ_EVERY_PATCH):
        rows += " (of a backbone: its own last row)"
    return f"| `{tower.classes[0]}` | {_by_task(tower.models)} | {scored} | {rows} | {methods} |"


def _rows(wants_grid: bool, own_last: bool) -> str:
    if not wants_grid:
        return "a row per token that is left"
    return f"a row per patch; a dropped patch has {'its own last row' if own_last else 'the mean of the others'}"


def _by_task(models: tuple[str, ...]) -> str:
    tasks: dict[str, list[str]] = {}
    for model in models:
        tasks.setdefault(task_of(model).name, []).append(f"`{model}`")
    return "; ".join(f"{task}: {', '.join(names)}" for task, names in tasks.items())


if __name__ == "__main__":
    print(families_table())
