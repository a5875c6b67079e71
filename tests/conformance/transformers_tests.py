"""transformers' own tests as a package: `from transformers_tests.test_modeling_common import ModelTesterMixin`.

They lie in the folder that `fetch.py` filled, `$TRANSFORMERS_SOURCE`. `tests`, their name at home, is taken here.
"""

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import transformers


if "TRANSFORMERS_SOURCE" not in os.environ:
    pytest.skip("TRANSFORMERS_SOURCE is not set; make test-conformance sets it", allow_module_level=True)

__path__ = [str(Path(os.environ["TRANSFORMERS_SOURCE"]).resolve() / "tests")]


def stand_in(name: str, **contents: Any) -> None:
    """A module that those tests import and that the source distribution leaves out."""
    package = ModuleType(f"{__name__}.{name.partition('.')[0]}")
    package.__path__ = []
    module = ModuleType(f"{__name__}.{name}")
    vars(module).update(contents)
    sys.modules.update({package.__name__: package, module.__name__: module})


stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
stand_in(
    "utils.test_configuration_utils",
    config_common_kwargs={  # settings that every configuration takes, away from their defaults
        "chunk_size_feed_forward": 3,
        "dtype": "float16",
        "id2label": {0: "left", 1: "right", 2: "middle"},
        "label2id": {"left": 0, "right": 1, "middle": 2},
        "output_attentions": True,
        "output_hidden_states": True,
        "problem_type": "regression",
        "return_dict": False,
    },
)

# Where the pipeline tests look for the models they run. They want a summary of them at import; tests fill it in.
TINY_MODELS = tempfile.TemporaryDirectory(prefix="tiny_models_")
summary = Path(TINY_MODELS.name, "reports", "tiny_model_summary.json")
summary.parent.mkdir()
summary.write_text("{}")

with (
    mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=TINY_MODELS.name),
    # They would import transformers a second time, from the source distribution.
    mock.patch("transformers.utils.direct_transformers_import", return_value=transformers),
):
    from transformers_tests import test_configuration_common, test_pipeline_mixin  # noqa: F401
