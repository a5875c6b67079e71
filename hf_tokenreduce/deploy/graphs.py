"""The formats of graphs: what each format needs, how it is written, and how its runtime is called.

A graph takes one tensor of inputs, (B, ...). It returns logits or features, (B, ...), and for adaptive methods also
the number of tokens that leave each layer, (B, L).
"""

import functools
import importlib
import importlib.util
import logging
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram
from torch.fx import config as tracing


OPSET = 20
INT64, BOOL = 7, 9  # numbers of these types in ONNX

REDUCER = "reducer."  # in ONNX and OpenVINO, the names of all nodes of a method's own networks begin with this

Run = Callable[[Tensor], list[Tensor]]
"""A function that runs a graph once, on as many inputs as it takes."""


class Format(NamedTuple):
    """A format of graphs.

    Attributes:
        writes: Packages that are needed to write it, by their import names.
        runs: Packages that are needed to run it, by their import names.
        extra: Extra of this package that installs them. "": none is needed.
        file: Name of the graph's file.
        is_code: Whether loading the file may run code that it holds.
        open: Opens a graph: (folder, number of threads, number of inputs or None, dtype) -> a function that runs it.
    """

    writes: tuple[str, ...]
    runs: tuple[str, ...]
    extra: str
    file: str
    is_code: bool
    open: Callable[[Path, int | None, int | None, str], Run]


def trace(module: nn.Module, inputs: Tensor, batch_size: int | None) -> ExportedProgram:
    """Trace a module that returns a tensor or a tuple of tensors, for `batch_size` inputs. None: any number."""
    example = inputs[: 2 if batch_size is None else batch_size]
    free = ({0: torch.export.Dim.DYNAMIC},) if batch_size is None else None
    with torch.no_grad(), quietly():
        try:
            program = torch.export.export(module, (example,), dynamic_shapes=free, strict=False)
        except (UserError, RuntimeError) as error:  # mostly because something depends on the values of an image
            raise ValueError(
                f"torch.export cannot follow the model ({_first_line(error)}). If it has a method of your own, make "
                "sure that no shape depends on the content of an image, or export it for one image with batch_size=1."
            ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it has paths of the files on this machine
    return program


def write(program: ExportedProgram, format: str, folder: Path, input_name: str, outputs: list[str]) -> None:
    """Write a traced program into a folder as a graph of a format."""
    file = folder / FORMATS[format].file
    if format == "torch":
        torch.export.save(program, file)
    elif format == "aoti":
        with quietly():
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    elif format == "onnx":
        _write_onnx(program, file, input_name, outputs)
    else:
        between = folder / "between"
        between.mkdir()
        _write_onnx(program, between / "model.onnx", input_name, outputs)
        to_openvino(between / "model.onnx", file)
        shutil.rmtree(between)


def to_openvino(onnx_file: Path, file: Path) -> None:
    """Convert an ONNX file to a graph for OpenVINO, in float32."""
    openvino = importlib.import_module("openvino")
    with quietly():
        openvino.save_model(openvino.convert_model(onnx_file), file, compress_to_fp16=False)


def _write_onnx(program: ExportedProgram, file: Path, input_name: str, outputs: list[str]) -> None:
    with quietly():
        try:
            found = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[input_name],
                output_names=outputs,
                custom_translation_table=_translations(),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            lacking = re.search(r"No ONNX function found for <OpOverload\(op='(.+?)', overload='(.+?)'", str(error))
            why = f"ONNX has no {lacking[1]}.{lacking[2]}" if lacking else _first_line(error)
            raise ValueError(
                f"The model cannot be written as ONNX, from which OpenVINO graphs are made too: {why}. Write the "
                "method without that operation, or use the format torch."
            ) from error
        assert found is not None
        for node in found.model.graph:
            if ".reducer" in node.metadata_props.get("pkg.torch.onnx.name_scopes", ""):
                node.name = REDUCER + str(node.name)
            node.metadata_props.clear()  # it is about modules of Python, and no runtime reads it
        found.save(file)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def quietly() -> Iterator[None]:
    """Hide the messages of exporters, which are of no use to users, but not their errors. Also turn off telemetry.

    OpenVINO's converter and NNCF would otherwise start a process each time to report what the user does. Torch would
    note for each node which lines of code it comes from. That takes time, and no graph keeps it.
    """
    notes_no_lines = getattr(tracing, "do_not_emit_stack_traces", False)  # older versions have no such option
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "nncf")]
    levels = [logger.level for logger in loggers]
    sender: Any = None
    if importlib.util.find_spec("openvino_telemetry") is not None:
        sender = importlib.import_module("openvino_telemetry.utils.sender").TelemetrySender
        send = sender.send
    try:
        if sender is not None:
            sender.send = lambda *message: None
        tracing.do_not_emit_stack_traces = True
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        tracing.do_not_emit_stack_traces = notes_no_lines
        if sender is not None:
            sender.send = send
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _translations() -> dict[Any, Any]:
    """Return ONNX translations of operations that torch does not translate, or translates badly.

    Among equal values, ONNX's TopK puts the lower index first, as a stable sort does. Torch's own translation of `max`
    searches twice, once for the value and once for its place.
    """
    op = importlib.import_module("onnxscript").opset18

    def axis(number: int) -> Any:
        return op.Constant(value_ints=[number])

    def stable_sort(self: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(self), axis(dim))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def largest(self: Any, dim: int, keepdim: bool = False) -> Any:
        values, places = op.TopK(self, axis(1), axis=dim, largest=1, sorted=1)
        return (values, places) if keepdim else (op.Squeeze(values, axis(dim)), op.Squeeze(places, axis(dim)))

    def highest_so_far(self: Any, dim: int) -> Any:
        """Return for each number the highest one up to it, and its place: (B, N) -> two (B, N)."""
        count = op.Gather(op.Shape(self), axis(1))
        up_to_it = op.Cast(op.Trilu(op.Expand(1.0, op.Concat(count, count, axis=0)), upper=0), to=BOOL)
        seen = op.Where(up_to_it, op.Unsqueeze(self, axis(1)), float("-inf"))
        return op.ReduceMax(seen, axis(2), keepdims=0), op.ArgMax(seen, axis=2, keepdims=0, select_last_index=1)

    def places_in_sorted(sorted_sequence: Any, self: Any) -> Any:
        """Count how many sorted values are below each number: sorted (B, N), numbers (B, G) -> (B, G)."""
        below = op.Less(op.Unsqueeze(sorted_sequence, axis(1)), op.Unsqueeze(self, axis(2)))
        return op.ReduceSum(op.Cast(below, to=INT64), axis(2), keepdims=0)

    return {
        torch.ops.aten.sort.stable: stable_sort,
        torch.ops.aten.max.dim: largest,
        torch.ops.aten.cummax.default: highest_so_far,
        torch.ops.aten.searchsorted.Tensor: places_in_sorted,
    }


def _open_onnx(folder: Path, threads: int | None, batch_size: int | None, dtype: str) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    # Otherwise its threads wait busily for the next call, and slow down what runs in between.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    session = runtime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in session.run(None, {name: inputs.float().cpu().numpy()})]

    return run


@functools.cache
def openvino_core() -> Any:
    """Give the one `openvino.Core` of this process.

    It is never dropped. OpenVINO (seen in 2026.4.1) gives the thread a signal stack for each Core that compiles. When
    two are dropped in the order in which they were made, a stack that is freed stays in place, and the next signal
    with a handler (Ctrl-C, or the end of a process that a DataLoader started) ends the whole process.
    """
    return importlib.import_module("openvino").Core()


def _open_openvino(folder: Path, threads: int | None, batch_size: int | None, dtype: str) -> Run:
    core = openvino_core()
    # OpenVINO's own default may be bfloat16, where numbers differ in the second digit.
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    graph = core.read_model(folder / "openvino_model.xml")
    if batch_size is not None and graph.input().partial_shape[0].is_dynamic:
        # With a known number of images, no operator has to compute the shape of its output in every call.
        graph.reshape([batch_size, *[size.get_length() for size in list(graph.input().partial_shape)[1:]]])
    compiled = core.compile_model(graph, "CPU", options)
    request, lock = compiled.create_infer_request(), threading.Lock()

    # The default keeps the two objects alive, because a request needs them.
    def run(inputs: Tensor, kept: Any = (graph, compiled)) -> list[Tensor]:
        with lock:  # the request writes what it finds into the same memory in each call
            found = request.infer([inputs.float().cpu().numpy()])
            return [torch.from_numpy(found[output].copy()) for output in found]

    return run


def _open_torch(folder: Path, threads: int | None, batch_size: int | None, dtype: str) -> Run:
    module = torch.export.load(folder / "model.pt2").module()

    def run(inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():  # the weights of the program still ask for gradients
            return _listed(module(inputs))

    return run


def _open_aoti(folder: Path, threads: int | None, batch_size: int | None, dtype: str) -> Run:
    load: Any = torch._inductor.aoti_load_package
    module = load(str(folder / "model.pt2"))
    return lambda inputs: _listed(module(inputs))


def _listed(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


FORMATS = {
    "onnx": Format(("onnx", "onnxscript"), ("onnxruntime",), "onnx", "model.onnx", False, _open_onnx),
    "openvino": Format(("onnx", "onnxscript"), ("openvino",), "openvino", "openvino_model.xml", False, _open_openvino),
    "torch": Format((), (), "", "model.pt2", True, _open_torch),
    "aoti": Format((), (), "", "model.pt2", True, _open_aoti),
}


def check_format(format: str, writes: bool = False, more: tuple[str, ...] = ()) -> None:
    """Raise a ValueError if there is no such format, or an ImportError if packages are missing that run it.

    With `writes` the packages that write it must be there too, and so must the packages `more`.
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}. The formats are: {', '.join(FORMATS)}.")
    wanted, extra = FORMATS[format], FORMATS[format].extra
    packages = (*(wanted.writes if writes else ()), *wanted.runs, *more)
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The format {format} needs {', '.join(missing)}: pip install 'hf-tokenreduce[{extra}]', or pip install "
            f"{' '.join(missing)}."
        )
    if writes and format == "aoti" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ValueError(
            "The format aoti compiles C++, but there is no compiler here. Install g++, or use the format torch."
        )
