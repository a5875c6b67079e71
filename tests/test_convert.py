"""reduce_tokens and restore: other classes around the same weights."""

import json
from dataclasses import replace

import pytest
import torch
from families import family_inputs, family_model
from helpers import BACKBONES, enable_checkpointing, tiny_images, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification, ViTForImageClassification
from transformers.utils import logging

from hf_tokenreduce import (
    DLViTConfig,
    DTEMConfig,
    EViTConfig,
    LTMPConfig,
    ShiftConfig,
    SiTConfig,
    ToMeConfig,
    calibrate,
    load_thresholds,
    reduce_tokens,
    restore,
    save_thresholds,
)
from hf_tokenreduce.modeling import modeling_tokenreduce
from hf_tokenreduce.modeling.encoders import encoder_of


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_are_shared_and_the_model_given_stays_as_it_was(backbone):
    stock = tiny_model(backbone)
    before = stock(tiny_images()).logits
    reduced = reduce_tokens(stock, ToMeConfig(r=5))
    swapped = reduce_tokens(reduced, EViTConfig(keep_rate=0.5, layers=(1,)))
    plain = restore(swapped)
    assert type(plain) is type(stock)
    assert type(plain.config) is type(stock.config)
    for model in (reduced, swapped, plain):
        ours = dict(model.named_parameters())
        assert list(ours) == [name for name, _ in stock.named_parameters()]
        assert all(ours[name] is parameter for name, parameter in stock.named_parameters())
    assert torch.equal(stock(tiny_images()).logits, before)
    assert torch.equal(plain(tiny_images()).logits, before)
    assert reduced.config.reduction == ToMeConfig(r=5)
    assert not hasattr(stock.config, "reduction") and not hasattr(plain.config, "reduction")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_configuration_survives(backbone):
    stock = tiny_model(backbone, id2label={0: "cat", 1: "dog"}, num_labels=2, layer_norm_eps=1e-5)
    stock.name_or_path = stock.config.name_or_path = "someone/pets"
    plain = restore(reduce_tokens(stock, ToMeConfig(r=5)))
    ours, theirs = plain.config.to_dict(), stock.config.to_dict()
    assert {**ours, "architectures": None} == {**theirs, "architectures": None}
    assert plain.config.name_or_path == "someone/pets"
    assert plain.config._attn_implementation == stock.config._attn_implementation


def test_dtype_mode_frozen_parts_and_checkpointing_are_kept():
    stock = tiny_model(hidden_dropout_prob=0.5).to(torch.bfloat16).train()
    stock.vit.embeddings.requires_grad_(False)
    stock.vit.layers[1].eval()
    enable_checkpointing(stock, {"use_reentrant": False})
    for model in (reduce_tokens(stock, ToMeConfig(r=5)), restore(reduce_tokens(stock, ToMeConfig(r=5)))):
        assert model.dtype == torch.bfloat16
        assert model.training and model.vit.layers[0].training and model.vit.layers[0].attention.training
        assert not model.vit.layers[1].training and not model.vit.layers[1].attention.training
        assert not any(p.requires_grad for p in model.vit.embeddings.parameters())
        assert all(layer.gradient_checkpointing for layer in model.vit.layers)
        model(tiny_images()).logits.float().sum().backward()


def test_set_reduction_changes_the_method_in_place():
    model = reduce_tokens(tiny_model(), ToMeConfig(r=5)).train()
    model.set_reduction({"method": "evit", "keep_rate": 0.5, "layers": [1]})
    assert model.config.reduction == EViTConfig(keep_rate=0.5, layers=(1,))
    assert all(layer.reducer.training for layer in model.vit.layers)
    model.eval().set_reduction(model.config.reduction)
    assert not any(layer.reducer.training for layer in model.vit.layers)
    assert model(tiny_images()).token_counts[0].tolist() == [65, 34, 34, 34]
    model.vit.set_reduction(None)
    assert model.config.reduction is None
    assert model(tiny_images()).token_counts[0].tolist() == [65] * 4


def test_hub_loading_from_the_stock_class_gives_the_same(tmp_path):
    stock = tiny_model()
    stock.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(
        reduce_tokens(loaded, ToMeConfig(r=5))(tiny_images()).logits,
        reduce_tokens(stock, ToMeConfig(r=5))(tiny_images()).logits,
    )


@pytest.mark.parametrize("order", ["lora first", "reduction first"])
def test_lora_trains_and_merges(order):
    stock = tiny_model()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["classifier"])
    if order == "lora first":
        wrapped = get_peft_model(stock, lora)
        model = reduce_tokens(wrapped.get_base_model(), ToMeConfig(r=5))
    else:
        wrapped = get_peft_model(reduce_tokens(stock, ToMeConfig(r=5)), lora)
        model = wrapped
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tiny_images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    model.eval()
    trained = model(tiny_images()).logits
    assert (trained - reduce_tokens(tiny_model(), ToMeConfig(r=5))(tiny_images()).logits).abs().max() > 1e-3
    if order == "reduction first":
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(tiny_images()).logits, trained, rtol=1e-4, atol=1e-4)
        assert type(merged).__name__ == "TokenReduceViTForImageClassification"


def test_an_adapter_is_not_lost_in_silence():
    stock = tiny_model()
    stock.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=r"adapter.*Merge it first"):
        reduce_tokens(stock, ToMeConfig(r=5))


def test_a_model_with_lora_inside_is_saved_with_a_warning_and_not_restored(tmp_path, caplog):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    inside = reduce_tokens(get_peft_model(tiny_model(), lora).get_base_model(), ToMeConfig(r=5))
    inside.save_pretrained(tmp_path)
    assert "names that from_pretrained does not know" in caplog.text
    added = reduce_tokens(tiny_model(), ToMeConfig(r=5))
    added.add_adapter(lora)
    for model in (inside, added):
        with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
            restore(model)


@pytest.mark.parametrize("through", ["get_peft_model", "add_adapter"])
def test_an_adapter_names_the_reduced_model(tmp_path, through):
    tiny_model().save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)

    def add(model):
        if through == "get_peft_model":
            return get_peft_model(model, lora)
        model.add_adapter(lora)
        return model

    reduced = reduce_tokens(ViTForImageClassification.from_pretrained(tmp_path / "base"), ToMeConfig(r=5))
    reduced.save_pretrained(tmp_path / "reduced")
    add(reduced).save_pretrained(tmp_path / "nowhere")
    named = json.loads((tmp_path / "nowhere" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not named
    model = add(AutoModelForImageClassification.from_pretrained(tmp_path / "reduced")).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter").eval()
    assert loaded.config.reduction == ToMeConfig(r=5)
    torch.testing.assert_close(loaded(tiny_images()).logits, model(tiny_images()).logits)


def test_somebody_elses_class_of_a_stock_name_is_refused():
    theirs = type(
        "ViTForImageClassification", (ViTForImageClassification,), {"__module__": "transformers_modules.x.y"}
    )
    with pytest.raises(ValueError, match="cannot reduce a ViTForImageClassification"):
        reduce_tokens(theirs(tiny_model().config), ToMeConfig(r=2))


def test_trained_parts_are_shared_under_the_same_setting():
    model = reduce_tokens(tiny_model(), LTMPConfig())
    with torch.no_grad():
        model.vit.layers[0].reducer.merge_threshold.fill_(0.5)
    again = reduce_tokens(model, LTMPConfig())
    assert again.vit.layers[0].reducer.merge_threshold is model.vit.layers[0].reducer.merge_threshold
    assert reduce_tokens(model, LTMPConfig(target=0.5)).vit.layers[0].reducer.merge_threshold.item() != 0.5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_is_that_of_the_stock_model(attention):
    settings = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "attn_implementation": attention}
    stock = tiny_model(**settings).train()
    outputs = []
    # The whole last layer draws for the same numbers; of the prefix alone it would draw for fewer.
    for model, whole in ((stock, {}), (reduce_tokens(stock, ToMeConfig(r=0)), {"output_patch_map": True})):
        torch.manual_seed(3)
        outputs.append(model(tiny_images(), **whole).logits)
    assert torch.equal(*outputs)
    torch.manual_seed(4)
    assert not torch.equal(stock(tiny_images()).logits, outputs[0])


def test_checkpointed_layers_run_twice():
    model = reduce_tokens(tiny_model(), ToMeConfig(r=5)).train()
    enable_checkpointing(model, {"use_reentrant": False})
    calls = []
    model.vit.layers[1].attention.register_forward_hook(lambda *args: calls.append(args))
    model(tiny_images()).logits.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("backbone", BACKBONES)
def test_layers_are_not_split_over_devices(backbone):
    model = reduce_tokens(tiny_model(backbone), ToMeConfig(r=5))
    assert type(model.base_model.layers[0]).__name__ in model._no_split_modules
    assert type(model.base_model.embeddings).__name__ in model._no_split_modules


def test_modes_are_each_models_own():
    stock = tiny_model(hidden_dropout_prob=0.5)
    expected = stock(tiny_images()).logits
    reduced = reduce_tokens(stock, ToMeConfig(r=3)).train()
    assert reduced.training and all(module.training for module in reduced.modules())
    assert not any(module.training for module in stock.modules())
    assert torch.equal(stock(tiny_images()).logits, expected)
    assert not torch.equal(reduced(tiny_images()).logits, reduced(tiny_images()).logits)  # dropout is at work
    again = reduce_tokens(reduced, EViTConfig(layers=(1,)))
    assert again.training and not again.eval().training and reduced.training


@pytest.mark.parametrize("setting", [LTMPConfig(), DTEMConfig(r=5)], ids=["ltmp", "dtem"])
def test_a_model_of_the_same_setting_has_modes_of_its_own(setting):
    model = reduce_tokens(tiny_model(), setting)
    expected = model(tiny_images())
    again = reduce_tokens(model, setting).train()
    assert not any(module.training for module in model.modules()) and all(one.training for one in again.modules())
    assert all(one is other for one, other in zip(model.parameters(), again.parameters(), strict=True))
    found = model(tiny_images())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.token_counts, expected.token_counts)


def test_a_method_that_cannot_be_built_changes_nothing(monkeypatch):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=5))
    expected, build = model(tiny_images()).logits, modeling_tokenreduce.build_reducer

    def fails(facts, layer):
        if layer == 2:
            raise TypeError("int8")
        return build(facts, layer)

    monkeypatch.setattr(modeling_tokenreduce, "build_reducer", fails)
    with pytest.raises(TypeError, match="int8"):
        model.set_reduction(LTMPConfig())
    assert model.config.reduction == ToMeConfig(r=5) and torch.equal(model(tiny_images()).logits, expected)


def test_a_setting_is_that_which_runs():
    model = reduce_tokens(tiny_model(), ToMeConfig(r=5))
    model.config.reduction = EViTConfig(keep_rate=0.5, layers=(1,))  # changes nothing that runs
    again = reduce_tokens(model, EViTConfig(keep_rate=0.5, layers=(1,)))
    assert again(tiny_images()).token_counts[0].tolist() == [65, 34, 34, 34]


def test_a_calibrated_share_is_that_of_the_thresholds(tmp_path):
    model = reduce_tokens(tiny_model(), LTMPConfig())
    calibrate(model, tiny_images(8), 0.8)
    share = model.config.calibrated_share
    assert reduce_tokens(model, LTMPConfig(target=0.8)).config.calibrated_share == share
    assert not hasattr(reduce_tokens(model, LTMPConfig(target=0.5)).config, "calibrated_share")
    model.save_pretrained(tmp_path / "saved")
    load = AutoModelForImageClassification.from_pretrained
    assert load(tmp_path / "saved").config.calibrated_share == share
    assert load(tmp_path / "saved", reduction=LTMPConfig(target=0.8)).config.calibrated_share == share
    assert load(tmp_path / "saved", reduction=LTMPConfig(target=0.8).to_dict()).config.calibrated_share == share
    assert not hasattr(load(tmp_path / "saved", reduction=ToMeConfig(r=3)).config, "calibrated_share")
    save_thresholds(model, tmp_path / "file.safetensors")
    load_thresholds(model, tmp_path / "file.safetensors")
    assert not hasattr(model.config, "calibrated_share")


def test_parameters_are_shared_unless_copied():
    stock = tiny_model()
    shared, own = reduce_tokens(stock, ToMeConfig(r=3)), reduce_tokens(stock, ToMeConfig(r=3), copy=True)
    by_name = reduce_tokens(stock, "tome", r=3, copy=True)
    assert torch.equal(shared(tiny_images()).logits, own(tiny_images()).logits)
    kept = dict(stock.named_parameters())
    assert all(kept[name] is parameter for name, parameter in shared.named_parameters())
    for model in (own, by_name):
        assert not any(kept[name] is parameter for name, parameter in model.named_parameters())
        model.to(torch.bfloat16)
        assert stock.dtype == shared.dtype == torch.float32
    reduced = reduce_tokens(tiny_model(), LTMPConfig())
    other = reduce_tokens(reduced, LTMPConfig(), copy=True)
    other.vit.layers[0].reducer.merge_threshold.data.fill_(0.1)
    assert reduced.vit.layers[0].reducer.merge_threshold.item() != pytest.approx(0.1)


@pytest.mark.parametrize(
    ("setting", "message"), [(LTMPConfig(), "does not keep `target`"), (SiTConfig(layers=(1,)), "random")]
)
def test_what_has_to_learn_first_says_so(caplog, setting, message):
    type(logging.get_logger()).warning_once.cache_clear()
    with caplog.at_level("WARNING", "hf_tokenreduce"):
        model = reduce_tokens(tiny_model(), setting)
        assert message in caplog.text and "calibrate(model, images" in caplog.text
        caplog.clear()
        reduce_tokens(model, setting)  # with what that model has learned
        reduce_tokens(tiny_model(), setting.method, images=tiny_images(4), share=0.6)
        reduce_tokens(tiny_model(), ToMeConfig())
    assert not caplog.text
    type(logging.get_logger()).warning_once.cache_clear()
    with caplog.at_level("WARNING", "hf_tokenreduce"):
        model.set_reduction(setting)
    assert message in caplog.text


def test_hooks_that_are_not_kept_are_told(caplog):
    model, seen = tiny_model(), []
    model.set_attn_implementation("eager")
    model(tiny_images(), output_hidden_states=True, output_attentions=True)  # leaves hooks of transformers
    model.classifier.register_forward_hook(lambda *given: seen.append(given[0]))
    reduce_tokens(model, ToMeConfig(r=2))(tiny_images())
    assert seen and not caplog.text
    model.vit.layers[1].attention.register_forward_pre_hook(lambda *given: seen.append(given[0]))
    restore(reduce_tokens(model, ToMeConfig(r=2)))
    assert caplog.text.count("The hooks on the ViTAttention are not kept") == 1


def test_a_loss_of_ones_own_is_kept():
    model = tiny_model()
    model.loss_function = lambda *given, **options: torch.tensor(7.0)
    reduced = reduce_tokens(model, ToMeConfig(r=3))
    for one in (reduced, restore(reduced)):
        assert one(tiny_images(2), labels=torch.zeros(2, dtype=torch.long)).loss == 7


def test_a_filter_serves_every_setting_of_its_method(caplog):
    """What it has learned is kept, and weights that have learned nothing are called random."""
    type(logging.get_logger()).warning_once.cache_clear()
    model = reduce_tokens(tiny_model(), DLViTConfig(keep_rate=0.8, trained=True))
    assert "random weights" in caplog.text
    type(logging.get_logger()).warning_once.cache_clear()
    caplog.clear()
    weight, milder = model.vit.layers[0].reducer.fc1.weight, replace(model.config.reduction, keep_rate=0.5)
    other = reduce_tokens(model, milder)
    assert other.vit.layers[0].reducer.fc1.weight is weight
    assert other(tiny_images()).token_counts[0].tolist() == [33] * 4
    assert model(tiny_images()).token_counts[0].tolist() == [53] * 4
    model.set_reduction(milder)
    assert model.vit.layers[0].reducer.fc1.weight is weight and not caplog.text
    assert torch.equal(model(tiny_images()).logits, other(tiny_images()).logits)
    wider = reduce_tokens(model, replace(milder, hidden_size=7))
    assert wider.vit.layers[0].reducer.fc1.out_features == 7 and "random weights" in caplog.text


def test_copied_parts_read_the_configuration_of_their_own_model():
    stock = family_model("clip")
    reduced = reduce_tokens(stock, ToMeConfig(r=2))
    assert reduced.text_model.config is reduced.config.text_config
    reduced.set_attn_implementation("eager")
    assert reduced.text_model.config._attn_implementation == "eager" != stock.text_model.config._attn_implementation
    llava = reduce_tokens(family_model("llava"), ToMeConfig(r=2))
    assert llava.model.language_model.config is llava.config.text_config
    assert restore(reduced).text_model.config is not reduced.config.text_config


def test_the_order_of_mae_may_be_given_by_position():
    images = family_inputs("mae")["pixel_values"]
    model = reduce_tokens(family_model("mae"), ToMeConfig(r=8))
    order = torch.arange(encoder_of(model).facts.num_patches).expand(len(images), -1)
    assert torch.equal(model(images, order).last_hidden_state, model(images, noise=order).last_hidden_state)
    assert torch.equal(model(images, None).last_hidden_state, model(images).last_hidden_state)


def test_integer_weights_say_nothing_of_the_type_of_a_reducer():
    model = reduce_tokens(tiny_model(), None)
    for layer in model.vit.layers:
        for linear in (layer.mlp.fc1, layer.mlp.fc2):
            weight = linear.weight.to(torch.int8)
            del linear.weight, linear.bias
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.set_reduction(SiTConfig(layers=(1,)))
    assert {parameter.dtype for parameter in model.vit.layers[1].reducer.parameters()} == {torch.float32}


def test_shift_is_that_without_dropout():
    """A second mask of its own would move tokens that the layer does not move."""
    drawn = []
    model = reduce_tokens(tiny_model(hidden_dropout_prob=0.5), ShiftConfig(layers=(1,))).train()
    for layer in model.vit.layers:
        layer.dropout.register_forward_hook(lambda *given: drawn.append(given[0]))
    model(tiny_images())
    assert [drawn.count(layer.dropout) for layer in model.vit.layers] == [drawn.count(drawn[0])] * 4
