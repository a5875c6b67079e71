"""What every method keeps on every backbone, whatever the attention kernel, the dtype or the batch."""

import copy

import pytest
import torch
from helpers import (
    BASES,
    EVEN,
    EVERY_CASE,
    METHODS,
    NEWER,
    NUM_PATCHES,
    enable_checkpointing,
    reduce_tiny,
    tiny_images,
    tiny_model,
)
from naive import naive_forward
from naive_adaptive import naive_adaptive
from naive_bat import naive_bat
from naive_newer import naive_newer
from naive_soft import naive_dlvit, naive_sit

from hf_tokenreduce import reduce_tokens, restore


ATTENTIONS = ["eager", "sdpa"]
KEEPS_EVERY_PATCH = ("bat", "bat-clusters", "evit", "ltmp-merge", "pitome", "mctf", "dtem")
matrix = pytest.mark.parametrize(("backbone", "method"), EVERY_CASE)


def reduced(backbone, method, **changes):
    return reduce_tiny(tiny_model(backbone, **changes), METHODS[method][0])


def where_patches_went(output):
    """The map of the patches, or where tokens are mixtures, their weights."""
    return output.patch_map if output.patch_weights is None else output.patch_weights


def same(ours, theirs):
    """Maps must be equal; weights are floats."""
    if ours.is_floating_point():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    else:
        assert torch.equal(ours, theirs)


def labels_for(backbone):
    return {} if backbone == "deit-teacher" else {"labels": torch.tensor([0, 3, 1])}


@pytest.mark.parametrize("attention", ATTENTIONS)
@matrix
def test_off_is_off(backbone, method, attention):
    stock = tiny_model(backbone, attn_implementation=attention)
    model = reduce_tiny(stock, METHODS[method][1])
    output = model(tiny_images(), output_patch_map=True, output_hidden_states=True)
    expected = stock(tiny_images(), output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    prefix = model.config.num_prefix_tokens
    assert torch.equal(output.patch_map, torch.arange(prefix, prefix + NUM_PATCHES).repeat(3, 1))
    assert (output.token_counts == prefix + NUM_PATCHES).all()


def naive(model, stock, image):
    """The plain version of what `model` does, for one image."""
    setting = model.config.reduction
    arguments = setting.to_dict()
    if setting.method == "ltmp":
        for kind in ("merge", "prune"):
            if arguments[kind]:
                thresholds = [getattr(layer.reducer, f"{kind}_threshold").item() for layer in model.base_model.layers]
                arguments[f"{kind}_thresholds"] = thresholds
        return naive_adaptive(stock, image, arguments)
    if setting.method == "ats":
        return naive_adaptive(stock, image, arguments)
    if setting.method == "bat":
        return naive_bat(stock, image, arguments)
    learned = [dict(layer.reducer.named_parameters()) for layer in model.base_model.layers]
    if setting.method in NEWER:
        return naive_newer(stock, image, {**arguments, "linears": learned})
    if setting.method == "dlvit":
        return naive_dlvit(stock, image, arguments, learned[0])
    if setting.method == "sit":
        modules = {index: weights for index, weights in enumerate(learned) if weights}
        result, result.patch_map = naive_sit(stock, image, arguments, modules)
        return result
    if getattr(setting, "inflect", 0.0):
        arguments["r"] = (setting.r, setting.inflect)
    return naive_forward(stock, image, arguments)


@pytest.mark.parametrize("attention", ATTENTIONS)
@matrix
def test_fast_equals_naive_outputs_and_gradients(backbone, method, attention):
    stock = tiny_model(backbone, attn_implementation=attention)
    setting = METHODS[method][0]
    model = reduce_tiny(stock, setting)
    images = tiny_images().requires_grad_()
    output = model(images, output_patch_map=True, output_hidden_states=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn_like(output.logits)
    ours = torch.autograd.grad((output.logits * weights).sum(), [images, *parameters], allow_unused=True)

    results = [naive(model, stock, image) for image in images]
    for index, result in enumerate(results):
        torch.testing.assert_close(output.logits[index], result.logits, rtol=1e-4, atol=1e-5)
        assert output.token_counts[index].tolist() == result.token_counts
        same(where_patches_went(output)[index], torch.as_tensor(result.patch_map))
        for ours_hidden, theirs_hidden in zip(output.hidden_states[1:], result.hidden_states, strict=True):
            length = len(theirs_hidden)
            torch.testing.assert_close(ours_hidden[index, :length], theirs_hidden, rtol=1e-4, atol=1e-4)
            assert not ours_hidden[index, length:].any()
    logits = torch.stack([result.logits for result in results])
    theirs = torch.autograd.grad((logits * weights).sum(), [images, *parameters], allow_unused=True)
    for ours_gradient, theirs_gradient in zip(ours, theirs, strict=True):
        assert (ours_gradient is None) == (theirs_gradient is None)
        if ours_gradient is not None:
            torch.testing.assert_close(ours_gradient, theirs_gradient, rtol=1e-3, atol=1e-4)


@matrix
def test_alone_or_in_any_batch(backbone, method):
    model = reduced(backbone, method)
    images = tiny_images(7)
    together = model(images, output_patch_map=True)
    order = torch.randperm(7)
    shuffled = model(images[order], output_patch_map=True)
    torch.testing.assert_close(shuffled.logits, together.logits[order], rtol=0, atol=1e-5)
    same(where_patches_went(shuffled), where_patches_went(together)[order])
    for index in range(7):
        alone = model(images[index : index + 1], output_patch_map=True)
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=0, atol=1e-5)
        same(where_patches_went(alone)[0], where_patches_went(together)[index])
        assert torch.equal(alone.token_counts[0], together.token_counts[index])


@matrix
def test_the_same_twice(backbone, method):
    model = reduced(backbone, method)
    first, second = model(tiny_images()), model(tiny_images())
    assert torch.equal(first.logits, second.logits)


@matrix
def test_attention_implementations_agree(backbone, method):
    outputs = [reduced(backbone, method, attn_implementation=name)(tiny_images()) for name in ATTENTIONS]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)


def steadiest(model, images, patch_map):
    """The 16 images whose patch maps differ least often when pixels and weights change by about as much as float16
    rounds them. Which way near ties fall in the others depends on the processor.
    """
    noise, rounded = torch.Generator().manual_seed(0), copy.deepcopy(model).to(torch.float16).float()
    maps = [rounded(images, output_patch_map=True).patch_map] * 4  # counts as much as the four draws of noise
    for _ in range(4):
        near = images + 2**-10 * images.abs() * torch.randn(images.shape, generator=noise)
        maps.append(model(near, output_patch_map=True).patch_map)
    return sum((other == patch_map).all(dim=1).int() for other in maps).topk(16).indices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ATTENTIONS)
@matrix
def test_half_precision(backbone, method, attention, dtype):
    samples = method.startswith("ats")
    images, stock = tiny_images(64 if samples else 16), tiny_model(backbone)
    model = reduced(backbone, method, attn_implementation=attention)
    with torch.no_grad():
        full, dense = model(images, output_patch_map=True), stock(images[:16]).logits
        steady = steadiest(model, images, full.patch_map) if samples else torch.arange(16)
        half, half_dense = model.to(dtype)(images, output_patch_map=True), stock.to(dtype)(images[:16]).logits
    assert half.logits.dtype == dtype
    if method in EVEN:
        assert torch.equal(half.token_counts, full.token_counts)
    # Decisions may differ where scores nearly tie. Where they do not, only rounding is left, as in the stock model.
    same = torch.ones(len(images), dtype=torch.bool)
    if full.patch_map is not None:  # none of mixtures, which have no ties
        same = (half.patch_map == full.patch_map).all(dim=1)
    same &= (half.token_counts == full.token_counts).all(dim=1)
    error = (half.logits.float() - full.logits).abs().amax(dim=1)
    if same.any():  # the median, for a token that was swapped and dropped later leaves no trace in the map
        assert error[same].median() < 1.5 * (half_dense.float() - dense).abs().max()
    if method == "ats":  # one near tie in an image moves other samples of its grid too, so images differ somewhere
        alike = ((half.patch_map >= 0) == (full.patch_map >= 0)).float().mean()
        assert alike > (0.7 if dtype == torch.bfloat16 else 0.87), alike
    assert dtype == torch.bfloat16 or same[steady].sum() >= 5, same[steady]
    cosines = torch.nn.functional.cosine_similarity(half.logits.float(), full.logits, dim=-1)
    assert cosines[:3].min() > 0.8 and cosines.mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@matrix
def test_off_is_off_in_half_precision(backbone, method, dtype):
    stock = tiny_model(backbone).to(dtype)
    model = reduce_tokens(stock, METHODS[method][1])
    ours, theirs = model(tiny_images(), output_patch_map=True).logits, stock(tiny_images()).logits
    # The last layer of the prefix alone rounds in other places.
    assert (model(tiny_images()).logits - ours).abs().max() < 0.02 * theirs.abs().max()
    if method in ("ltmp", "ltmp-prune", "ltmp-capped"):  # their attention is not the stock kernel: they need its map
        exact = tiny_model(backbone)(tiny_images()).logits
        assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()
    else:
        assert torch.equal(ours, theirs)


@matrix
def test_autocast_runs_and_trains(backbone, method):
    model = reduced(backbone, method).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tiny_images())
    output.logits.float().pow(2).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.base_model.layers[0].attention.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
@matrix
def test_gradient_checkpointing_changes_nothing(backbone, method, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = reduced(backbone, method).train()
        if checkpointing:
            enable_checkpointing(model, {"use_reentrant": reentrant})
        images = tiny_images().requires_grad_()
        output = model(images, output_patch_map=True)
        output.logits.pow(2).sum().backward()
        gradients.append([output.logits, images.grad, *[p.grad for p in model.parameters()]])
    for plain, checkpointed in zip(*gradients, strict=True):
        if plain is None or checkpointed is None:  # what nothing depends on has no gradient, or zeros
            assert not any(gradient is not None and gradient.any() for gradient in (plain, checkpointed))
        else:
            torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-5)


@matrix
def test_patch_maps_agree_with_counts(backbone, method):
    model = reduced(backbone, method)
    output = model(tiny_images(), output_patch_map=True)
    prefix = model.config.num_prefix_tokens
    if method.startswith("sit"):
        assert output.patch_map is None
        assert output.patch_weights.shape == (3, output.token_counts[0, -1] - prefix, NUM_PATCHES)
        torch.testing.assert_close(output.patch_weights.sum(dim=-1), torch.ones(output.patch_weights.shape[:2]))
        return
    assert output.patch_weights is None
    for patch_map, length in zip(output.patch_map, output.token_counts[:, -1].tolist(), strict=True):
        held = patch_map[patch_map >= 0]
        assert set(held.tolist()) == set(range(prefix, length))
        if method.startswith("tome") or method in KEEPS_EVERY_PATCH:
            assert len(held) == NUM_PATCHES


@matrix
def test_hidden_states_have_each_layers_length(backbone, method):
    model = reduced(backbone, method)
    output = model(tiny_images(), output_hidden_states=True)
    prefix = model.config.num_prefix_tokens
    lengths = [hidden.shape for hidden in output.hidden_states]
    entering = output.token_counts[:, 0].max() if method.startswith("dlvit") else prefix + NUM_PATCHES
    assert lengths[0] == (3, entering, 48)
    assert lengths[1:] == [(3, count, 48) for count in output.token_counts.amax(dim=0).tolist()]


@matrix
def test_attentions_under_eager(backbone, method):
    model = reduced(backbone, method, attn_implementation="eager")
    output = model(tiny_images(), output_attentions=True)
    first = torch.full((3, 1), model.config.num_prefix_tokens + NUM_PATCHES)
    if method.startswith("dlvit"):  # filters before the first layer
        first = output.token_counts[:, :1]
    entering = torch.cat([first, output.token_counts[:, :-1]], dim=1)
    asking = output.token_counts if method.startswith("ats") else entering
    for layer, attention in enumerate(output.attentions):
        assert attention.shape == (3, 3, asking[:, layer].max(), entering[:, layer].max())
        for image in range(3):
            queries, keys = asking[image, layer], entering[image, layer]
            assert not attention[image, :, queries:].any() and not attention[image, :, :, keys:].any()
            torch.testing.assert_close(attention[image, :, :queries].sum(dim=-1), torch.ones(3, queries))


@pytest.mark.parametrize("backbone", BASES)
@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in NEWER])
def test_base_models_with_and_without_pooler(backbone, method, pooling):
    model_class, config_class = BASES[backbone]
    config = tiny_model(backbone, BASES).config
    stock = model_class(config_class(**config.to_dict()), add_pooling_layer=pooling).eval()
    model = reduce_tokens(stock, METHODS[method][0])
    output = model(tiny_images())
    assert (output.pooler_output is not None) == pooling
    assert output.last_hidden_state.shape[1] == output.token_counts[:, -1].max()
    torch.testing.assert_close(restore(model)(tiny_images()).last_hidden_state, stock(tiny_images()).last_hidden_state)


@matrix
def test_every_parameter_learns_and_the_loss_falls(backbone, method):
    model = reduced(backbone, method).train()
    for parameter in model.parameters():
        parameter.data.mul_(0.3)
    images, labels = tiny_images(8), torch.randint(0, 5, (8,))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A filter learns from labels, see test_labels.py. In the last layer nothing after it depends on LTMP's thresholds,
    # which learn by the budget (test_ltmp.py), nor on SiT's network, which learns by the teacher's tokens, nor on the
    # linear layer of DTEM.
    last = f"layers.{model.config.num_hidden_layers - 1}.reducer."
    apart = {"dlvit": "reducer.", "ltmp": last, "sit": last, "dtem": last}.get(model.config.reduction.method)
    assert idle == {name for name, _ in model.named_parameters() if apart is not None and apart in name}


@matrix
def test_reduction_is_real(backbone, method):
    model = reduced(backbone, method)
    output = model(tiny_images())
    assert output.token_counts.dtype == torch.long and output.token_counts.shape == (3, 4)
    assert (output.token_counts[:, -1] < model.config.num_prefix_tokens + NUM_PATCHES).all()
    stock = restore(model)
    assert (output.logits - stock(tiny_images()).logits).abs().max() > 1e-4


@matrix
def test_other_image_and_patch_sizes(backbone, method):
    for image_size, patch_size in (([48, 32], 8), (40, [8, 4])):
        model = reduced(backbone, method, image_size=image_size, patch_size=patch_size)
        height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
        output = model(torch.randn(2, 3, height, width), output_patch_map=True)
        assert where_patches_went(output).shape[-1] == model.base_model.embeddings.patch_embeddings.num_patches
    model = reduced(backbone, method)
    output = model(tiny_images(2, size=48), interpolate_pos_encoding=True, output_patch_map=True)
    went = where_patches_went(output)
    assert (went.shape[0], went.shape[-1]) == (2, 144)
