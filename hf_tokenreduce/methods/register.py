"""`register_method`: methods of others."""

import inspect
import re
import sys
from dataclasses import is_dataclass
from pathlib import Path

from transformers.dynamic_module_utils import get_imports

from ..modeling import methods as travelling
from ..modeling.configuration_base import ReductionConfig
from ..modeling.hooks import Reducer
from .method import Method


ALLOWED = {"torch", "transformers", "hf_tokenreduce"}


def register_method(config_class: type[ReductionConfig], reducer_class: type[Reducer], method: Method) -> None:
    """Add a method, which then works in `reduce_tokens`, `compare`, `show`, training and cards.

    A model that runs it is saved with the method's file, and loads where neither this package nor that file is.

    Args:
        config_class: A frozen dataclass, subclass of `ReductionConfig`, with a `method` name that is not taken.
        reducer_class: A subclass of `Reducer`, in the same file. That file imports torch, transformers and the
            standard library, and of this package only `from hf_tokenreduce.modeling.<file> import <name>`; anything
            else must stand inside `try:`.
        method (`Method`): What the rest of the package reads of it.

    Example:
        >>> register_method(RandomConfig, RandomReducer, Method(RandomConfig, "Random", "pruning", "Drops any."))
        >>> model = reduce_tokens(model, RandomConfig(keep_rate=0.7))
    """
    from . import METHODS

    name = getattr(config_class, "method", None)
    if not (
        inspect.isclass(config_class) and issubclass(config_class, ReductionConfig) and is_dataclass(config_class)
    ):
        raise ValueError(f"config_class must be a dataclass that extends ReductionConfig, got {config_class!r}.")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(
            f"{config_class.__name__} needs a method name of small letters, digits, - and _, such as "
            f'method: ClassVar[str | None] = "random". Got {name!r}.'
        )
    if name in METHODS or name in travelling.METHOD_CLASSES:
        raise ValueError(f"There is a method {name!r} already. Choose another name than {', '.join(METHODS)}.")
    if not (inspect.isclass(reducer_class) and issubclass(reducer_class, Reducer)):
        raise ValueError(f"reducer_class must extend Reducer, got {reducer_class!r}.")
    if not hasattr(Reducer, config_class.hook) or getattr(reducer_class, config_class.hook) is getattr(
        Reducer, config_class.hook
    ):
        raise ValueError(
            f"{config_class.__name__} says that it acts in {config_class.hook!r}, which {reducer_class.__name__} does "
            "not override. Set hook: ClassVar[str] to the method of Reducer that it overrides."
        )
    if not isinstance(method, Method) or method.config_class is not config_class:
        raise ValueError(f"method must be a Method that describes {config_class.__name__}, got {method!r}.")
    _check_file(config_class, reducer_class)
    travelling.METHOD_CLASSES[name] = travelling.MethodClasses(config_class, reducer_class)
    METHODS[name] = method


def _check_file(config_class: type, reducer_class: type) -> None:
    """Whether the file of the method can travel to the Hub."""
    module = sys.modules[config_class.__module__]
    if reducer_class.__module__ != config_class.__module__ or not getattr(module, "__file__", None):
        raise ValueError(
            f"{config_class.__name__} and {reducer_class.__name__} must be in one file, which is saved with the model."
        )
    file = Path(str(module.__file__))
    if (Path(travelling.__file__).parent / file.name).exists():
        raise ValueError(f"A file {file.name} is saved with every model already. Give the method's file another name.")
    others = {found for found in get_imports(file) if found not in sys.stdlib_module_names} - ALLOWED
    code = re.sub(r"^\s*try\s*:.*?^\s*except.*?:", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    bad = re.findall(
        r"^\s*(?:import hf_tokenreduce.*|from hf_tokenreduce(?!\.modeling\.\w+ import).*)$", code, re.MULTILINE
    )
    if others or bad:
        raise ValueError(
            f"{file.name} is saved with the model, so it can import torch, transformers and the standard library, and "
            f"`from hf_tokenreduce.modeling.<file> import <name>`. Put into try: {', '.join([*sorted(others), *bad])}."
        )
