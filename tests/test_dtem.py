"""DTEM: its start, and how it learns by soft merging; what it shares with all others is in test_matrix.py."""

import pytest
import torch
from families import family_inputs, family_model, layers_of
from helpers import reduce_tiny, tiny_images, tiny_model
from naive_soft import naive_dtem_training
from peft import LoraConfig, get_peft_model

from hf_tokenreduce import (
    DTEMConfig,
    TokenReduceDeiTForImageClassification,
    TokenReduceViTForImageClassification,
    ToMeConfig,
    reduce_tokens,
)
from hf_tokenreduce.modeling.dtem import merge_softly, share_out
from hf_tokenreduce.modeling.encoders import facts_of
from hf_tokenreduce.modeling.grid import on_grid
from hf_tokenreduce.modeling.tokens import mix, start
from hf_tokenreduce.tasks import main_output
from hf_tokenreduce.training import TokenReduceTrainer, TokenReduceTrainingArguments, recipe
from hf_tokenreduce.training.losses import distillation_loss


R = [9, 0, 12, 4]
LIKE_KEYS = DTEMConfig(r=7, embedding_size=16)


def linears_of(model):
    return [layer.reducer.metric for layer in layers_of(model) if hasattr(layer.reducer, "metric")]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("backbone", "prop_attn"), [("vit", True), ("deit", True), ("vit", False)])
def test_training_equals_naive_outputs_and_gradients(backbone, prop_attn, attention):
    stock = tiny_model(backbone, attn_implementation=attention)
    setting = DTEMConfig(r=R, embedding_size=6, prop_attn=prop_attn)
    model = reduce_tiny(stock, setting).train()
    images = tiny_images(2).requires_grad_()
    output = model(images, output_patch_map=True, output_hidden_states=True)
    linears = [dict(layer.reducer.named_parameters()) for layer in model.base_model.layers]
    results = [naive_dtem_training(stock, image, setting.to_dict(), linears) for image in images]
    for index, (result, patch_weights) in enumerate(results):
        torch.testing.assert_close(output.logits[index], result.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.patch_weights[index], patch_weights, rtol=1e-4, atol=1e-5)
        assert output.token_counts[index].tolist() == result.token_counts
        for ours, theirs in zip(output.hidden_states[1:], result.hidden_states, strict=True):
            torch.testing.assert_close(ours[index], theirs, rtol=1e-4, atol=1e-4)
    learning = [parameter for linear in linears_of(model)[:2] for parameter in linear.parameters()]
    weights = torch.randn_like(output.logits)
    wanted = [images, *learning, model.base_model.layers[1].attention.q_proj.weight]
    ours = torch.autograd.grad((output.logits * weights).sum(), wanted)
    logits = torch.stack([result.logits for result, _ in results])
    theirs = torch.autograd.grad((logits * weights).sum(), wanted)
    for ours_gradient, theirs_gradient in zip(ours, theirs, strict=True):
        assert ours_gradient.abs().max() > 1e-4
        torch.testing.assert_close(ours_gradient, theirs_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("r", "least"), [(1, 0.99), (4, 3.5), (10, 5)])
def test_shares_are_those_of_r_sources(r, least):
    similarity = torch.rand(3, 10, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shares = share_out(similarity, r)
    assert (shares >= 0).all() and ((shares > 0).sum(dim=-1) <= 3).all()
    assert (shares.sum(dim=-1) <= 1 + 1e-6).all()
    totals = shares.sum(dim=(1, 2))  # a source that is picked again gives no more than all of itself
    assert (totals > least).all() and (totals < r + 1e-4).all()


def test_what_is_far_more_similar_goes_as_a_whole():
    similarity = torch.full((1, 5, 4), -1.0)
    similarity[0, 1, 2], similarity[0, 4, 0] = 0.9, 0.4
    expected = torch.zeros(1, 5, 4)
    expected[0, 1, 2] = expected[0, 4, 0] = 1
    torch.testing.assert_close(share_out(similarity, 2), expected, rtol=0, atol=1e-4)


def test_soft_merging_keeps_the_sizes_and_puts_the_largest_first():
    generator = torch.Generator().manual_seed(0)
    embeddings, size = torch.randn(2, 12, 5, generator=generator), 1 + torch.rand(2, 12, generator=generator)
    weights, sizes = merge_softly(embeddings, size, 9, 3, 1)
    torch.testing.assert_close(sizes.sum(dim=1), size.sum(dim=1))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 12))
    torch.testing.assert_close((weights * sizes[:, None]).sum(dim=2), size)  # nothing of a token is lost
    assert torch.equal(sizes, sizes.sort(dim=1, descending=True).values)
    untouched = ((weights == 1).sum(dim=1) == 1) & ((weights > 0).sum(dim=1) == 1)
    assert (untouched.sum(dim=1) >= 12 - 5).all()  # the receivers alone are mixtures, even though sources lose a part


@pytest.mark.parametrize("name", ["vit", "beit", "dinov3"])
def test_it_begins_as_tome(name):
    """The keys of BEiT and DINOv3 have no bias, and those of DINOv3 are compared without their rotation."""
    model = tiny_model() if name == "vit" else family_model(name)
    inputs = {"pixel_values": tiny_images(8)} if name == "vit" else family_inputs(name)
    heads = layers_of(reduce_tokens(model, None))[0]
    size = getattr(heads, heads.layout.attention).head_dim
    ours = reduce_tokens(model, DTEMConfig(r=5, embedding_size=size))(**inputs, output_patch_map=True)
    theirs = reduce_tokens(model, ToMeConfig(r=5))(**inputs, output_patch_map=True)
    assert torch.equal(ours.patch_map, theirs.patch_map)


def test_a_layer_that_merges_nothing_takes_nothing_from_the_others(caplog):
    """Under a setting without a merge in some layers, the other layers keep what they have learned."""
    model = reduce_tokens(tiny_model(), DTEMConfig(r=7))
    learned = [layer.reducer.metric for layer in layers_of(model)]
    other = reduce_tokens(model, DTEMConfig(r=R))
    metrics = [getattr(layer.reducer, "metric", None) for layer in layers_of(other)]
    assert [metric is None for metric in metrics] == [not r for r in R]
    assert all(one is None or one.weight is two.weight for one, two in zip(metrics, learned, strict=True))
    assert not other._set_reduction(DTEMConfig(r=5))  # the second layer has learned nothing
    metrics = [layer.reducer.metric for layer in layers_of(other)]
    assert [one.weight is two.weight for one, two in zip(metrics, learned, strict=True)] == [bool(r) for r in R]
    assert model._set_reduction(DTEMConfig(r=R))


@pytest.mark.parametrize("size", [10, 16, 24, 70])
def test_it_begins_with_the_keys_of_a_checkpoint(tmp_path, size):
    stock = tiny_model()
    stock.save_pretrained(tmp_path)
    model, info = TokenReduceViTForImageClassification.from_pretrained(
        tmp_path, reduction=DTEMConfig(r=[3, 0, 3, 3], embedding_size=size), output_loading_info=True
    )
    assert len(info["missing_keys"]) == 6 and all(".reducer.metric." in name for name in info["missing_keys"])
    for linear, layer in zip(linears_of(model), (0, 2, 3), strict=True):
        keys = stock.vit.layers[layer].attention.k_proj
        weight = torch.cat([keys.weight.view(3, 16, 48).mean(dim=0), keys.weight])[:size]
        bias = torch.cat([keys.bias.view(3, 16).mean(dim=0), keys.bias])[:size]
        torch.testing.assert_close(linear.weight[:64], weight)
        torch.testing.assert_close(linear.bias[:64], bias)
        assert linear.weight.shape == (size, 48) and linear.weight.abs().sum(dim=1).gt(0).all()


def test_what_was_learned_is_saved(tmp_path):
    model = reduce_tiny(tiny_model("deit"), DTEMConfig(r=R))
    expected = model(tiny_images()).logits
    model.save_pretrained(tmp_path)
    loaded, info = TokenReduceDeiTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(tiny_images()).logits, expected)


def test_frozen_linear_layers_merge_as_they_will():
    model = reduce_tiny(tiny_model(), DTEMConfig(r=R))
    expected = model(tiny_images()).logits
    assert not torch.equal(model.train()(tiny_images()).logits, expected)
    for linear in linears_of(model):
        linear.requires_grad_(False)
    torch.testing.assert_close(model(tiny_images()).logits, expected)


@pytest.mark.parametrize("frozen", [0, 1])
def test_some_linear_layers_may_be_frozen(frozen):
    model = reduce_tiny(tiny_model(), DTEMConfig(r=R)).train()
    linears_of(model)[frozen].requires_grad_(False)
    output = model(tiny_images(), output_patch_map=True)
    assert output.token_counts[0].tolist() == [56, 56, 44, 40]
    rows = output.patch_weights.sum(dim=-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    output.logits.pow(2).sum().backward()
    gradients = [linear.weight.grad is not None for linear in linears_of(model)[:2]]
    assert gradients == [frozen != 0, frozen != 1]


def test_a_patch_gets_back_what_its_parts_became():
    generator = torch.Generator().manual_seed(0)
    state = start(torch.randn(2, 13, 4, generator=generator), 1, track_patches=True)
    shares = torch.rand(2, 12, 12, generator=generator).softmax(dim=2)  # of each patch, to each token
    sizes = shares.sum(dim=1)
    mixed = mix(state, shares / sizes[:, None], sizes)
    expected = shares @ mixed.hidden_states[:, 1:]
    torch.testing.assert_close(on_grid(mixed)[:, 1:], expected)


@pytest.mark.parametrize("name", ["clip-vision", "siglip-vision", "dinov2", "dinov3", "beit"])
def test_it_learns_where_all_patches_are_read(name):
    model = reduce_tokens(family_model(name), DTEMConfig(r=R, embedding_size=8)).train()
    output = model(**family_inputs(name), output_patch_map=True)
    rows = output.patch_weights.sum(dim=-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert (output.token_counts[0].diff() == -torch.tensor(R[1:])).all()
    main_output(output).pow(2).sum().backward()
    assert all(linear.weight.grad.abs().sum() > 0 for linear in linears_of(model)[:2])


def test_the_recipe_teaches_the_linear_layers_alone(tmp_path):
    """They learn to decide so that the model that really merges comes closer to the dense one."""
    torch.manual_seed(0)
    stock, images = tiny_model(), tiny_images(16)
    model = reduce_tokens(stock, DTEMConfig(r=12))
    dense = stock(images).logits
    rows = [
        {"pixel_values": image, "labels": labels}
        for image, labels in zip(images, dense.detach().softmax(dim=-1), strict=True)
    ]

    def distance():
        with torch.no_grad():
            return distillation_loss(model.eval()(images).logits, dense).item()

    changes = {"num_train_epochs": 50, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.0}
    first, before = distance(), {name: value.clone() for name, value in model.state_dict().items()}
    arguments = TokenReduceTrainingArguments(
        tmp_path, **{**recipe("dtem"), **changes}, use_cpu=True, save_strategy="no", report_to=[], logging_steps=1,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = TokenReduceTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".reducer.metric." in name and "layers.3" not in name}
    assert distance() < 0.6 * first
    logged = [entry for entry in trainer.state.log_history if "tokens/layer_3" in entry]
    assert logged[-1]["tokens/layer_0"] == 53 and logged[-1]["multiply_adds_share"] < 1


def test_its_price_is_that_of_tome_and_of_the_linear_layers():
    facts = facts_of(tiny_model().config)
    ours, theirs = (config.own_multiply_adds(0, 64, facts) for config in (LIKE_KEYS, ToMeConfig(r=7)))
    assert ours - theirs == 64 * 48 * 16
    assert DTEMConfig(r=0).own_multiply_adds(0, 64, facts) == 0


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match="DTEMConfig: embedding_size"):
        DTEMConfig(embedding_size=size)


def test_lora_on_its_linear_layers_learns():
    model = reduce_tokens(tiny_model(), DTEMConfig(r=7, embedding_size=20))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["reducer.metric"], r=2)).train()
    wrapped(tiny_images()).logits.pow(2).sum().backward()
    grown = [parameter.grad for name, parameter in wrapped.named_parameters() if "reducer.metric.lora_B" in name]
    assert len(grown) == 4 and all(gradient is not None for gradient in grown)
    assert all(gradient.any() for gradient in grown[:-1])  # nothing follows that of the last layer
