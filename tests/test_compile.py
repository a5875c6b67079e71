"""Even methods have static shapes: one graph, no recompilation for a second batch of the same shape."""

import pytest
import torch
from helpers import BACKBONES, EVEN, METHODS, reduce_tiny, slow, tiny_images, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

from hf_tokenreduce import LTMPConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.evaluation.runtimes import MainOutput, compiled, many_compiled


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_equals_eager(backbone, method, backend, grad):
    model = reduce_tiny(tiny_model(backbone), METHODS[method][0])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for seed in (2, 3):
            images = tiny_images(seed=seed)
            ours = compiled(images, output_patch_map=True)
            theirs = model(images, output_patch_map=True)
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
            if theirs.patch_map is None:
                torch.testing.assert_close(ours.patch_weights, theirs.patch_weights, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(ours.patch_map, theirs.patch_map)
            assert torch.equal(ours.token_counts, theirs.token_counts)
    assert counter.frame_count == 1
    if grad:
        model.zero_grad()
        compiled(images).logits.pow(2).sum().backward()
        learned = [p for p in model.parameters() if p.requires_grad]
        ours = [p.grad.clone() for p in learned]
        model.zero_grad()
        model(images).logits.pow(2).sum().backward()
        for a, p in zip(ours, learned, strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        ("vit", "bat"),
        ("vit", "sit"),
        ("deit-teacher", "tome"),
    ],
)
def test_one_graph(backbone, method):
    compiled_equals_eager(backbone, method, "aot_eager", grad=True)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", EVEN)
def test_one_graph_everywhere(backbone, method):
    compiled_equals_eager(backbone, method, "aot_eager", grad=True)


@pytest.mark.parametrize("method", ["tome", slow("bat")])
def test_inductor(method):
    compiled_equals_eager("vit", method, "inductor", grad=False)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit", "deit"])
@pytest.mark.parametrize("method", ["tome", "evit", "topk", "bat", "sit", "dlvit-share"])
def test_inductor_trains(backbone, method):
    compiled_equals_eager(backbone, method, "inductor", grad=True)


@pytest.mark.parametrize("method", EVEN)
def test_export(method):
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    program = torch.export.export(model, (tiny_images(),))
    output = program.module()(tiny_images(seed=5))
    torch.testing.assert_close(output.logits, model(tiny_images(seed=5)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants, which is right here
@pytest.mark.parametrize("method", EVEN)
def test_traced(method):
    """fvcore counts by torch.jit.trace, and converters for phones begin with it. It knows fewer operations."""
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    with torch.no_grad():
        traced = torch.jit.trace(MainOutput(model), tiny_images(), check_trace=False)
        others = tiny_images(seed=5)
        torch.testing.assert_close(traced(others), model(others).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", EVEN)
def test_a_trace_of_one_image_runs_with_any_number(method):
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    with torch.no_grad():
        traced = torch.jit.trace(MainOutput(model), tiny_images(1), check_trace=False)
        torch.testing.assert_close(traced(tiny_images()), model(tiny_images()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", ["ats", "ltmp", "dlvit"])
def test_a_trace_would_fix_what_an_adaptive_method_keeps(method):
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    with torch.no_grad(), pytest.raises(ValueError, match="would fix the number of tokens"):
        torch.jit.trace(MainOutput(model), tiny_images(), check_trace=False)


def test_a_benchmark_compiles_as_many_models_as_it_gets():
    """All of them have the same forward, and torch would run the ninth eagerly."""
    stock = tiny_model(num_hidden_layers=1)
    with many_compiled():
        for number in range(10):
            model, counter = reduce_tiny(stock, ToMeConfig(r=number % 3 + 1)), CompileCounterWithBackend("eager")
            run = compiled(model, torch.device("cpu"), backend=counter)
            expected = model(tiny_images()).logits
            torch.testing.assert_close(run(tiny_images()).logits, expected, rtol=1e-4, atol=1e-5)
            assert counter.frame_count == 1


def test_a_part_that_is_compiled_alone_hides_nothing_silently():
    """The layers inside cannot tell the model outside where tokens went."""
    images, labels = tiny_images(2), torch.tensor([0, 1])
    model = reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7))
    expected = model(images).logits
    model.vit.compile(backend="eager")
    torch.testing.assert_close(model(images).logits, expected)
    with pytest.raises(ValueError, match=r"A part of this model runs compiled.*Compile the whole model"):
        model(images, output_patch_map=True)
    learning = reduce_tokens(tiny_model(num_hidden_layers=2), LTMPConfig()).train()
    learning.vit.compile(backend="eager")
    with pytest.raises(ValueError, match="A part of this model runs compiled"):
        learning(images, labels=labels)
