"""Keep results as they come, in one process or several, so that nothing is computed twice."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn

from ..files import known_settings, write_whole


# Values of a configuration that do not change what a model computes, or that its weights tell already.
ONLY_TOLD = (
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
    "hf_tokenreduce_version", "id2label", "label2id", "problem_type", "calibrated_share",
)  # fmt: skip

Progress = dict[str, Any]
"""The results of a batch: `rows`, and under each other name a list with one value per row."""


class Processes(NamedTuple):
    """The processes that were launched together.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
        state: State of `accelerate`. None: there is only one process.
    """

    rank: int = 0
    world: int = 1
    state: Any = None

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def launched_processes(device: torch.device) -> Processes:
    """Find the processes that `accelerate launch` or `torchrun` started together."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched == 1:
        return Processes()
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but they do not know each other. On a machine without accelerators, "
            "make the first PartialState or Accelerator with cpu=True."
        )
    return Processes(state.process_index, state.num_processes, state)


def check_one_process(what: str) -> None:
    """Raise an error if several processes were launched together for something that runs in one."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1:
        raise ValueError(
            f"{what} runs in one process, but {launched} were launched. Start it without accelerate launch or "
            "torchrun."
        )


class Records:
    """The results of each row. With a folder, each process appends a line per batch to its own file there.

    At the beginning, each process reads what all files hold.

    Args:
        folder: Folder of the files. None: nothing is kept.
        settings: What the results depend on. A folder with another `settings.json` is refused.
        processes: The processes that share the rows.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any], processes: Processes):
        self.folder = None if folder is None else Path(folder)
        self.processes = processes
        self.done: dict[int, dict[str, Any]] = {}
        self.file: Path | None = None
        if self.folder is None:
            return
        self.file = self.folder / f"part-{processes.rank}.jsonl"
        settings = json.loads(json.dumps(settings, default=str))
        known = self.folder / "settings.json"
        others = [name for name in ("config.json", "report.json") if (self.folder / name).is_file()]
        if others and not known.is_file():
            raise ValueError(f"output_dir {folder} holds {others[0]}, which is not of this work. Name another folder.")
        processes.wait()
        if processes.rank == 0 and not known.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(known, json.dumps(settings, indent=1))
        processes.wait()
        known_settings(known, settings)
        for part in sorted(self.folder.glob("part-*.jsonl")):
            for record in read_lines(part):
                self._take(record)
        processes.wait()  # no process writes before all have read

    def add(self, record: Progress) -> None:
        self._take(record)
        if self.file is not None:
            append_line(self.file, record)

    def gather(self) -> dict[int, dict[str, Any]]:
        """Return the results of all processes by row. A row that two of them computed counts once."""
        if self.processes.world == 1:
            return self.done
        return {row: values for part in gather_object([self.done]) for row, values in part.items()}

    def finish(self, report: dict[str, Any]) -> None:
        """Write `report.json`."""
        if self.folder is not None and self.processes.rank == 0:
            write_whole(self.folder / "report.json", json.dumps(report, indent=1))
        self.processes.wait()

    def _take(self, record: Progress) -> None:
        names = [name for name in record if name != "rows"]
        for place, row in enumerate(record["rows"]):
            self.done[row] = {name: record[name][place] for name in names}


def read_lines(file: Path) -> list[Any]:
    """Read the records of a file, without a line that a killed process left unfinished."""
    records = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append_line(file: Path, record: Any) -> None:
    """Append a record to a file as one line of JSON."""
    with file.open("ab+") as lines:
        # If the last line is unfinished, begin a new one: otherwise this record would be lost with it.
        if lines.tell() > 0:
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        lines.write(json.dumps(record).encode() + b"\n")


def digest_of_model(model: nn.Module) -> str:
    """Return a digest of a model's weights, its reduction and its configuration, without the names of classes."""
    named = (item for name, tensor in sorted(model.state_dict().items()) for item in (name.encode(), _bytes(tensor)))
    config: Any = model.config
    how = [type(model).__name__, _what_computes(config.to_dict())]
    return digest([json.dumps(how, sort_keys=True, default=str).encode(), *named])


def _what_computes(config: Any) -> Any:
    """Return the values of a configuration that can change what a model computes."""
    if not isinstance(config, dict):
        return config
    return {str(name): _what_computes(value) for name, value in config.items() if name not in ONLY_TOLD}


def digest_of_data(dataset: Dataset, image_column: str, labels: list[int]) -> str:
    """Return a digest of the labels and of the names, sizes and middle bytes of the image files."""

    def parts() -> Iterable[bytes]:
        yield json.dumps(labels).encode()
        if getattr(dataset.features[image_column], "decode", None) is None:
            return
        encoded = dataset.with_format("arrow").select_columns(image_column)
        for table in encoded.iter(1000):
            for image in table[image_column]:
                name, content = image["path"].as_py(), image["bytes"]
                yield "/".join(Path(name).parts[-2:] if name else ()).encode()
                if content.is_valid:
                    yield from _some_of(io.BytesIO(content.as_buffer()))
                elif name and os.path.isfile(name):
                    with open(name, "rb") as file:
                        yield from _some_of(file)

    return digest(parts())


def _some_of(file: Any) -> Iterator[bytes]:
    """Return the size of an open file, and bytes from its middle. Files of other pixels can have the same size."""
    size = file.seek(0, os.SEEK_END)
    file.seek(size // 2)
    yield str(size).encode()
    yield file.read(1024)


def digest(parts: Iterable[Any]) -> str:
    """Return a digest of several parts, each bytes or a buffer."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
        sha.update(b"\0")
    return sha.hexdigest()[:32]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
