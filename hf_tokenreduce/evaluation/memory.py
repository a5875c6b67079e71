"""Peak memory of one forward pass: on CUDA from torch's own counters, on a CPU in a separate process.

`python -m hf_tokenreduce.evaluation.memory MODEL IMAGES THREADS` is that process. It prints the number of MiB.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.dynamic_module_utils import init_hf_modules
from transformers.utils import logging


MIB = 2**20

logger = logging.get_logger(__name__)


def peak_memory(model: nn.Module, pixel_values: Tensor) -> float | None:
    """Measure the peak memory of one forward pass, in MiB above what the model and the images take.

    Returns None on a CPU where Linux's /proc is missing, and with a warning if the model cannot be given to another
    process: because of a lambda as a hook, or a method from a file that cannot be imported there.
    """
    if pixel_values.is_cuda:
        return _on_cuda(model, pixel_values)
    if not Path("/proc/self/clear_refs").exists():
        return None
    package = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("model.pt", "images.pt")]
        torch.save(pixel_values, files[1])
        try:
            torch.save(model, files[0])
        except Exception as error:  # what cannot be pickled raises many kinds of errors
            _warn(str(error))
            return None
        done = subprocess.run(
            [sys.executable, "-m", __name__, *files, str(torch.get_num_threads())],
            capture_output=True,
            text=True,
            # malloc keeps freed blocks below this size. It gives larger ones back to the system, so the peak is real.
            env={
                **os.environ,
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
            },
        )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]  # "" if the system has killed it
        _warn(f"that process ended with {done.returncode}. {last}")
        return None
    return float(done.stdout.split()[-1])


def _warn(reason: str) -> None:
    """Warn once. Speeds were measured before, and an error would lose them."""
    logger.warning_once(f"Peak memory is left out, because the model cannot run in another process: {reason}")


def _on_cuda(model: nn.Module, pixel_values: Tensor) -> float:
    device = pixel_values.device
    with torch.no_grad():
        model(pixel_values)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(pixel_values)
        torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _resident(field: str) -> float:
    """Read a memory field of this process from /proc, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def main() -> None:
    model_file, images_file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    init_hf_modules()  # unpickling may import code that came with a model's repository
    # Both files were written by the process that started this one.
    model = torch.load(model_file, weights_only=False).eval()
    pixel_values = torch.load(images_file)
    with torch.no_grad():
        model(pixel_values[:1])
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident("VmRSS")
        model(pixel_values)
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    main()
