"""What `benchmark` takes as the dense model, and what it leaves out if a profiler fails."""

from types import SimpleNamespace

import torch
from families import family_inputs, family_model
from helpers import tiny_images, tiny_model

from hf_tokenreduce.evaluation import benchmark
from hf_tokenreduce.evaluation import breakdown as parts


def test_an_mae_is_timed_without_masks():
    """A stock MAE computes a quarter of its patches, and its reduced models begin with all."""
    mae, lengths = family_model("mae"), set()
    mae.config.mask_ratio = 0.75
    pixels = family_inputs("mae")["pixel_values"]

    def note(module, given, output):
        if type(module).__name__ == "ViTMAELayer":
            lengths.add((output[0] if isinstance(output, tuple) else output).shape[-2])

    def timer(run):
        handle = torch.nn.modules.module.register_module_forward_hook(note)
        run()
        handle.remove()
        return 1.0

    options = {"breakdown": False, "memory": False, "progress": False, "repeats": 1, "warmup": 0, "timer": timer}
    row = benchmark({"mae": mae}, pixels, batch_sizes=[1], **options).row("mae")
    assert lengths == {row.tokens["mean"]} and row.tokens["mean"] > 10
    assert mae.config.mask_ratio == 0.75


def test_a_profiler_without_times_loses_no_speeds(monkeypatch):
    monkeypatch.setattr(parts, "profile", lambda **options: _Silent())
    assert parts.breakdown(tiny_model(), tiny_images(1), repeats=1) is None


class _Silent(SimpleNamespace):
    """A profiler that has seen nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def events(self):
        return []
