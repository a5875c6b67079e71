"""What every method keeps in every family: off is off, every image is by itself, masked is what removed is."""

import pytest
import torch
from families import (
    FAMILIES,
    GRIDS,
    PLAIN,
    WITHOUT_MIXTURES,
    cases,
    family_inputs,
    family_model,
    hidden_states_of,
    image_features_of,
    layers_of,
    main_rows,
    of_image,
)
from helpers import EVEN, METHODS, NUM_PATCHES, reduce_tiny

from hf_tokenreduce import DLViTConfig, LTMPConfig, calibrate, reduce_tokens, restore
from hf_tokenreduce.modeling.encoders import encoder_of
from hf_tokenreduce.modeling.multiply_adds import even_counts


every_case = pytest.mark.parametrize(("family", "method"), cases())
two_families = pytest.mark.parametrize("family", ["dinov3", "beit"])

# Patch tokens that leave each layer by the settings of METHODS.
COUNTS = {
    "tome": [57, 50, 43, 36],
    "evit": [40, 40, 25, 25],  # 39 of 64, then 24 of 40, and a fused one each time
    "topk": [64, 32, 32, 16],
    "bat": [39, 39, 24, 24],
    "sit": [32, 32, 16, 16],
    "dlvit-share": [39, 39, 39, 39],
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def equal_to_rounding(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


def off(stock, method):
    return reduce_tokens(stock, None) if method is None else reduce_tiny(stock, METHODS[method][1])


@pytest.mark.parametrize(("family", "method"), [*cases((None,)), *cases()])
def test_off_is_off(family, method):
    stock = family_model(family)
    inputs = family_inputs(family)
    model = off(stock, method)
    expected = stock(**inputs, output_hidden_states=True)
    output = model(**inputs, output_hidden_states=True, output_patch_map=True)
    # The attention of LTMP is not the stock kernel: it needs its map.
    tolerance = 1e-5 if method == "ltmp" else 1e-6
    equal_to_rounding(main_rows(output), main_rows(expected), tolerance)
    for ours, theirs in zip(hidden_states_of(output), hidden_states_of(expected), strict=True):
        equal_to_rounding(ours, theirs, tolerance)
    for name, theirs in expected.items():
        if name in ("text_embeds", "logits_per_text", "image_embeds", "last_hidden_state"):
            equal_to_rounding(output[name], theirs, tolerance)
    if family == "llava":
        equal_to_rounding(image_features_of(output), image_features_of(expected), tolerance)
    prefix = FAMILIES[family].prefix
    assert (output.token_counts == prefix + NUM_PATCHES).all() and output.token_counts.shape == (3, 4)
    assert torch.equal(output.patch_map, torch.arange(prefix, prefix + NUM_PATCHES).repeat(3, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_keep_their_names_and_are_shared(family):
    stock = family_model(family)
    for method in ("ltmp", "dlvit-share", "topk"):
        model = reduce_tokens(stock, METHODS[method][0])
        ours = {name: value for name, value in model.state_dict(keep_vars=True).items() if ".reducer." not in name}
        theirs = stock.state_dict(keep_vars=True)
        assert list(ours) == list(theirs)
        assert all(value is theirs[name] for name, value in ours.items())
        assert type(model).__name__ == f"TokenReduce{type(stock).__name__}"
    plain = restore(model)
    assert type(plain) is type(stock) and type(plain.config) is type(stock.config)
    inputs = family_inputs(family)
    assert torch.equal(main_rows(plain(**inputs)), main_rows(stock(**inputs)))


@every_case
def test_reduction_is_real(family, method):
    stock = family_model(family)
    inputs = family_inputs(family)
    prefix = FAMILIES[family].prefix
    output = reduce_tiny(stock, METHODS[method][0])(**inputs)
    if method in EVEN:
        if method in COUNTS:
            assert output.token_counts.tolist() == [[prefix + count for count in COUNTS[method]]] * 3
        assert even_counts(METHODS[method][0], stock.config) == output.token_counts[0].tolist()
    else:
        counts = output.token_counts
        assert (counts[:, -1] < prefix + NUM_PATCHES).all() and (counts.diff(dim=1) <= 0).all()
        assert len({tuple(row) for row in counts.tolist()}) > 1
    assert (main_rows(output) - main_rows(stock(**inputs))).abs().max() > 1e-3


# Of LLaVA those of the language model come back; what its tower shows is in test_families_grid.py.
@pytest.mark.parametrize(("family", "method"), cases(families=[name for name in FAMILIES if name != "llava"]))
def test_hidden_states_have_a_row_per_patch_where_their_readers_want_it(family, method):
    output = reduce_tiny(family_model(family), METHODS[method][0])(**family_inputs(family), output_hidden_states=True)
    found = [tuple(hidden.shape) for hidden in hidden_states_of(output)]
    whole = FAMILIES[family].prefix + NUM_PATCHES
    if FAMILIES[family].grid:
        assert found == [(3, whole, 48)] * 5
    else:
        entering = output.token_counts[0, 0].item() if method == "dlvit-share" else whole
        assert found == [(3, count, 48) for count in (entering, *output.token_counts.amax(dim=0).tolist())]


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_texts_are_left_alone(family, method):
    stock = family_model(family)
    inputs = family_inputs(family)
    model = reduce_tiny(stock, METHODS[method][0])
    output, expected = model(**inputs), stock(**inputs)
    assert torch.equal(output.text_embeds, expected.text_embeds)
    texts = {"input_ids": inputs["input_ids"]}
    assert torch.equal(model.get_text_features(**texts).pooler_output, stock.get_text_features(**texts).pooler_output)
    assert (output.image_embeds - expected.image_embeds).abs().max() > 1e-3
    images = model.get_image_features(inputs["pixel_values"])
    torch.testing.assert_close(torch.nn.functional.normalize(images.pooler_output, dim=-1), output.image_embeds)
    assert torch.equal(images.token_counts, output.token_counts)


@pytest.mark.parametrize("family", WITHOUT_MIXTURES)
def test_mixtures_have_no_place(family):
    stock = family_model(family)
    with pytest.raises(ValueError, match=r"SiT makes tokens that are mixtures.*no place.*ToMe, EViT, Top-K, BAT, ATS"):
        reduce_tokens(stock, METHODS["sit"][0])
    with pytest.raises(ValueError, match="no place"):
        reduce_tokens(stock, METHODS["tome"][0]).set_reduction(METHODS["sit"][0])
    with pytest.raises(ValueError, match="no place"):
        type(reduce_tokens(stock, None)).config_class(**stock.config.to_dict(), reduction=METHODS["sit"][0])


@pytest.mark.parametrize(("family", "method"), cases(("ats", "ltmp", "evit")))
def test_alone_or_in_a_batch(family, method):
    model = reduce_tiny(family_model(family), METHODS[method][0])
    inputs = family_inputs(family, 4)
    together = model(**inputs, output_patch_map=True)
    rows = main_rows(together)
    for index in range(4):
        alone = model(**of_image(inputs, index), output_patch_map=True)
        equal_to_rounding(main_rows(alone)[0], rows[index], 1e-5)
        assert torch.equal(alone.token_counts[0], together.token_counts[index])
        assert torch.equal(alone.patch_map[0], together.patch_map[index])


@pytest.mark.parametrize("method", ["ltmp", "ltmp-merge", "ltmp-prune", "ltmp-capped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_what_removed_is(family, method):
    """While thresholds learn, tokens are masked. Nothing else of the model need be in train mode for it."""
    model = reduce_tiny(family_model(family), METHODS[method][0])
    inputs = family_inputs(family)
    removed = model(**inputs, output_patch_map=True)  # by which the last layer acts as well
    for layer in layers_of(model):
        layer.reducer.train()
    masked = model(**inputs)
    equal_to_rounding(main_rows(masked), main_rows(removed), 1e-5)
    assert torch.equal(masked.token_counts, removed.token_counts)
    assert removed.auxiliary_loss is None and masked.auxiliary_loss.isfinite()
    shares = removed.token_counts.float().mean(dim=0) / (FAMILIES[family].prefix + NUM_PATCHES)
    torch.testing.assert_close(masked.kept_shares, shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_learn(family):
    model = reduce_tiny(family_model(family), METHODS["ltmp"][0])
    layers = layers_of(model)
    for layer in layers:
        layer.reducer.train()
    with torch.enable_grad():
        output = model(**family_inputs(family))
        (main_rows(output).pow(2).mean() + output.auxiliary_loss).backward()
    for layer in layers:
        for threshold in layer.reducer.parameters():
            assert threshold.grad.isfinite().all() and threshold.grad.abs().sum() > 0


@two_families
@pytest.mark.parametrize("method", [method for method in PLAIN if method != "sit"])
def test_eager_attention(family, method):
    stock = family_model(family, attn_implementation="eager")
    inputs = family_inputs(family)
    ours, theirs = off(stock, method)(**inputs, output_attentions=True), stock(**inputs, output_attentions=True)
    equal_to_rounding(main_rows(ours), main_rows(theirs), 1e-5 if method == "ltmp" else 1e-6)
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        equal_to_rounding(a, b, 1e-5)
    setting = METHODS[method][0]
    eager = reduce_tiny(stock, setting)(**inputs)
    model = reduce_tiny(family_model(family), setting)
    fused = model(**inputs)
    model.set_attn_implementation("eager")
    for other in (fused, model(**inputs)):
        equal_to_rounding(main_rows(eager), main_rows(other), 1e-5)
        assert torch.equal(eager.token_counts, other.token_counts)


@two_families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [method for method in PLAIN if method != "sit"])
def test_half_precision(family, method, attention):
    exact = family_model(family, attn_implementation=attention)
    inputs = family_inputs(family)
    reference = main_rows(exact(**inputs))
    full = reduce_tiny(exact, METHODS[method][0])(**inputs)
    stock = family_model(family, attn_implementation=attention).to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in inputs.items()}
    theirs = main_rows(stock(**inputs))
    ours = main_rows(off(stock, method)(**inputs))
    assert ours.dtype == torch.bfloat16
    if method == "ltmp":
        assert (ours - reference).abs().max() < 2 * (theirs - reference).abs().max()
    else:
        assert torch.equal(ours, theirs)
    half = reduce_tiny(stock, METHODS[method][0]).to(torch.bfloat16)(**inputs)
    if method in EVEN:
        assert torch.equal(half.token_counts, full.token_counts)
    # Decisions may differ where scores nearly tie, so this only sees gross errors.
    assert torch.nn.functional.cosine_similarity(main_rows(half).float(), main_rows(full), dim=-1).min() > 0.8


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("ast", "llava")])
def test_other_image_sizes(family):
    stock = family_model(family)
    inputs = family_inputs(family, 2, size=(40, 48))
    options = encoder_of(stock).size_arguments(inputs["pixel_values"])
    expected = main_rows(stock(**inputs, **options))
    equal_to_rounding(main_rows(reduce_tokens(stock, None)(**inputs, **options)), expected)
    for method in ("tome", "ats"):
        output = reduce_tiny(stock, METHODS[method][0])(**inputs, **options, output_patch_map=True)
        assert output.patch_map.shape == (2, 120)
        assert main_rows(output).shape == expected.shape
        assert (main_rows(output) - expected).abs().max() > 1e-3
    if options:
        # The forward of one class hands the option on without a name of its own: there the stock model refuses.
        remedy = "" if family == "clip-classifier" else "interpolate_pos_encoding"
        with pytest.raises(ValueError, match=rf"40.48.*32.32.*{remedy}"):
            reduce_tokens(stock, None)(**inputs)


def test_patches_of_a_masked_autoencoder_keep_their_order():
    model = reduce_tiny(family_model("mae"), METHODS["tome"][0])
    inputs = family_inputs("mae")
    told = model(**inputs, output_patch_map=True)
    untold = model(inputs["pixel_values"], output_patch_map=True)
    assert torch.equal(untold.last_hidden_state, told.last_hidden_state)
    assert torch.equal(untold.patch_map, told.patch_map)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("beit", {"layer_scale_init_value": 0.0}),
        ("beit", {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}),
        ("beit", {"use_shared_relative_position_bias": True}),
        ("beit", {"num_attention_heads": 1}),
        ("beit-shared", {"num_attention_heads": 1}),
        ("dinov3", {"use_gated_mlp": True, "num_register_tokens": 0}),
        ("dinov3", {"image_size": [16, 64]}),
        ("dinov2", {"use_mask_token": False, "qkv_bias": False}),
        ("siglip-vision", {"vision_use_head": False}),
        ("clip-vision", {"num_hidden_layers": 1}),
        ("vit", {"image_size": [16, 64]}),
    ],
)
def test_off_is_off_whatever_the_encoder_has(family, changes):
    stock = family_model(family, **changes)
    inputs = family_inputs(family, size=tuple(changes.get("image_size", (32, 32))))
    expected = main_rows(stock(**inputs))
    for setting in (None, LTMPConfig(merge_threshold=1.0)):
        model = reduce_tokens(stock, setting)
        equal_to_rounding(main_rows(model(**inputs)), expected, 1e-5)
    for layer in layers_of(model):
        layer.reducer.train()
    equal_to_rounding(main_rows(model(**inputs)), expected, 1e-5)


def with_dropout(family):
    """The model in train mode with everything dropped at random that its encoder can drop."""
    config = encoder_of(family_model(family)).config
    names = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate")
    return family_model(family, **{name: 0.3 for name in names if hasattr(config, name)}).train()


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_off_in_train_mode(family):
    stock = with_dropout(family)
    inputs = family_inputs(family)
    model = reduce_tokens(stock, None)
    outputs = []
    # The whole last layer draws for the same numbers; of the prefix alone it would draw for fewer.
    for run, whole in ((stock, {}), (model, {"output_patch_map": True}), (stock, {})):
        torch.manual_seed(7 if len(outputs) < 2 else 8)
        outputs.append(main_rows(run(**inputs, **whole)))
    assert torch.equal(outputs[1], outputs[0])
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3  # something was dropped


@pytest.mark.parametrize("setting", [DLViTConfig(threshold=1.0, trained=True), LTMPConfig(prune_threshold=0.9)])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_may_lose_all_its_patches(family, setting):
    model = reduce_tokens(family_model(family), setting)
    inputs = family_inputs(family)
    output = model(**inputs)
    assert main_rows(output).isfinite().all()
    assert (output.token_counts[:, -1] <= max(FAMILIES[family].prefix, 1)).all()


@pytest.mark.parametrize("family", ["ijepa", "siglip-classifier", "dinov2", "dinov3", "beit", "llava"])
def test_an_image_that_loses_all_its_patches_leaves_the_others_alone(family):
    stock, inputs, prefix = family_model(family), family_inputs(family, 4), FAMILIES[family].prefix
    judging = reduce_tiny(stock, DLViTConfig(threshold=0.5, trained=True))
    patches = encoder_of(judging).embed(inputs["pixel_values"])[:, prefix:]
    highest = layers_of(judging)[0].reducer.logits(patches).sigmoid().amax(dim=1)
    ranked = highest.sort().values
    # Above all patches of one image, and not of another.
    model = reduce_tiny(stock, DLViTConfig(threshold=ranked[:2].mean().item(), trained=True))
    together = model(**inputs)
    rows = main_rows(together)
    assert rows.isfinite().all()
    lost = highest.argmin().item()
    assert (together.token_counts[lost] == max(prefix, 1)).all()
    for index in range(4):
        alone = model(**of_image(inputs, index))
        equal_to_rounding(main_rows(alone)[0], rows[index], 1e-5)
        assert torch.equal(alone.token_counts[0], together.token_counts[index])
        assert index == lost or together.token_counts[index, -1] > prefix


WITH_LOSS = ["vit", "deit", "msn", "ijepa", "ast", "beit", "beit-shared", "dinov2", "dinov2-registers"]
WITH_LOSS += ["clip", "clip-classifier", "siglip", "siglip-classifier", "llava"]


def labels_of(family, inputs):
    """What a stock model computes its loss from."""
    if family in ("clip", "siglip"):
        return {"return_loss": True, "pixel_values": inputs["pixel_values"][:2]}
    if family == "llava":
        return {"labels": inputs["input_ids"]}
    return {"labels": torch.tensor([0, 3, 1])}


@pytest.mark.parametrize("family", WITH_LOSS)
def test_losses(family):
    stock = family_model(family)
    inputs = family_inputs(family)
    inputs |= labels_of(family, inputs)
    same = reduce_tokens(stock, None)
    assert torch.equal(same(**inputs, output_patch_map=True).loss, stock(**inputs).loss)
    torch.testing.assert_close(same(**inputs).loss, stock(**inputs).loss, rtol=1e-6, atol=1e-6)
    model = reduce_tiny(stock, METHODS["ltmp"][0])
    removed = model(**inputs)
    assert removed.auxiliary_loss is None and removed.task_loss is None
    for layer in layers_of(model):
        layer.reducer.train()
    masked = model(**inputs)
    torch.testing.assert_close(masked.task_loss, removed.loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(masked.loss, masked.task_loss + masked.auxiliary_loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_missing_or_masked_is_told(family):
    model = reduce_tokens(family_model(family), METHODS["tome"][0])
    inputs = family_inputs(family)
    with pytest.raises(ValueError, match="batch is empty"):
        model(**{name: value[:0] for name, value in inputs.items()})
    if "input_ids" in inputs:  # the mask is that of the texts
        mask = torch.ones_like(inputs["input_ids"])
        mask[:, 0] = 0
        stock = restore(model)
        ours, theirs = reduce_tokens(stock, None)(**inputs, attention_mask=mask), stock(**inputs, attention_mask=mask)
        assert torch.equal(main_rows(ours), main_rows(theirs))
        return
    if family != "depth-anything":
        with pytest.raises(ValueError, match="attention_mask does not work"):
            model(**inputs, attention_mask=torch.ones(3, 65))
    pixels = model.main_input_name
    with pytest.raises(ValueError, match=f"{pixels} is missing"):
        model(**{name: value for name, value in inputs.items() if name != pixels})


@pytest.mark.parametrize("family", GRIDS)
def test_an_output_is_a_tuple_if_asked(family):
    model = reduce_tiny(family_model(family), METHODS["tome"][0])
    inputs = family_inputs(family)
    output = model(**inputs)
    values = model(**inputs, return_dict=False)
    assert isinstance(values, tuple) and len(values) == len(output.to_tuple())
    assert torch.equal(values[-1], output.token_counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_are_found_on_the_inputs_of_every_family(family):
    model = reduce_tokens(family_model(family), LTMPConfig())
    inputs = family_inputs(family, 8)
    images = inputs["input_values"] if "input_values" in inputs else inputs["pixel_values"]
    assert abs(calibrate(model, images, 0.8, tolerance=0.03) - 0.8) <= 0.03
    with pytest.raises(ValueError, match=r"images must be (pixel values|spectrograms) .* got \(8,\)"):
        calibrate(model, torch.ones(8), 0.8)


def test_slimming_starts_from_spectrograms():
    model = reduce_tiny(family_model("ast"), METHODS["sit"][0])
    before = [reducer.fc2.weight.clone() for reducer in encoder_of(model).reducers if reducer.num_slim is not None]
    calibrate(model, family_inputs("ast", 8)["input_values"], steps=5)
    after = [reducer.fc2.weight for reducer in encoder_of(model).reducers if reducer.num_slim is not None]
    assert before and not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
