"""The benchmark: its arithmetic by a clock that the tests set, its oracle, where it says time goes."""

import importlib.util
import itertools
import json
import logging
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import BACKBONES, METHODS, ONE_OF_EACH, reduce_tiny, slow, tiny_images, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTModel

from hf_tokenreduce import (
    ATSConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    reduce_tokens,
    restore,
)
from hf_tokenreduce.evaluation import BenchmarkReport, benchmark, combine, speed
from hf_tokenreduce.evaluation.breakdown import PARTS, breakdown
from hf_tokenreduce.evaluation.memory import peak_memory
from hf_tokenreduce.evaluation.oracle import SliceOracle
from hf_tokenreduce.evaluation.paying import weaker_first
from hf_tokenreduce.evaluation.runtimes import usual_device
from hf_tokenreduce.modeling import tokens, tome
from hf_tokenreduce.modeling.encoders import facts_of
from hf_tokenreduce.modeling.multiply_adds import even_share
from hf_tokenreduce.timing import median_ratio, seconds_of


QUICK = {"breakdown": False, "memory": False, "suggest": False, "progress": False, "warmup": 1}


class FakeClock:
    """Seconds by the tokens that a model's MLPs see, which it listens to."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        self.calls += 1
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(output.numel()) if type(module).__name__.endswith("MLP") else None
        )
        call()
        handle.remove()
        return sum(seen)


def test_ratios_are_those_of_the_clock():
    dense = tiny_model()
    models = {"tome": reduce_tokens(dense, ToMeConfig(r=7)), "same": reduce_tokens(dense, ToMeConfig(r=0))}
    clock = FakeClock()
    report = benchmark(models, tiny_images(5), batch_sizes=(1, 2), repeats=3, timer=clock, **QUICK)
    # warm-up and three repeats of dense, two models and their two oracles, at two batch sizes
    assert clock.calls == 4 * 5 * 2
    for batch_size in (1, 2):
        row = report.row("tome", batch_size)
        counts = [58, 51, 44, 1]  # in the last layer, of the class token alone
        assert row.speedup == pytest.approx(4 * 65 / sum(counts))
        assert row.speedup_interval == pytest.approx((row.speedup, row.speedup))
        assert row.oracle_share == 1.0 and row.over_padded is None
        assert row.tokens == {"mean": 37.0, "min": 37.0, "max": 37.0}
        assert row.p50_ms == row.p95_ms == 1000 * sum(counts) * 48 * batch_size
        assert row.images_per_second == pytest.approx(1 / (sum(counts) * 48))
        assert report.row("dense", batch_size).speedup == 1.0
        assert report.row("same", batch_size).speedup == 4 * 65 / (3 * 65 + 1)


def test_intervals_are_of_ratios_within_a_repeat():
    """Noise that all models of a repeat share leaves no spread; noise of single calls does."""
    dense = tiny_model()
    models = {"dense": dense, "same": reduce_tokens(dense, None), "tome": reduce_tokens(dense, ToMeConfig(r=7))}
    calls = iter(range(1000))
    shared = benchmark(models, tiny_images(2), batch_sizes=[2], repeats=8, oracle=False, **QUICK,
                       timer=lambda call: 1.0 + next(calls) // 3)  # fmt: skip
    assert shared.row("tome").speedup_interval == (1.0, 1.0)
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    single = benchmark(models, tiny_images(2), batch_sizes=[2], repeats=21, oracle=False, **QUICK,
                       timer=lambda call: 1.0 + 0.2 * noise.pop())  # fmt: skip
    low, high = single.row("same").speedup_interval
    assert low < 1.0 < high and high - low < 0.2


@pytest.mark.parametrize("repeats", [6, 11, 15, 51])
def test_intervals_hold_the_median_as_often_as_they_say(repeats):
    noise = torch.randn(2000, repeats, generator=torch.Generator().manual_seed(0)).exp()
    intervals = [median_ratio(row, [1.0] * repeats)[1] for row in noise.tolist()]
    held = sum(low <= 1 <= high for low, high in intervals) / len(intervals)
    assert 0.94 < held <= 1 and all(low > 0 for low, _ in intervals)
    assert median_ratio([3.0], [2.0]) == (1.5, (1.5, 1.5))


def test_the_clock_is_read_around_a_forward_and_nothing_else(monkeypatch):
    """The clock of this test goes on only while a model runs, so the speed-up is exactly that of the forwards."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def costs(model, seconds):
        model.register_forward_pre_hook(lambda module, given: now.__setitem__(0, now[0] + seconds))
        return model

    dense = tiny_model()
    models = {"dense": costs(dense, 3.0), "again": costs(reduce_tokens(tiny_model(), None), 2.0)}
    report = benchmark(models, tiny_images(4), batch_sizes=[4], repeats=15, **QUICK)
    row = report.row("again")
    assert row.speedup == 1.5 and row.speedup_interval == (1.5, 1.5)
    assert report.settings["threads"] == torch.get_num_threads() and report.settings["attention"] == "sdpa"


def test_other_devices_are_waited_for(monkeypatch):
    """A call returns before an Apple GPU is done, so its end must be waited for, and that of what ran before."""
    now, left = [0.0], [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def synchronize(device):
        assert device.type == "mps"
        now[0], left[0] = now[0] + left[0], 0.0

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    assert seconds_of(lambda: left.__setitem__(0, left[0] + 2.0), torch.device("mps")) == 2.0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_adaptive_methods_are_held_against_both_oracles(backbone):
    dense = tiny_model(backbone)
    models = {"ltmp": reduce_tiny(dense, METHODS["ltmp"][0]), "ats": reduce_tiny(dense, METHODS["ats"][0])}
    report = benchmark(models, tiny_images(4), batch_sizes=[4], repeats=2, timer=FakeClock(), **QUICK)
    assert [row.name for row in report.rows] == ["dense", "ltmp", "ats"]
    for name in models:
        row = report.row(name)
        assert row.oracle_share == pytest.approx(1.0, abs=0.02)  # the oracle's numbers of tokens are rounded
        assert (row.over_padded > 1.02) == (row.tokens["min"] < row.tokens["max"])
        assert row.tokens["min"] <= row.tokens["mean"] <= row.tokens["max"]
    assert report.row("ats").tokens["min"] < report.row("ats").tokens["max"]


@pytest.mark.parametrize("hook", ["before_encoder", "select_queries", "after_attention", "after_layer"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_oracle_that_cuts_nothing_is_the_dense_model(backbone, hook):
    stock, images = tiny_model(backbone), tiny_images(2)
    length = 66 if backbone.startswith("deit") else 65
    oracle = SliceOracle(stock, hook, [length] * 4)
    with torch.no_grad():
        torch.testing.assert_close(oracle(images), stock(images).logits)
        oracle.lengths = [40, 30, 20, 10]
        seen = []
        handles = [layer.mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
                   for layer in oracle.model.base_model.layers]  # fmt: skip
        assert oracle(images).shape == (2, 5)
    for handle in handles:
        handle.remove()
    assert seen == ([length, 40, 30, 20] if hook == "after_layer" else [40, 30, 20, 10])


def test_an_oracle_of_a_base_model():
    stock = tiny_model("vit", {"vit": (ViTModel, ViTConfig)})
    with torch.no_grad():
        expected = stock(tiny_images(2)).pooler_output
        torch.testing.assert_close(SliceOracle(stock, "after_attention", [65] * 4)(tiny_images(2)), expected)


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize("planted", [None, "scoring", "moving", "linear", "attention", "other"])
def test_time_planted_in_a_part_shows_there(monkeypatch, planted):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    layer = model.base_model.layers[0]
    spots = {
        "scoring": (tome, "match_most_similar"),
        "moving": (tokens, "move"),  # which apply_map calls
        "linear": (layer.attention.k_proj, "forward"),
        "attention": (nn.functional, "scaled_dot_product_attention"),
        "other": (layer.layernorm_before, "forward"),
    }
    if planted is not None:
        owner, name = spots[planted]
        original = getattr(owner, name)

        def slow(*args, **kwargs):
            busy(0.15)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)
    shares = breakdown(model, tiny_images(2), repeats=1)
    assert set(shares) == {*PARTS, "other"} and sum(shares.values()) == pytest.approx(1.0)
    assert all(share > 0 for share in shares.values())
    if planted is not None:
        assert shares[planted] > 0.5, shares


@pytest.mark.parametrize("method", [name if name in ONE_OF_EACH else slow(name) for name in METHODS])
def test_a_breakdown_leaves_no_trace(method):
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    functions = {name: getattr(tokens, name) for name in ("apply_map", "move")}
    with torch.no_grad():
        expected = model(tiny_images(2)).logits
        shares = breakdown(model, tiny_images(2), repeats=1)
        assert torch.equal(model(tiny_images(2)).logits, expected)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert functions == {name: getattr(tokens, name) for name in functions}
    assert shares["moving"] > 0 and shares["scoring"] > 0
    dense = breakdown(restore(model), tiny_images(2), repeats=1)
    assert dense["moving"] == dense["scoring"] == 0


def test_memory_in_a_process_of_its_own():
    wide = tiny_model(hidden_size=192, intermediate_size=768, image_size=64)
    images = tiny_images(48, size=64)
    dense = peak_memory(wide, images)
    reduced = peak_memory(reduce_tokens(wide, EViTConfig(keep_rate=0.05, layers=(0,))), images)
    if dense is None:
        pytest.skip("peak memory of a CPU is read from Linux's /proc")
    mlp = 48 * 257 * 768 * 4 / 2**20
    assert dense > mlp > reduced - mlp
    assert reduced < dense


@pytest.fixture
def from_a_file(tmp_path):
    """A module of a file that no other process can import, with a module of torch."""
    code = "import torch\nclass Silent(torch.nn.Module):\n    def forward(self, *given):\n        return None\n"
    (tmp_path / "of_mine.py").write_text(code)
    spec = importlib.util.spec_from_file_location("of_mine", tmp_path / "of_mine.py")
    sys.modules["of_mine"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["of_mine"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_speeds_stay_where_memory_cannot_be_measured(from_a_file, caplog, monkeypatch):
    hooked, foreign = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    hooked.register_forward_hook(lambda module, given, output: None)
    foreign.of_mine = from_a_file.Silent()
    monkeypatch.setattr(logging.getLogger("hf_tokenreduce"), "propagate", True)
    for model, why in ((hooked, "lambda"), (foreign, "No module named 'of_mine'")):
        caplog.clear()
        report = benchmark({"dense": model}, tiny_images(1), batch_sizes=[1], repeats=1, **{**QUICK, "memory": True})
        row = report.row("dense")
        assert row.p50_ms > 0 and row.peak_memory_mib is None and row.memory_over_dense is None
        assert "dense" in report.to_markdown()
        (warning,) = [one.message for one in caplog.records if "Peak memory is left out" in one.message]
        assert why in warning


def test_other_types_and_all_measurements(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "peak_memory", lambda model, images: 40.0 - 10 * hasattr(model.config, "reduction"))
    models = {"tome": reduce_tokens(tiny_model(), ToMeConfig(r=7))}
    report = benchmark(models, tiny_images(2), batch_sizes=[2], dtypes=("float32", "bfloat16"), repeats=2,
                       threads=1, progress=False)  # fmt: skip
    assert models["tome"].dtype == torch.float32
    assert [(row.name, row.dtype) for row in report.rows] == [
        (name, dtype) for dtype in ("float32", "bfloat16") for name in ("dense", "tome")
    ]
    assert [row.memory_over_dense for row in report.rows] == [1.0, 0.75, 1.0, 0.75]
    assert all(sum(row.breakdown.values()) == pytest.approx(1) for row in report.rows)
    report.save(tmp_path / "report.json")
    again = BenchmarkReport.load(tmp_path / "report.json")
    assert again == report
    text = report.to_markdown()
    assert (
        text.count("| tome | eager | 2 | float32 |") == 1
        and text.count("| tome | 2 | float32 |") == 1
        and "scoring" in text
    )
    widths = {line.count("|") for line in text.split("Share")[0].splitlines() if line.startswith("|")}
    assert widths == {15}


def test_compiled_models_are_compared_with_the_compiled_dense_one(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(type(model).__name__) or model)
    dense = tiny_model()
    models = {"tome": reduce_tokens(dense, ToMeConfig(r=7)), "ats": reduce_tokens(dense, ATSConfig(layers=(1, 2)))}
    report = benchmark(models, tiny_images(2), batch_sizes=[2], repeats=1, runtimes=["compiled"], **QUICK)
    assert [row.runtime for row in report.rows] == ["compiled", "compiled", "eager"]
    assert compiled == ["ViTForImageClassification", "TokenReduceViTForImageClassification", "SliceOracle"]


def test_memory_and_parts_are_those_of_eager_rows(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(speed, "peak_memory", lambda model, images: 40.0)
    options = {**QUICK, "memory": True, "breakdown": True, "oracle": False, "runtimes": ["eager", "compiled"]}
    report = benchmark({"dense": tiny_model()}, tiny_images(2), batch_sizes=[2], repeats=1, **options)
    eager, compiled = report.rows
    assert eager.peak_memory_mib == 40 and eager.breakdown
    assert compiled.runtime == "compiled" and compiled.peak_memory_mib is None and compiled.breakdown is None
    assert "compiled" in report.to_markdown()


@pytest.mark.parametrize("runtime", ["onnx", slow("openvino-int8")])
def test_graphs_are_compared_with_the_graph_of_the_dense_model(runtime):
    for package in ("onnxruntime", "nncf"):
        pytest.importorskip(package)
    dense = tiny_model(num_hidden_layers=2)
    settings = {"tome": ToMeConfig(r=7), "ats": ATSConfig(layers=(1,))}
    models = {"dense": dense, **{name: reduce_tokens(dense, setting) for name, setting in settings.items()}}
    clock = FakeClock()  # a graph runs no module of PyTorch, so for the clock it takes no time: here it takes a second
    options = {"repeats": 1, "runtimes": ["eager", runtime], "timer": lambda call: clock(call) or 1.0}
    report = benchmark(models, tiny_images(4), batch_sizes=[2], **QUICK | options)
    assert [(row.name, row.runtime) for row in report.rows] == [
        ("dense", "eager"), ("tome", "eager"), ("ats", "eager"), ("dense", runtime), ("tome", runtime),
    ]  # fmt: skip
    if runtime == "onnx":
        half = {"runtimes": ["onnx"], "dtypes": ["bfloat16"], "batch_sizes": [2]}
        with pytest.raises(ValueError, match="Nothing can be timed: dense in onnx at batch 2"):
            benchmark({"dense": dense}, tiny_images(4), **half, **QUICK)
    else:
        half = {"runtimes": ["openvino"], "dtypes": ["bfloat16"], "batch_sizes": [2], "repeats": 1, "oracle": False}
        assert benchmark({"dense": dense}, tiny_images(4), **half, **QUICK).row("dense").dtype == "bfloat16"
    assert report.left_out == [f"ats in {runtime} at batch 2: its graph takes one image at a time"]
    row, first = report.row("tome", runtime=runtime), report.row("dense", runtime="eager").p50_ms
    assert row.p50_ms == 1000 and row.oracle_share == row.speedup == 1.0 and row.speedup_over_first == first / 1000
    assert f"Left out: ats in {runtime}" in report.to_markdown()
    with pytest.raises(ValueError, match=r"There is no runtime tflite\. The runtimes are: eager, compiled, onnx"):
        benchmark(models, tiny_images(4), runtimes=["tflite"])


class WorkClock(TorchDispatchMode):
    """Seconds by what is done: so much for each operation, and a little for each number that comes of it."""

    def __init__(self, per_operation):
        super().__init__()
        self.per_operation, self.seconds = per_operation, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        numbers = result.numel() if isinstance(result, torch.Tensor) else 0
        self.seconds += self.per_operation + 1e-6 * numbers
        return result

    def __call__(self, call):
        self.seconds = 0.0
        with self:
            call()
        return self.seconds


def test_what_does_not_pay_is_said_with_the_nearest_that_does():
    models = {
        "tome": reduce_tokens(tiny_model(), ToMeConfig(r=2)),
        "evit": reduce_tokens(tiny_model(), EViTConfig(layers=(1, 2))),
    }
    options = {**QUICK, "suggest": True, "oracle": False, "batch_sizes": [1], "repeats": 6}
    cheap = benchmark(models, tiny_images(1), timer=WorkClock(1e-9), **options)
    assert (
        all(row.pays and row.nearest is None for row in cheap.rows if row.method) and "pay" not in cheap.to_markdown()
    )
    report = benchmark(models, tiny_images(1), timer=WorkClock(1e-3), **options)
    row = report.row("tome")
    assert (
        not row.pays
        and f"tome does not pay on this device at batch 1 in float32, eager: {row.speedup:.2f} x dense"
        in (report.to_markdown())
    )
    # Of the prices of an operation there is one at which this setting does not pay, and another one does.
    for price in (3e-4, 1e-4, 3e-5, 2e-5, 1e-5, 5e-6):
        found = benchmark({"tome": models["tome"]}, tiny_images(1), timer=WorkClock(price), **options)
        if found.row("tome").nearest is not None:
            break
    setting, speedup = found.row("tome").nearest
    assert not found.row("tome").pays
    assert setting["method"] == "tome" and speedup > 1 and json.dumps(setting) in found.to_markdown()
    again = reduce_tokens(tiny_model(), setting)
    assert benchmark({"tome": again}, tiny_images(1), timer=WorkClock(price), **options).row("tome").pays
    assert BenchmarkReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_settings_that_are_tried_take_less_and_less():
    facts = facts_of(ViTConfig())
    for setting in (
        ToMeConfig.for_budget(facts, 0.8),
        EViTConfig.for_budget(facts, 0.8),
        DLViTConfig(keep_rate=0.8, trained=True),
    ):
        shares = [even_share(one, facts) for one in weaker_first(setting, facts)]
        assert len(shares) > 5 and 0.25 < shares[-1] < 0.35 and 0.7 < shares[0] < 0.81
        assert all(later < share + 0.005 for share, later in itertools.pairwise(shares))
    first = next(weaker_first(ToMeConfig.for_budget(facts, 0.8), facts))
    assert [layer for layer, r in enumerate(first.r) if r] == [3, 6, 9] and 0.79 < even_share(first, facts) <= 0.8
    assert not list(weaker_first(LTMPConfig(), facts)) and not list(weaker_first(SiTConfig(), facts))


def report_of(**settings):
    models = {settings.pop("name", "tome"): reduce_tokens(tiny_model(), ToMeConfig(r=7))}
    report = benchmark(models, tiny_images(2), batch_sizes=[1], repeats=1, timer=lambda call: 1.0, **QUICK)
    report.settings |= settings
    return report


def test_reports_are_combined_if_measured_alike():
    both = combine([report_of(), report_of(name="other").to_dict()])
    assert [row.name for row in both.rows] == ["dense", "tome", "other"]
    for name, value in {
        "threads": 64,
        "dtypes": ["float16"],
        "attention": "eager",
        "device": "H",
        "torch": "1",
    }.items():
        with pytest.raises(ValueError, match=f"cannot be compared: {name} is"):
            combine([report_of(), report_of(name="other", **{name: value})])
    with pytest.raises(ValueError, match="Two reports have a row"):
        combine([report_of(), report_of()])
    with pytest.raises(ValueError, match="no reports"):
        combine([])
    with pytest.raises(ValueError, match="Name one of"):
        both.row("unknown")


def test_what_cannot_be_timed():
    dense, images = tiny_model(), tiny_images(1)
    wide = tiny_model(hidden_size=96)
    eager = reduce_tokens(tiny_model(attn_implementation="eager"), LTMPConfig())
    for models, pixels, options, message in (
        ({}, images, {}, "nothing to time"),
        ({"net": nn.Linear(2, 2)}, images, {}, "'net' is a Linear"),
        ({"a": dense, "b": wide}, images, {}, r"differs from the first model in \['hidden_size'\]"),
        ({"a": dense, "b": eager}, images, {}, "different attention kernels"),
        ({"a": dense}, images[0], {}, "pixel_values must be"),
        ({"a": dense}, images, {"batch_sizes": [0]}, "must be at least 1"),
        ({"a": dense}, images, {"repeats": 0}, "must be at least 1"),
        ({"a": dense}, images, {"dtypes": ["int8"]}, "not a floating type"),
        ({"a": dense}, images, {"device": "gpu"}, "device='gpu' is no device of torch. Use cpu, cuda"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark(models, pixels, **{"repeats": 1, **options}, **QUICK)


def test_graphs_on_the_cpu_need_no_device_option(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usual_device(["eager", "compiled"]) == "cuda" and usual_device(["eager", "openvino"]) == "cpu"
