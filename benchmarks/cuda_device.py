"""Check and measure this package on one CUDA device, in one run of at most 8 minutes.

    make bench-cuda                          # or: python benchmarks/cuda_device.py
    python benchmarks/cuda_device.py --smoke        # the same on the CPU with tiny models, as a trial

The parts are:

- correct: every method and layout is compared with the CPU, and the attention kernel of variable length with the loop.
- compiled: models compiled into CUDA graphs are compared with the eager ones, and timed.
- waits: counts how often the host waits for the device.
- weighing, merging: compare ways to weigh keys in attention, and to merge.
- speed_recorded: the kernels of each even method, started by one CUDA graph, are timed beside the dense model and
  beside the ideal.
- speed: the same for every method, where the host starts each kernel.
- profile: the kernels that take most time.

What is not timed runs first, in many processes at once, because a compiler keeps one core busy for half a minute. What
is timed has the device to itself. Each process has a time limit, and writes each result at once. A failure is
reported and the rest goes on. A run that was stopped goes on where it stopped.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from cuda_checks import compiled, correct, waits
from cuda_models import COMPILED, COMPILED_CELLS, Bench
from cuda_report import table
from cuda_timed import merging, profile, speed, speed_recorded, weighing
from transformers.utils import logging

import hf_tokenreduce
from hf_tokenreduce.evaluation.resume import digest
from hf_tokenreduce.evaluation.speed import device_name
from hf_tokenreduce.files import refuse_other_settings


HERE = Path(__file__).parent
PARTS: dict[str, Callable[..., Any]] = {
    part.__name__: part for part in (correct, compiled, waits, weighing, merging, speed_recorded, speed, profile)
}
# Parts that run at the same time, with the number of processes of each on a machine of 16 cores, and their share of
# the time.
STAGES: list[tuple[dict[str, int], float]] = [
    ({"correct": 1, "waits": 1, "compiled": len(COMPILED) * len(COMPILED_CELLS)}, 0.44),
    ({"weighing": 1}, 0.08),
    ({"merging": 1}, 0.06),
    ({"speed_recorded": 1}, 0.2),
    ({"speed": 1}, 0.16),
    ({"profile": 1}, 0.06),
]
READY_SHARE = 0.85  # what is not compiled after this share of its stage is not timed


def run_part(name: str, folder: Path, smoke: bool, index: int, count: int) -> None:
    """Run every `count`-th task of a part, from number `index` on, and write each result as it comes."""
    logging.set_verbosity_error()
    known = {row["key"] for row in rows_of(name, folder) if "found" in row}
    options = {"turns": folder / "turns"} if name == "compiled" and count > 1 else {}
    for key, task in list(PARTS[name](Bench(smoke), **options))[index::count]:
        if key in known:
            continue
        try:
            with torch.no_grad():
                answer: dict[str, Any] = {"found": task()}
        except Exception as error:  # a failure is reported, and the rest goes on
            answer = {"failed": f"{type(error).__name__}: {error}"[:500]}
        with (folder / f"{name}-{index}.jsonl").open("a") as lines:
            lines.write(json.dumps({"key": key, **answer}) + "\n")


def rows_of(part: str, folder: Path) -> list[dict[str, Any]]:
    """Read what all processes of a part have found so far."""
    rows = []
    for file in sorted(folder.glob(f"{part}-*.jsonl")):
        for line in file.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # a process that was killed while it wrote leaves half a line
                rows.append(json.loads(line))
    return list({row["key"]: row for row in rows}.values())  # what failed and was tried again counts once


def run_stage(counts: dict[str, int], seconds: float, start: Callable[..., Any], folder: Path) -> dict[str, str]:
    """Run parts at the same time, and return which were stopped and why."""
    turns = folder / "turns"
    shutil.rmtree(turns, ignore_errors=True)
    turns.mkdir()
    running = [(part, start(part, index, count)) for part, count in counts.items() for index in range(count)]
    began, stopped = time.monotonic(), {}

    def stop(part: str, process: Any) -> None:
        process.kill()
        process.wait()
        stopped[part] = f"The part was stopped after {time.monotonic() - began:.0f} s. Run it again to continue."

    while any(process.poll() is None for _, process in running):
        spent = time.monotonic() - began
        alive = [(part, process) for part, process in running if process.poll() is None]
        if "compiled" in counts and not (turns / "quiet").exists():
            late = [(part, process) for part, process in alive if not (turns / f"ready-{process.pid}").exists()]
            if not late or spent > READY_SHARE * seconds:
                for part, process in late:  # it would compile while others are timed
                    stop(part, process)
                (turns / "quiet").touch()
        if spent > seconds:
            for part, process in alive:
                stop(part, process)
        time.sleep(0.1)
    for part, process in running:
        if process.poll() and part not in stopped:
            stopped[part] = f"The part stopped with exit code {process.poll()}."
    shutil.rmtree(turns)
    return stopped


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="Run on the CPU, with tiny models.")
    parser.add_argument("--output_dir", type=Path, default=HERE / "results", help="Folder for the results.")
    parser.add_argument("--minutes", type=float, default=8, help="Stop after this time, all parts together.")
    parser.add_argument("--part", choices=PARTS, help="Run only this part, in this process.")
    parser.add_argument("--slice", type=int, nargs=2, default=(0, 1), help="Run every n-th task: the first, and n.")
    parser.add_argument("--report", type=Path, help="Only write the report of this folder of parts; needs no GPU.")
    args = parser.parse_args(arguments)
    if args.report:
        print(report(args.report))
        return
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device. With --smoke everything runs on the CPU.")
    name = "smoke" if args.smoke else re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).strip("-").lower()
    folder = args.output_dir / f"cuda-{name}.parts"
    folder.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_part(args.part, folder, args.smoke, *args.slice)
        return
    now, before = about(args.smoke, args.minutes), folder / "about.json"
    if before.is_file():  # numbers of other code must not get today's date
        same = {name: now[name] for name in ("device", "torch", "transformers", "code")}
        refuse_other_settings(folder, json.loads(before.read_text()), same)
    before.write_text(json.dumps(now))

    def start(part: str, index: int, count: int) -> Any:
        command = [sys.executable, __file__, "--part", part, "--output_dir", str(args.output_dir)]
        command += ["--slice", str(index), str(count)] + (["--smoke"] if args.smoke else [])
        # Several processes compile at once, so each does it on a few cores.
        cores = {} if args.smoke else {"TORCHINDUCTOR_COMPILE_THREADS": "3", "OMP_NUM_THREADS": "4"}
        return subprocess.Popen(command, env={**os.environ, **cores})

    stopped: dict[str, str] = {}
    for counts, share in STAGES:
        seconds = 60 * args.minutes * share
        if args.smoke:  # on two cores, and with much time
            counts, seconds = dict.fromkeys(counts, 1), 900.0
        print(f"{', '.join(counts)}: at most {seconds:.0f} s", flush=True)
        stopped |= run_stage(counts, seconds, start, folder)
    (folder / "stopped.json").write_text(json.dumps(stopped))
    print(report(folder))


def about(smoke: bool, minutes: float) -> dict[str, Any]:
    """Name the device and the versions."""
    return {
        "device": device_name(torch.device("cpu" if smoke else "cuda")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_tokenreduce": hf_tokenreduce.__version__,
        "code": digest(file.read_bytes() for file in sorted(Path(hf_tokenreduce.__file__).parent.rglob("*.py"))),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "minutes": minutes,
    }


def report(folder: Path) -> str:
    """Write what is known so far, as JSON and as Markdown, and tell what failed."""
    parts = {part: rows for part in PARTS if (rows := rows_of(part, folder))}
    stopped = json.loads((folder / "stopped.json").read_text()) if (folder / "stopped.json").is_file() else {}
    found = {**json.loads((folder / "about.json").read_text()), "stopped": stopped, "parts": parts}
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(found, indent=1) + "\n")
    meanings = {part: (run.__doc__ or "").split("\n\n")[0].strip() for part, run in PARTS.items()}
    file.with_suffix(".md").write_text(table(found, meanings) + "\n")
    failed = [f"{part}: {row['key']}" for part, rows in parts.items() for row in rows if "failed" in row]
    return f"Saved to {file.with_suffix('.md')}. Failed: {', '.join(failed + list(stopped)) or 'nothing'}."


if __name__ == "__main__":
    main()
