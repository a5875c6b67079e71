"""ToMe and Top-K in families of every layout, against a plain rewrite for one image."""

from itertools import pairwise

import pytest
import torch
from families import FAMILIES, family_inputs, family_model, layers_of, main_rows
from helpers import METHODS, NUM_PATCHES, reduce_tiny
from naive_families import naive_answer, naive_run

from hf_tokenreduce import ToMeConfig, TopKConfig, reduce_tokens
from hf_tokenreduce.modeling.attention import PairBias
from hf_tokenreduce.modeling.encoders import encoder_of


COMPARED = [
    "dinov3",
    "beit",
    "beit-shared",
    "siglip-vision",
    "siglip-classifier",
    "ijepa",
    "dinov2",
    "dinov2-registers",
    "clip-vision",
    "clip-classifier",
]

# Settings, and what the naive run is told for each layer.
SETTINGS = {
    "tome": (ToMeConfig(r=[7, 20, 9, 6]), [7, 20, 9, 6]),
    "topk": (TopKConfig(keep_rate=[0.7, 0.5], layers=(0, 2)), [0.7, None, 0.5, None]),
}


def run_and_watch(model, inputs, **options):
    """The output, and what each layer handed on."""
    seen = []
    handles = [layer.register_forward_hook(lambda *given: seen.append(given[2])) for layer in layers_of(model)]
    try:
        return model(**inputs, **options), seen
    finally:
        for handle in handles:
            handle.remove()


def images_of(handed_on):
    """The tokens of each image, of what a layer handed on."""
    rows = handed_on.hidden_states
    return list(rows) if handed_on.lengths is None else list(rows[0].split(handed_on.lengths))


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", COMPARED)
def test_fast_equals_naive(family, method):
    stock = family_model(family)
    setting, amounts = SETTINGS[method]
    model = reduce_tokens(stock, setting)
    images = family_inputs(family)["pixel_values"].requires_grad_()
    output, seen = run_and_watch(model, {"pixel_values": images}, output_patch_map=True)

    runs = [naive_run(encoder_of(stock).module, image, method, amounts, method == "tome") for image in images]
    for index, run in enumerate(runs):
        assert run.prefix == FAMILIES[family].prefix and run.num_patches == NUM_PATCHES
        for layer, rows in enumerate(run.rows):
            assert output.token_counts[index, layer] == len(rows)
            torch.testing.assert_close(seen[layer].hidden_states[index], rows, rtol=1e-4, atol=1e-5)
        assert output.patch_map[index].tolist() == run.patch_map()
    ours, theirs = main_rows(output), torch.stack([naive_answer(stock, run) for run in runs])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    direction = torch.randn_like(ours)
    gradients = [torch.autograd.grad((answer * direction).sum(), images)[0] for answer in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_images_share_the_bias_of_pairs_until_tokens_move(monkeypatch):
    """Four layers, of which the second reads its class attention too."""
    images, whole = [], PairBias.whole
    monkeypatch.setattr(PairBias, "whole", lambda pairs: (images.append(len(made := whole(pairs))), made)[1])
    inputs = family_inputs("beit")
    reduce_tokens(family_model("beit"), TopKConfig(keep_rate=0.5, layers=(1,)))(**inputs)
    batch = len(inputs["pixel_values"])
    assert batch > 1 and images == [1, 1, 1, batch, batch]


def members_between(before, after, prefix):
    """Which tokens each output token is made of, by the patches that they hold before and after."""
    made = {}
    for old, new in zip(before, after, strict=True):
        if new >= 0:
            made.setdefault(new, set()).add(prefix + old)
    assert sorted(made) == list(range(len(made)))
    return [sorted(made[new]) for new in sorted(made)]


@pytest.mark.parametrize("method", ["ats", "ltmp", "ltmp-merge"])
@pytest.mark.parametrize("family", COMPARED)
def test_adaptive_methods_compute_what_they_decided(family, method):
    """The decisions are taken from the library, layer by layer; all that follows from them is not."""
    stock = family_model(family)
    model = reduce_tiny(stock, METHODS[method][0])
    images = family_inputs(family)["pixel_values"]
    prefix, tower = FAMILIES[family].prefix, encoder_of(stock).module
    with torch.no_grad():
        output, seen = run_and_watch(model, {"pixel_values": images})
        for index, image in enumerate(images):
            maps = [list(range(NUM_PATCHES)), *(layer.patch_map[index].tolist() for layer in seen)]
            told = [members_between(before, after, prefix) for before, after in pairwise(maps)]
            run = naive_run(tower, image, "told", told, method != "ats")
            for layer, rows in enumerate(run.rows):
                tokens = images_of(seen[layer])[index]
                torch.testing.assert_close(tokens, rows, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(main_rows(output)[index], naive_answer(stock, run), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["dinov3", "beit"])
def test_places_matter(family):
    """The reference would not notice wrong places if nothing depended on them."""
    stock = family_model(family)
    image = family_inputs(family, 1)["pixel_values"][0]
    setting, amounts = SETTINGS["tome"]
    tower = encoder_of(stock).module
    with torch.no_grad():
        right = naive_answer(stock, naive_run(tower, image, "tome", amounts, True))
        lost = naive_answer(stock, naive_run(tower, image, "tome", amounts, True, lambda some, sizes: min(some)))
        ours = main_rows(reduce_tokens(stock, setting)(image[None]))[0]
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    assert (right - lost).abs().max() > 1e-2
