"""`register_method`, which adds a method from outside the package."""

import ast
import atexit
import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.utils import cached_file

from ..modeling import methods as travelling
from ..modeling.configuration_base import ReductionConfig
from ..modeling.hooks import Reducer
from .method import Method


ALLOWED = {"torch", "transformers", *sys.stdlib_module_names}


def register_method(config_class: type[ReductionConfig], reducer_class: type[Reducer], method: Method) -> None:
    """Add a method of your own, which then works in `reduce_tokens`, `compare`, `show`, training and cards.

    A model that runs the method is saved with the method's file. It loads where this package and that file are not
    installed.

    Args:
        config_class: A frozen dataclass, subclass of `ReductionConfig`, with a `method` name that is not taken.
        reducer_class: A subclass of `Reducer`, in the same file. That file may import torch, transformers and the
            standard library, and from this package only `from hf_tokenreduce.modeling.<file> import <name>`. Other
            imports must be inside `try:`.
        method (`Method`): Its description, which the rest of the package reads.

    Raises:
        ValueError: If an argument does not fit. The message says what to change.

    Example:
        >>> register_method(RandomConfig, RandomReducer, Method(RandomConfig, "Random", "pruning", "Drops any."))
        >>> model = reduce_tokens(model, RandomConfig(keep_rate=0.7))
    """
    from . import METHODS

    if str(getattr(config_class, "__module__", "")).startswith("transformers_modules."):
        return  # a file in a published folder need not register itself, because its classes are found there
    name = getattr(config_class, "method", None)
    if not (inspect.isclass(config_class) and issubclass(config_class, ReductionConfig)):
        raise ValueError(f"config_class must be a dataclass that extends ReductionConfig, got {config_class!r}.")
    if "__dataclass_fields__" not in vars(config_class):
        raise ValueError(f"{config_class.__name__} is not a dataclass itself. Put @dataclass(frozen=True) above it.")
    if without := [f.name for f in fields(config_class) if not f.init or f.default is f.default_factory is MISSING]:
        raise ValueError(f"{config_class.__name__} has no default for {', '.join(without)}. Give every field one.")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(
            f"{config_class.__name__} needs a method name of small letters, digits, - and _, such as "
            f'method: ClassVar[str | None] = "random". Got {name!r}.'
        )
    if name in METHODS or name in travelling.METHOD_CLASSES:
        raise ValueError(f"There is a method {name!r} already. Choose another name than these: {', '.join(METHODS)}.")
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
    if method.needs == "labels" and method.why_not(config_class()) is None:
        raise ValueError(
            f"{method.title} needs labels, so its why_not must say what is missing until it has learned from them."
        )
    _check_file(config_class, reducer_class)
    travelling.METHOD_CLASSES[name] = travelling.MethodClasses(config_class, reducer_class)
    METHODS[name] = method


def _check_file(config_class: type, reducer_class: type) -> None:
    """Raise a `ValueError` if the file of the method cannot be saved with a model and run there."""
    module = sys.modules[config_class.__module__]
    if reducer_class.__module__ != config_class.__module__ or not getattr(module, "__file__", None):
        raise ValueError(
            f"{config_class.__name__} and {reducer_class.__name__} must be in one file, which is saved with the model."
        )
    file = Path(str(module.__file__))
    if (Path(travelling.__file__).parent / file.name).exists():
        raise ValueError(f"A file {file.name} is saved with every model already. Give the method's file another name.")
    if not file.stem.isidentifier():
        raise ValueError(f"{file.name} is imported by its name where the model is loaded. Name it like a variable.")
    if bad := sorted(set(_imports_that_stay_behind(file))):
        raise ValueError(
            f"{file.name} is saved with the model, so it can import torch, transformers and the standard library, and "
            "`from hf_tokenreduce.modeling.<file> import <name>`. Remove these imports, or put them inside `try:` "
            f"with `except ImportError:`: {', '.join(bad)}."
        )


def _imports_that_stay_behind(file: Path) -> Iterator[str]:
    """List the imports that may fail where the model is loaded, except those inside a `try:`."""
    tree = ast.parse(file.read_bytes())
    guarded = {
        node for block in ast.walk(tree) if isinstance(block, ast.Try) and block.handlers
        for statement in block.body for node in ast.walk(statement)
    }  # fmt: skip
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] not in ALLOWED]
            yield from (f"import {name}" for name in names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            first = module.split(".")[0]
            if not (first in ALLOWED or re.fullmatch(r"hf_tokenreduce\.modeling\.\w+", module)):
                yield f"from {module} import ..."


def register_from_folder(name: str | Path, revision: str | None = None) -> None:
    """Register the method that a folder or Hub id brings along. This runs its code, so call it only if you trust it.

    `write_extra_method` wrote the file, so its imports of the files beside it become imports of the package again.
    Nothing happens if there is no such file, or if the method is known.

    Args:
        name: Folder or Hub id of a model.
        revision: Branch, tag or commit on the Hub.
    """
    from . import METHODS

    method, file, names = _method_and_file(str(name), revision)
    if method is None or file is None or method in METHODS:
        return
    module: Any = _run(file)
    if method in METHODS:  # it registered itself
        return
    if hasattr(module, "register"):
        module.register()
        return
    chosen: Any
    reducer: Any
    chosen, reducer = (getattr(module, one, None) for one in names)
    if not (inspect.isclass(chosen) and issubclass(chosen, ReductionConfig) and chosen.method == method):
        raise ValueError(f"{Path(file).name} of {name} must define {names[0]}, a configuration of {method!r}.")
    register_method(chosen, reducer, Method(chosen, str(method), "a method from outside this package", ""))


def _method_and_file(name: str, revision: str | None) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the method that a folder or Hub id names, and the file and the classes that `extra_methods.py` imports.

    What is missing or cannot be read is None. Loading the model says why.
    """
    where: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        config, table = (cached_file(name, file, **where) for file in ("config.json", "extra_methods.py"))
        if config is None or table is None:
            return None, None, ()
        values = json.loads(Path(config).read_text(encoding="utf-8"))
        line = r"^from \.(\w+) import (\w+), (\w+)"
        imported = re.search(line, Path(table).read_text(encoding="utf-8"), re.MULTILINE)
        file = None if imported is None else cached_file(name, f"{imported[1]}.py", **where)
    except (OSError, ValueError):
        return None, None, ()
    reduction = values.get("reduction") if isinstance(values, dict) else None
    method = reduction.get("method") if isinstance(reduction, dict) else None
    return (method if isinstance(method, str) else None), file, imported.groups()[1:] if imported else ()


def _run(file: str) -> ModuleType:
    """Run a copy of the file, whose imports are those of the package, and return its module."""
    own = "|".join(file.stem for file in Path(travelling.__file__).parent.glob("*.py"))
    code = Path(file).read_text(encoding="utf-8")
    code = re.sub(rf"(?m)^(\s*)from \.({own}) import", r"\1from hf_tokenreduce.modeling.\2 import", code)
    place = Path(tempfile.mkdtemp(prefix="tokenreduce-method-"))  # kept for models that are saved again
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    copy = place / Path(file).name
    copy.write_text(code, encoding="utf-8")
    name = f"tokenreduce_method_{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
