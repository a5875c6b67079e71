"""What reads all patches gets a row for each: readers of a grid, pooling heads, dense heads and language models."""

import pytest
import torch
from families import FAMILIES, GRIDS, PLAIN, cases, family_inputs, family_model, image_features_of
from helpers import METHODS, NEWER, NUM_PATCHES, reduce_tiny, tiny_images, tiny_model
from naive_families import naive_run
from task_models import CASES
from test_families_naive import images_of, run_and_watch

from hf_tokenreduce import SiTConfig, ToMeConfig, TopKConfig, reduce_tokens, unmerge
from hf_tokenreduce.modeling.encoders import encoder_of


HARD = tuple(method for method in PLAIN if method != "sit")
TOPK, AMOUNTS = TopKConfig(keep_rate=[0.7, 0.5], layers=(0, 2)), [0.7, None, 0.5, None]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def grid_by_hand(tokens, patch_map, prefix, last_states=None):
    """Prefix tokens and a row for every patch of one image."""
    held = [tokens[place] for place in patch_map.tolist() if place >= 0]
    mean = torch.stack(held).mean(dim=0) if held else tokens.new_zeros(tokens.shape[1])
    patches = []
    for patch, place in enumerate(patch_map.tolist()):
        dropped = mean if last_states is None else last_states[patch]
        patches.append(tokens[place] if place >= 0 else dropped)
    return torch.stack([*tokens[:prefix], *patches])


@pytest.mark.parametrize(("family", "method"), cases((*HARD, *NEWER), GRIDS))
def test_every_patch_has_the_row_of_its_token(family, method):
    model = reduce_tiny(family_model(family), METHODS[method][0])
    prefix = FAMILIES[family].prefix
    output, seen = run_and_watch(model, family_inputs(family), output_patch_map=True)
    assert seen[-1].shown.shape == (3, prefix + NUM_PATCHES, 48)
    assert (output.last_states is not None) == FAMILIES[family].last
    for index, tokens in enumerate(images_of(seen[-1])):
        assert len(tokens) == output.token_counts[index, -1]
        last_states = output.last_states[index] if FAMILIES[family].last else None
        expected = grid_by_hand(tokens, output.patch_map[index], prefix, last_states)
        torch.testing.assert_close(seen[-1].shown[index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", HARD)
@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("mae", "layernorm"),
        ("clip-vision", None),
        ("siglip-vision", "post_layernorm"),
        ("dinov2-swiglu", "layernorm"),
        ("dinov3", "norm"),
    ],
)
def test_the_last_hidden_state_is_the_grid(family, norm, method):
    model = reduce_tiny(family_model(family), METHODS[method][0])
    norm = torch.nn.Identity() if norm is None else getattr(family_model(family), norm)
    output, seen = run_and_watch(model, family_inputs(family), output_patch_map=True)
    prefix = FAMILIES[family].prefix
    is_held = torch.nn.functional.pad(output.patch_map >= 0, (prefix, 0), value=True)
    assert torch.equal(output.last_hidden_state[is_held], norm(seen[-1].shown)[is_held])
    for index, tokens in enumerate(images_of(seen[-1])):
        expected = grid_by_hand(norm(tokens), output.patch_map[index], prefix)
        torch.testing.assert_close(output.last_hidden_state[index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", GRIDS)
def test_a_mean_over_patches_weighs_tokens_by_their_size(family):
    model = reduce_tiny(family_model(family), METHODS["tome"][0])
    prefix = FAMILIES[family].prefix
    output, seen = run_and_watch(model, family_inputs(family), output_patch_map=True)
    for index, tokens in enumerate(images_of(seen[-1])):
        size = torch.bincount(output.patch_map[index] - prefix, minlength=len(tokens) - prefix).float()
        assert torch.equal(size, seen[-1].size[index]) and size.sum() == NUM_PATCHES and size.max() > 1
        weighed = (size[:, None] * tokens[prefix:]).sum(dim=0) / size.sum()
        torch.testing.assert_close(seen[-1].shown[index, prefix:].mean(dim=0), weighed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["clip-classifier", "beit", "ijepa", "siglip-classifier", "dinov2"])
def test_a_mean_over_patches_is_that_of_the_kept(family):
    """What was dropped is not there: a classifier of the mean sees the mean of what it would read of the others."""
    model = reduce_tokens(family_model(family), TOPK)
    output, seen = run_and_watch(model, family_inputs(family))
    tokens, prefix = seen[-1].hidden_states, FAMILIES[family].prefix
    assert tokens.shape[1] == output.token_counts[0, -1] < NUM_PATCHES
    if family == "beit":
        read = model.beit.pooler.layernorm(tokens[:, prefix:].mean(dim=1))
    elif family == "clip-classifier":
        read = tokens[:, prefix:].mean(dim=1)
    else:
        norm = model.vision_model.post_layernorm if family == "siglip-classifier" else model.base_model.layernorm
        rows = norm(tokens)
        read = rows[:, prefix:].mean(dim=1)
        read = torch.cat([rows[:, 0], read], dim=1) if family == "dinov2" else read
    torch.testing.assert_close(output.logits, model.classifier(read), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["tome", "bat", "ltmp-merge"])
def test_attention_pooling_of_the_grid_is_proportional_attention_to_tokens(method):
    model = reduce_tiny(family_model("siglip-vision"), METHODS[method][0])
    output, seen = run_and_watch(model, family_inputs("siglip-vision"))
    head = model.head
    for index, tokens in enumerate(images_of(seen[-1])):
        rows = model.post_layernorm(tokens)[None]
        mask = seen[-1].size[index, : len(tokens)].log().expand(head.attention.num_heads, 1, -1)
        pooled = head.attention(head.probe, rows, rows, attn_mask=mask)[0]
        pooled = (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
        torch.testing.assert_close(output.pooler_output[index : index + 1], pooled, rtol=1e-4, atol=1e-5)
        assert (head(rows) - pooled).abs().max() > 1e-3  # unweighted it would be something else


@pytest.mark.parametrize("family", [name for name in GRIDS if (name, "sit") in cases()])
def test_every_patch_has_the_mean_of_the_mixtures_it_is_in(family):
    model = reduce_tiny(family_model(family), METHODS["sit"][0])
    prefix = FAMILIES[family].prefix
    output, seen = run_and_watch(model, family_inputs(family), output_patch_map=True)
    assert output.patch_map is None and output.patch_weights.shape == (3, 16, NUM_PATCHES)
    for index, tokens in enumerate(images_of(seen[-1])):
        shown, weights = seen[-1].shown[index], output.patch_weights[index]
        assert torch.equal(shown[:prefix], tokens[:prefix])
        for patch in (0, 17, 63):
            shares = weights[:, patch] / sum(weights[:, patch].tolist())
            expected = sum(share * token for share, token in zip(shares, tokens[prefix:], strict=True))
            torch.testing.assert_close(shown[prefix + patch], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", [ToMeConfig(r=[1, 0, 0, 0]), TopKConfig(keep_rate=0.99, layers=(1,))])
def test_nearly_as_many_tokens_as_patches_are_unmerged(setting):
    output = reduce_tokens(tiny_model(), setting).vit(tiny_images(), output_patch_map=True)
    hidden, places = output.last_hidden_state, output.patch_map
    assert hidden.shape[1] >= places.shape[1]
    rows = unmerge(hidden, places)
    for image, row in enumerate(places):
        for patch, place in enumerate(row.tolist()):
            assert place < 0 or torch.equal(rows[image, patch], hidden[image, place])


def test_one_image_of_a_packed_batch_is_unmerged_as_in_it():
    """Its own tokens end before those of the other image, and what follows them is padding."""
    rows = torch.zeros(2, 65, 8)
    rows[0, :30], rows[1] = torch.randn(30, 8), torch.randn(65, 8)
    maps = torch.arange(1, 65).repeat(2, 1)
    maps[0, 29:] = -1
    whole = unmerge(rows, maps)
    assert torch.equal(unmerge(rows[:1], maps[:1]), whole[:1])
    with pytest.raises(ValueError, match="row per patch already"):
        unmerge(torch.randn(1, 65, 8), maps[:1])


def test_as_many_mixtures_as_patches_are_no_patches():
    """An image with a quarter of the patches is mixed too, although its number of tokens does not change."""
    model = reduce_tokens(family_model("dinov2"), SiTConfig(keep_rate=0.25, layers=(1,))).dinov2
    facts = encoder_of(model).facts
    side = encoder_of(model).patch_size[0] * facts.grid[0] // 2
    output, seen = run_and_watch(model, {"pixel_values": torch.randn(2, 3, side, side)}, output_patch_map=True)
    patches, tokens = facts.num_patches // 4, seen[-1].hidden_states
    assert output.patch_weights.shape == (2, patches, patches) and tokens.shape[1] == 1 + patches
    expected = unmerge(tokens, output.patch_weights)
    torch.testing.assert_close(output.last_hidden_state[:, 1:], model.layernorm(expected))
    assert (expected - tokens[:, 1:]).abs().amax() > 1e-3  # the random mixtures are nearly alike


def test_unmerge_fills_what_was_dropped_as_told():
    model = reduce_tiny(family_model("vit"), METHODS["topk"][0])
    output = model.vit(**family_inputs("vit"), output_patch_map=True)
    tokens, patch_map = output.last_hidden_state, output.patch_map
    assert tokens.shape == (3, 17, 48)
    given = torch.randn(3, NUM_PATCHES, 48)
    fills = {fill: unmerge(tokens, patch_map, fill) for fill in ("mean", "zero")}
    fills["given"] = unmerge(tokens, patch_map, given)
    assert torch.equal(fills["mean"], unmerge(tokens, patch_map))
    for image in range(3):
        held = [tokens[image, place] for place in patch_map[image].tolist() if place >= 0]
        dropped = {"mean": sum(held) / len(held), "zero": torch.zeros(48)}
        assert 0 < len(held) < NUM_PATCHES
        for patch, place in enumerate(patch_map[image].tolist()):
            for name, patches in fills.items():
                expected = dropped.get(name, given[image, patch]) if place < 0 else tokens[image, place]
                torch.testing.assert_close(patches[image, patch], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"\"mean\", \"zero\" or a tensor"):
        unmerge(tokens, patch_map, "median")


@pytest.mark.parametrize("family", ["clip-vision", "siglip-vision", "dinov3"])
def test_what_is_on_the_grid_already_is_not_unmerged_again(family):
    output = reduce_tiny(family_model(family), METHODS["tome"][0])(**family_inputs(family), output_patch_map=True)
    with pytest.raises(ValueError, match=rf"a row per patch already.*hidden_states\[:, {FAMILIES[family].prefix}:\]"):
        unmerge(output.last_hidden_state, output.patch_map)


def test_what_is_masked_in_training_is_not_unmerged():
    model = reduce_tiny(family_model("vit"), METHODS["ltmp"][0]).train()
    output = model.vit(**family_inputs("vit"), output_patch_map=True)
    with pytest.raises(ValueError, match=r"in training mode.* call model\.eval\(\)"):
        unmerge(output.last_hidden_state, output.patch_map)
    output = model.eval().vit(**family_inputs("vit"), output_patch_map=True)
    assert unmerge(output.last_hidden_state, output.patch_map).shape == (3, NUM_PATCHES, 48)


@pytest.mark.parametrize("family", ["siglip", "siglip-classifier"])
def test_an_encoder_inside_a_model_may_be_called_by_itself(family):
    """Its own class is the stock one there, which records nothing, and yet its norm must know what was dropped."""
    model, pixels = reduce_tokens(family_model(family), TOPK), tiny_images()
    alone = model.vision_model(pixels)
    if family == "siglip":
        found, expected = alone.pooler_output, model.get_image_features(pixels)
        expected = getattr(expected, "pooler_output", expected)
    else:
        found, expected = model.classifier(alone.last_hidden_state.mean(dim=1)), model(pixels).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_unmerge_by_weights():
    model = reduce_tiny(family_model("vit"), METHODS["sit"][0])
    output = model.vit(**family_inputs("vit"), output_patch_map=True)
    tokens, weights = output.last_hidden_state, output.patch_weights
    patches = unmerge(tokens, weights)
    assert tokens.shape == (3, 17, 48) and patches.shape == (3, NUM_PATCHES, 48)
    for patch in range(NUM_PATCHES):
        shares = weights[:, :, patch] / weights[:, :, patch].sum(dim=1, keepdim=True)
        expected = (shares[..., None] * tokens[:, 1:]).sum(dim=1)
        torch.testing.assert_close(patches[:, patch], expected, rtol=1e-4, atol=1e-5)


def naive_runs(stock, images):
    return [naive_run(encoder_of(stock).module, image, "topk", AMOUNTS) for image in images]


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].last])
def test_last_states_are_the_rows_that_were_dropped(family):
    stock = family_model(family)
    inputs = family_inputs(family)
    output = reduce_tokens(stock, TOPK)(**inputs, output_patch_map=True)
    for index, run in enumerate(naive_runs(stock, inputs["pixel_values"])):
        assert set(run.dropped_in.values()) == {0, 2}
        assert sorted(run.last_rows) == (output.patch_map[index] < 0).nonzero().flatten().tolist()
        for patch, row in run.last_rows.items():
            torch.testing.assert_close(output.last_states[index, patch], row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["dinov2-backbone", "dinov3-backbone"])
def test_feature_maps_of_a_backbone(family):
    stock = family_model(family)
    inputs = family_inputs(family)
    output = reduce_tokens(stock, TOPK)(**inputs)
    norm, prefix = getattr(stock, "layernorm", None) or stock.norm, FAMILIES[family].prefix
    for index, run in enumerate(naive_runs(stock, inputs["pixel_values"])):
        for feature_map, layer in zip(output.feature_maps, (1, 3), strict=True):  # stages 2 and 4
            expected = norm(run.grid(layer, last_states=True))[prefix:].T.reshape(48, 8, 8)
            torch.testing.assert_close(feature_map[index], expected, rtol=1e-4, atol=1e-4)


def test_depth_is_read_off_the_grid():
    stock = family_model("depth-anything")
    inputs = family_inputs("depth-anything")
    output = reduce_tokens(stock, TOPK)(**inputs)
    for index, run in enumerate(naive_runs(stock, inputs["pixel_values"])):
        maps = [stock.backbone.layernorm(run.grid(layer, last_states=True))[None] for layer in range(4)]
        expected = stock.head(stock.neck(maps, 8, 8), 8, 8)
        torch.testing.assert_close(output.predicted_depth[index : index + 1], expected, rtol=1e-4, atol=1e-4)


def test_llava_reads_the_grid_before_the_last_layer():
    stock = family_model("llava")
    inputs = family_inputs("llava")
    output = reduce_tokens(stock, TOPK)(**inputs)
    features = image_features_of(output)
    assert features.shape == (3 * NUM_PATCHES, 48)
    for index, run in enumerate(naive_runs(stock, inputs["pixel_values"])):
        expected = stock.model.multi_modal_projector(run.grid(2, last_states=True)[1:])
        torch.testing.assert_close(features.view(3, NUM_PATCHES, 48)[index], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", PLAIN)
def test_the_tower_of_llava(method):
    stock = family_model("llava")
    inputs = family_inputs("llava")
    model = reduce_tiny(stock, METHODS[method][0])
    features = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    assert [len(part) for part in features.pooler_output] == [NUM_PATCHES] * 3
    assert [tuple(states.shape) for states in features.hidden_states] == [(3, 1 + NUM_PATCHES, 48)] * 5
    whole = model(**inputs)
    assert torch.equal(torch.cat(list(features.pooler_output)), image_features_of(whole))
    assert torch.equal(features.token_counts, whole.token_counts)
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    for ours, theirs in zip(tower.hidden_states, features.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    # what it says without an image is what the stock model says
    text = torch.tensor([[0, 3, 4, 5]])
    assert torch.equal(model(input_ids=text).logits, stock(input_ids=text).logits)
    assert model(input_ids=text).token_counts is None


@pytest.mark.parametrize("method", PLAIN)
def test_llava_generates(method):
    stock = family_model("llava")
    inputs = family_inputs("llava")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    expected = stock.generate(**inputs, **options)
    assert expected.shape == (3, inputs["input_ids"].shape[1] + 6)
    assert torch.equal(reduce_tokens(stock, None).generate(**inputs, **options), expected)
    assert torch.equal(reduce_tiny(stock, METHODS[method][1]).generate(**inputs, **options), expected)
    model = reduce_tiny(stock, METHODS[method][0])
    ours = model.generate(**inputs, **options)
    assert ours.shape == expected.shape
    # The first token is the one that a reduced forward gives.
    assert torch.equal(ours[:, inputs["input_ids"].shape[1]], model(**inputs).logits[:, -1].argmax(dim=-1))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in GRIDS])
def test_no_grid_is_made_where_readers_want_tokens(family):
    model = reduce_tiny(family_model(family), METHODS["topk"][0])
    _, seen = run_and_watch(model, family_inputs(family))
    assert seen[-1].shown.shape == (3, FAMILIES[family].prefix + 16, 48)
    assert seen[-1].patch_map is None and seen[-1].last_states is None


def test_rows_that_are_unmerged_already_are_told_for_mixtures_too():
    model = reduce_tokens(CASES["clip-vision"].make(), SiTConfig(layers=(1,)))
    output = model(tiny_images(2), output_patch_map=True)
    with pytest.raises(ValueError, match=r"have a row per patch already.*hidden_states\[:, 1:\]"):
        unmerge(output.last_hidden_state, output.patch_weights)
    with pytest.raises(ValueError, match=r"patch_map is None\. Call the model with output_patch_map=True"):
        unmerge(output.last_hidden_state, output.patch_map)
