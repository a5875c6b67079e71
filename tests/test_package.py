"""The public names, and the rules that let `modeling/` travel to the Hub."""

import re
from pathlib import Path

import pytest
import torch
from helpers import METHODS as ROWS
from helpers import SIZES, tiny_images, tiny_model
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import hf_tokenreduce
from hf_tokenreduce import ToMeConfig, reduce_tokens
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.modeling.hooks import Reducer
from hf_tokenreduce.modeling.methods import METHOD_CLASSES


MODELING = Path(hf_tokenreduce.__file__).parent / "modeling"
FILES = sorted(MODELING.glob("*.py"))
ALLOWED = {
    "collections",
    "contextlib",
    "contextvars",
    "dataclasses",
    "functools",
    "huggingface_hub",
    "inspect",
    "itertools",
    "math",
}
ALLOWED |= {"numbers", "pathlib", "re", "sys", "torch", "transformers", "typing"}


def test_public_names():
    configurations = [method.config_class.__name__ for method in METHODS.values()]
    assert sorted(hf_tokenreduce.__all__) == sorted(
        [
            *configurations,
            "Method",
            "TokenReduceDeiTConfig",
            "TokenReduceDeiTForImageClassification",
            "TokenReduceDeiTForImageClassificationWithTeacher",
            "TokenReduceDeiTModel",
            "TokenReduceViTConfig",
            "TokenReduceViTForImageClassification",
            "TokenReduceViTModel",
            "calibrate",
            "export",
            "load_exported",
            "load_thresholds",
            "reduce_tokens",
            "register_method",
            "restore",
            "save_thresholds",
            "tune",
            "unmerge",
        ]
    )
    assert all(hasattr(hf_tokenreduce, name) for name in hf_tokenreduce.__all__)


def test_every_method_has_a_configuration_a_module_and_a_description():
    rows = {setting.method for setting, _ in ROWS.values()}
    assert set(METHODS) == set(METHOD_CLASSES) == rows  # a method that is lost leaves its row behind
    assert all(method.config_class is METHOD_CLASSES[name].config for name, method in METHODS.items())
    assert all(
        config.method == name and issubclass(reducer, Reducer) for name, (config, reducer) in METHOD_CLASSES.items()
    )


def test_no_room_asks_for_a_method_by_its_name():
    """What it wants to know stands in the method's description."""
    names = "|".join(name for name in METHODS if name != "tome")  # which is the one in examples
    package = MODELING.parent
    own = {package / room / f"{name}.py" for room in ("modeling", "methods") for name in METHODS}
    rooms = set(package.rglob("*.py")) - own
    asking = {file.name for file in rooms if re.search(rf"[\"']({names})[\"']", file.read_text())}
    assert asking == {"convert.py", "recipes.py"}  # in the examples of their docstrings


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_modeling_files_can_travel(file):
    """By transformers' own rules: flat siblings, `from .name import x`, and no package that may be missing."""
    assert set(get_imports(file)) <= ALLOWED
    names = get_relative_imports(file)
    assert all((MODELING / f"{name}.py").is_file() for name in names), names
    relative = [
        line.strip() for line in file.read_text().splitlines() if line.strip().startswith(("from .", "import ."))
    ]
    assert sorted({line.split()[1].removeprefix(".") for line in relative}) == sorted(names)


def test_everything_a_model_needs_is_found_from_its_file():
    found = {Path(file).name for file in get_relative_import_files(MODELING / "modeling_tokenreduce.py")}
    assert found == {file.name for file in FILES} - {"__init__.py", "modeling_tokenreduce.py"}


def test_modeling_does_not_need_the_rest_of_the_package():
    for file in FILES:
        assert "from .." not in file.read_text()


def test_trainer_predictions_are_no_tuples(tmp_path):
    images, labels = tiny_images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2, report_to=[], use_cpu=True
    )
    trainer = Trainer(reduce_tokens(tiny_model(), ToMeConfig(r=5)), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    predictions = trainer.predict(rows)
    assert predictions.predictions.shape == (6, SIZES["num_labels"])
    assert (tmp_path / "checkpoint-2" / "modeling_tokenreduce.py").is_file()
