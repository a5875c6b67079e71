"""Training, compiling and copying reduced models of every family."""

import copy
import io
from itertools import product

import pytest
import torch
from families import FAMILIES, cases, family_inputs, family_model, layers_of, main_rows
from helpers import METHODS, enable_checkpointing, reduce_tiny, slow
from naive_families import anatomy, attend
from peft import LoraConfig, get_peft_model
from test_families_naive import images_of, run_and_watch

from hf_tokenreduce import ATSConfig, TopKConfig, reduce_tokens
from hf_tokenreduce.modeling.encoders import encoder_of


COMPILED_FAMILIES = ("beit", "siglip-vision", "clip-vision")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("setting", [ATSConfig(layers=(0,)), TopKConfig(keep_rate=0.5, layers=(0,))])
@pytest.mark.parametrize("family", ["dinov2", "dinov3", "beit", "dinov2-registers"])
def test_drop_path_drops_an_image_as_a_whole(family, setting):
    """Also where the rows of all images are packed into one: each branch of a layer is there twice as strong, or not
    at all, for all tokens of an image, and images differ."""
    stock = family_model(family, drop_path_rate=0.5)
    inputs = family_inputs(family, 8)
    tower = encoder_of(stock).module
    blocks, prefix, _ = anatomy(tower, inputs["pixel_values"][0])
    model = reduce_tokens(stock, setting).train()
    drawn, ropes = [], [None]
    if family == "dinov3":  # in train mode it moves the places at random, so those of this forward are caught
        model.rope_embeddings.register_forward_hook(lambda *given: ropes.append(given[2]))
    with torch.no_grad():
        _, seen = run_and_watch(model, inputs)
        entering, leaving, block = seen[2], seen[3], blocks[3]
        for index, (before, after) in enumerate(zip(images_of(entering), images_of(leaving), strict=True)):
            origin = entering.origin[index, : len(before) - prefix] if entering.origin is not None else []
            places = [*range(prefix), *(prefix + int(patch) for patch in origin)]
            branch, *_ = attend(block, block.norm_before(before), places, None, ropes[-1], prefix)
            branch = block.after_attention(branch)
            matches = []
            for first, second in product((0.0, 2.0), repeat=2):
                middle = before + first * branch
                expected = middle + second * block.after_mlp(block.mlp(block.norm_after(middle)))
                if torch.allclose(after, expected, rtol=1e-4, atol=1e-4):
                    matches.append((first, second))
            assert len(matches) == 1
            drawn += matches
    assert {first for first, _ in drawn} == {second for _, second in drawn} == {0.0, 2.0}


def gradients_of(model, inputs, reentrant):
    model.train()
    if reentrant is not None:
        enable_checkpointing(model, {"use_reentrant": reentrant})
    pixels = next(name for name in ("pixel_values", "input_values") if name in inputs)
    inputs = {**inputs, pixels: inputs[pixels].clone().requires_grad_()}
    torch.manual_seed(0)  # what is dropped, or turned at random, is the same each time
    output = model(**inputs)
    main = main_rows(output)
    main.pow(2).sum().backward()
    return [main.detach(), output.token_counts.float(), inputs[pixels].grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(("family", "method"), cases(("tome", "ats", "ltmp", "sit")))
def test_gradient_checkpointing_changes_nothing(family, method):
    inputs = family_inputs(family)
    # The stock model cannot: the bias that all its layers share has a graph of its own, which one backward uses up.
    ways = (None, False) if family == "beit-shared" else (None, False, True)
    plain, *checkpointed = (
        gradients_of(reduce_tiny(family_model(family), METHODS[method][0]), inputs, reentrant) for reentrant in ways
    )
    # Gradients that are zero but for rounding, those of the keys' biases, are as exact as the others are large.
    scale = max(1.0, *(found.abs().max().item() for found in plain if found is not None))
    for found in checkpointed:
        for theirs, ours in zip(plain, found, strict=True):
            if theirs is None or ours is None:  # what nothing depends on has no gradient, or zeros
                assert not any(gradient is not None and gradient.any() for gradient in (theirs, ours))
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize(("family", "method"), cases(("tome", "ats", "bat", "ltmp"), ("dinov2", "clip", "beit")))
def test_every_weight_of_an_encoder_learns(family, method):
    model = reduce_tiny(family_model(family), METHODS[method][0]).train()
    output = model(**family_inputs(family))
    main_rows(output).pow(2).mean().backward()
    for layer in layers_of(model):
        for name, parameter in layer.named_parameters():
            if not name.startswith("reducer."):
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                # A bias of all keys alike leaves attention as it was.
                assert name.endswith("k_proj.bias") or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *cases(("tome", "evit", "topk", "bat", "sit", "dlvit-share"), ("dinov3",)),
        *cases(("tome",), ("clip", *COMPILED_FAMILIES)),
        *[
            slow(*case)
            for case in cases(("evit", "topk", "bat", "sit", "dlvit-share"), ("beit", "siglip-vision", "clip-vision"))
        ],
    ],
)
def test_compiled_is_eager(fresh_compiler, family, method):
    model = reduce_tiny(family_model(family), METHODS[method][0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in (2, 3):
            inputs = family_inputs(family, seed=seed)
            ours, theirs = compiled(**inputs, output_patch_map=True), model(**inputs, output_patch_map=True)
            torch.testing.assert_close(main_rows(ours), main_rows(theirs), rtol=1e-4, atol=1e-5)
            assert torch.equal(ours.token_counts, theirs.token_counts)
            if method == "sit":
                torch.testing.assert_close(ours.patch_weights, theirs.patch_weights, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(ours.patch_map, theirs.patch_map)


@pytest.mark.parametrize(
    ("family", "method"), [("dinov3", "tome"), ("beit", "tome"), ("beit-shared", None), ("siglip-vision", "topk")]
)
def test_export(family, method):
    """Traced, a stock model makes a mask that masks nothing."""
    model = reduce_tokens(family_model(family), None if method is None else METHODS[method][0])
    program = torch.export.export(model, (family_inputs(family)["pixel_values"],)).module()
    images = family_inputs(family, seed=5)["pixel_values"]
    torch.testing.assert_close(main_rows(program(images)), main_rows(model(images)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["tome", "ats"])
@pytest.mark.parametrize("family", ["dinov2", "clip"])
def test_lora(family, method):
    reduced = reduce_tokens(family_model(family), METHODS[method][0])
    inputs = family_inputs(family, 2)
    inputs |= {"return_loss": True} if family == "clip" else {"labels": torch.tensor([0, 3])}
    before = main_rows(reduced(**inputs))
    model = get_peft_model(reduced, LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(main_rows(model(**inputs)), before)
    model.train()
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned and all("lora_" in name for name in learned)
    assert sum("layer" in name and "q_proj.lora_A" in name for name in learned) == (4 if family == "dinov2" else 6)
    optimizer = torch.optim.Adam(learned.values(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.abs().sum() > 0 for parameter in learned.values())
    merged = model.merge_and_unload().eval()
    assert type(merged) is type(reduced)
    model.eval()
    assert (main_rows(merged(**inputs)) - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["tome", "ltmp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_compute_the_same(family, method):
    model = reduce_tiny(family_model(family), METHODS[method][0])
    inputs = family_inputs(family)
    copies = [copy.deepcopy(model)]
    # A model that captures hidden states, as backbones do from the start, cannot be pickled, reduced or not.
    if "backbone" not in family and family != "depth-anything":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
    with torch.no_grad():
        expected = model(**inputs, output_patch_map=True)
        for copied in copies:
            assert type(copied) is type(model)
            output = copied(**inputs, output_patch_map=True)
            assert torch.equal(main_rows(output), main_rows(expected))
            assert torch.equal(output.patch_map, expected.patch_map)
            # It shares nothing with the model it was made of.
            for parameter in copied.parameters():
                parameter.zero_()
        assert torch.equal(main_rows(model(**inputs, output_patch_map=True)), main_rows(expected))
