"""Stock folders of every family, in the names of today and of the Hub; what cannot be reduced; the scan."""

import subprocess
import sys
from dataclasses import replace

import pytest
import scan_families
import torch
import transformers
from families import FAMILIES, cases, family_inputs, family_model, layers_of, main_rows
from helpers import METHODS, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_weights import OLD_NAMES

import hf_tokenreduce
from hf_tokenreduce import LTMPConfig, ToMeConfig, reduce_tokens, restore
from hf_tokenreduce.modeling import encoders
from hf_tokenreduce.modeling.encoders import MODELS, TOWERS, auto_classes_of
from hf_tokenreduce.modeling.tokens import TokenMap, apply_map, merge, mix, start


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def reduced_class(stock):
    return getattr(hf_tokenreduce, f"TokenReduce{type(stock).__name__}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_folder_loads_reduced(tmp_path, family):
    stock = family_model(family)
    stock.save_pretrained(tmp_path)
    inputs = family_inputs(family)
    for setting in (None, METHODS["tome"][0], METHODS["ats"][0]):
        model, info = reduced_class(stock).from_pretrained(tmp_path, reduction=setting, output_loading_info=True)
        assert not any(info.values()), info
        assert model.config.reduction == setting
        assert not model.training
        expected = reduce_tokens(stock, setting)(**inputs)
        output = model(**inputs)
        assert torch.equal(main_rows(output), main_rows(expected))
        assert torch.equal(output.token_counts, expected.token_counts)
    plain = restore(model)
    assert torch.equal(main_rows(plain(**inputs)), main_rows(stock(**inputs)))


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_start_as_configured_whatever_the_folder_holds(tmp_path, family):
    stock = family_model(family)
    stock.save_pretrained(tmp_path)
    setting = LTMPConfig(merge_threshold=0.625, prune_threshold=0.0078125)
    model, info = reduced_class(stock).from_pretrained(tmp_path, reduction=setting, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(info["missing_keys"]) == 8 and all(".reducer." in name for name in info["missing_keys"])
    for layer in layers_of(model):
        assert layer.reducer.merge_threshold.tolist() == [0.625]
        assert layer.reducer.prune_threshold.tolist() == [0.0078125]
    inputs = family_inputs(family)
    assert torch.equal(main_rows(model(**inputs)), main_rows(reduce_tokens(stock, setting)(**inputs)))


@pytest.mark.parametrize(("family", "method"), cases(("sit", "dlvit-share")))
def test_learned_parts_start_untrained(tmp_path, family, method):
    stock = family_model(family)
    stock.save_pretrained(tmp_path)
    setting = METHODS[method][0]
    model, info = reduced_class(stock).from_pretrained(tmp_path, reduction=setting, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert info["missing_keys"] and all(".reducer." in name for name in info["missing_keys"])
    learned = [item for layer in layers_of(model) for item in layer.reducer.named_parameters()]
    assert len(learned) == len(info["missing_keys"])
    for name, parameter in learned:
        if name in ("norm.weight", "scale"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.abs().max() < 1 and parameter.std() > 1e-3, name
    assert main_rows(model(**family_inputs(family))).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reduced_folder_loads_as_it_was(tmp_path, family):
    model = reduce_tokens(family_model(family), METHODS["ltmp"][0])
    for layer in layers_of(model):
        layer.reducer.merge_threshold.sub_(0.03)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    inputs = family_inputs(family)
    ours, theirs = again(**inputs), model(**inputs)
    assert torch.equal(main_rows(ours), main_rows(theirs)) and torch.equal(ours.token_counts, theirs.token_counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_find_a_reduced_folder(tmp_path, family):
    model = reduce_tokens(family_model(family), METHODS["tome"][0])
    model.save_pretrained(tmp_path)
    inputs = family_inputs(family)
    names = auto_classes_of(type(model).__name__.removeprefix("TokenReduce"))
    assert names or family == "clip-projection"  # transformers itself has no Auto class for it
    for name in set(names) - {"AutoBackbone"}:  # which takes no folders, of stock models neither
        found = getattr(transformers, name).from_pretrained(tmp_path)
        assert type(found) is type(model)
        assert torch.equal(main_rows(found(**inputs)), main_rows(model(**inputs)))


@pytest.mark.parametrize("family", FAMILIES)
def test_new_weights_start_as_in_the_stock_model(family):
    models = []
    torch.manual_seed(5)
    stock = FAMILIES[family].build()
    fields = {name: value for name, value in stock.config.to_dict().items() if name != "model_type"}
    reduced = reduced_class(stock)
    for setting in (None, METHODS["ltmp"][0]):
        torch.manual_seed(5)
        models.append(reduced(reduced.config_class(**fields, reduction=setting)))
    for model in models:
        ours = model.state_dict()
        different = [name for name, value in stock.state_dict().items() if not torch.equal(value, ours[name])]
        assert not different


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("clip", "CLIPVisionModel"),
        ("clip", "CLIPVisionModelWithProjection"),
        ("clip", "CLIPForImageClassification"),
        ("clip-vision", "CLIPVisionModelWithProjection"),
        ("siglip", "SiglipVisionModel"),
        ("siglip", "SiglipForImageClassification"),
        ("dinov2", "Dinov2Model"),
        ("dinov2-swiglu", "Dinov2ForImageClassification"),
        ("dinov2-swiglu", "Dinov2Backbone"),
        ("dinov2-registers", "Dinov2WithRegistersBackbone"),
        ("dinov3", "DINOv3ViTBackbone"),
        ("msn", "ViTMSNModel"),
        ("ijepa", "IJepaModel"),
        ("ast", "ASTModel"),
        ("beit", "BeitModel"),
        ("llava", "LlavaModel"),
        ("mae-pretrained", "ViTMAEModel"),
    ],
)
def test_another_class_takes_from_a_folder_what_the_stock_class_takes(tmp_path, family, wanted):
    """The image part of a larger model, an encoder for a new head, the encoder of a pretrained autoencoder."""
    if family == "mae-pretrained":
        config = family_model("mae").config
        source = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**{**config.to_dict(), "mask_ratio": 0.7})
        )
    else:
        source = family_model(family)
    source.save_pretrained(tmp_path)
    loaded = []
    for name, setting in ((wanted, {}), (f"TokenReduce{wanted}", {"reduction": METHODS["ltmp"][0]})):
        owner = hf_tokenreduce if setting else transformers
        torch.manual_seed(3)
        loaded.append(getattr(owner, name).from_pretrained(tmp_path, output_loading_info=True, **setting))
    (theirs, expected), (ours, info) = loaded
    assert {name for name in info["missing_keys"] if ".reducer." not in name} == set(expected["missing_keys"])
    assert set(info["unexpected_keys"]) == set(expected["unexpected_keys"])
    weights = ours.state_dict()
    assert [name for name, value in theirs.state_dict().items() if not torch.equal(value, weights[name])] == []
    assert all(layer.reducer.merge_threshold.item() == 0.5 for layer in layers_of(ours))
    if wanted == "ViTMAEModel":
        assert ours.config.mask_ratio == 0


INNER = "attention.attention"
DINO_NAMES = [
    ("attention.q_proj", f"{INNER}.query"),
    ("attention.k_proj", f"{INNER}.key"),
    ("attention.v_proj", f"{INNER}.value"),
    ("attention.o_proj", "attention.output.dense"),
]
TABLE = "relative_position_bias.relative_position_bias_table"

# Family -> how parts were called, in checkpoints that the Hub still has.
OLD = {
    "msn": OLD_NAMES,
    "ijepa": OLD_NAMES,
    "mae": OLD_NAMES,
    "ast": OLD_NAMES,
    "beit": [*OLD_NAMES, (TABLE, f"{INNER}.{TABLE}")],
    "beit-shared": [*OLD_NAMES, ("shared_position_bias", "encoder.relative_position_bias")],
    "dinov2": DINO_NAMES,
    "dinov2-swiglu": [*DINO_NAMES, ("mlp.down_proj", "mlp.weights_out")],
    "dinov2-registers": DINO_NAMES,
    "dinov2-backbone": DINO_NAMES,
    "depth-anything": DINO_NAMES,
    "dinov3": [("model.layer.", "layer.")],
    "clip-vision": [("", "vision_model.")],
    "siglip-vision": [("", "vision_model.")],
    "llava": [
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ],
}


def old_names(weights, names, joins_gates):
    """Weights under their old names: the first name that fits a key's start, or every name that is inside it."""
    found = {}
    for key, value in weights.items():
        for new, old in names:
            key = old + key if not new else key.replace(new, old)
        found[key] = value
    if joins_gates:  # both halves of a gated MLP were one weight
        for key in [key for key in found if ".gate_proj." in key]:
            halves = found.pop(key), found.pop(key.replace("gate_proj", "up_proj"))
            found[key.replace("gate_proj", "weights_in")] = torch.cat(halves)
    return found


@pytest.mark.parametrize("family", OLD)
def test_old_key_names(tmp_path, family):
    stock = family_model(family)
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = old_names(stock.state_dict(), OLD[family], family == "dinov2-swiglu")
    renamed = {name: value.contiguous() for name, value in renamed.items()}
    assert set(renamed) != set(stock.state_dict())
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info  # else there is nothing to compare with
    setting = METHODS["evit"][0]
    ours, info = reduced_class(stock).from_pretrained(tmp_path, reduction=setting, output_loading_info=True)
    assert not any(info.values()), info
    for (name, value), (name_there, value_there) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == name_there and torch.equal(value, value_there)
    inputs = family_inputs(family)
    assert torch.equal(main_rows(ours(**inputs)), main_rows(reduce_tokens(theirs, setting)(**inputs)))
    # It is saved under the names of today.
    ours.save_pretrained(tmp_path / "again")
    again = set(load_file(tmp_path / "again" / "model.safetensors"))
    assert again == set(stock.state_dict()) or again == set(weights)


def other_models():
    class Mine(transformers.Dinov2Model):
        """Who knows what a subclass computes."""

    small = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    windows = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}
    return [
        transformers.ResNetForImageClassification(transformers.ResNetConfig(**stages)),
        transformers.SwinForImageClassification(transformers.SwinConfig(**windows)),
        torch.nn.Sequential(tiny_model()),
        torch.nn.DataParallel(tiny_model()),
        get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])),
        Mine(transformers.Dinov2Config(**small)),
        "google/vit-base-patch16-224",
        None,
    ]


@pytest.mark.parametrize("model", other_models(), ids=lambda model: type(model).__name__)
def test_what_cannot_be_reduced_is_told(model):
    with pytest.raises(ValueError) as raised:
        reduce_tokens(model, ToMeConfig(r=2))
    message = str(raised.value)
    assert type(model).__name__ in message and "docs/encoders.md" in message
    for name in ("ViT", "DeiT", "CLIP", "Siglip", "Dinov2WithRegisters", "DINOv3ViT", "Llava", "DepthAnything"):
        assert f" {name}" in message


def test_tokens_that_were_merged_or_have_places_are_not_mixed():
    hidden, weights = torch.randn(2, 9, 4), torch.randn(2, 8, 3).softmax(dim=1)
    one_each = start(hidden, 1, track_patches=True)
    target = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6]] * 2)
    merged = apply_map(one_each, merge(target, 7, torch.ones(2, 8)))
    assert merged.size is not None
    with pytest.raises(ValueError, match=r"stand for several patches.*Let SiT"):
        mix(merged, weights[:, :7])
    with pytest.raises(ValueError, match=r"have a position.*Let SiT"):
        mix(start(hidden, 1, track_patches=True, track_origin=True), weights)


@pytest.mark.parametrize("target", [None, torch.tensor([[0, 1, -1]] * 2)])
def test_mixtures_are_not_moved(target):
    hidden, weights = torch.randn(2, 9, 4), torch.randn(2, 8, 3).softmax(dim=1)
    mixed = mix(start(hidden, 1, track_patches=True), weights)
    torch.testing.assert_close(mixed.hidden_states[:, 1:], weights.transpose(1, 2) @ hidden[:, 1:])
    with pytest.raises(ValueError, match=r"mixtures of patches.*Let SiT reduce after all other methods"):
        apply_map(mixed, TokenMap(target, 2))


def test_transformers_is_as_the_table_of_encoders_says():
    assert scan_families.scan() == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": "encoder.blocks"}, "Dinov2Backbone: has no layers at 'encoder.blocks'"),
        ({"classes": ("Dinov2Encoders",)}, "Dinov2ForImageClassification: holds none of Dinov2Encoders"),
        ({"models": ("Dinov2ForPoetry",)}, "Dinov2ForPoetry: transformers has no such class"),
        ({"model_type": "dinov99"}, "there is no model type 'dinov99'"),
        ({"layout": {"norm_before": "norm0"}}, "Dinov2Layer has no norm0"),
        ({"layout": {"after_mlp": ()}}, "Dinov2Layer has layer_scale2, which the layout does not know"),
        ({"layout": {"o_proj": "out_proj"}}, "Dinov2Attention has o_proj, which nobody here runs"),
        ({"layout": {"attention_dropout": "dropout"}}, "Dinov2Attention has no dropout"),
        ({"layout": {"rotary": True}}, "its layers are not told position_embeddings"),
        ({"num_prefix_tokens": lambda config: 3}, "its num_tokens is 17, and 19 by its configuration"),
        ({"mlp_products": lambda config: 7}, "its mlp_products is 9216, and 7 by its configuration"),
        ({"patches": lambda config: (4, 5)}, "its num_tokens is 17, and 21 by its configuration"),
    ],
)
def test_the_scan_sees_what_has_changed(monkeypatch, changes, told):
    tower = next(tower for tower in TOWERS if tower.model_type == "dinov2")
    if "layout" in changes:
        changes = {"layout": replace(tower.layout, **changes["layout"])}
    changed = replace(tower, **changes)
    monkeypatch.setitem(encoders._BY_TYPE, "dinov2", changed)
    lines = []
    found = scan_families.scan([changed], lines.append)
    assert any(told in problem for problem in found), found
    assert any(told.split(": ")[-1] in line for line in lines)


def test_the_scan_runs_by_itself():
    done = subprocess.run([sys.executable, scan_families.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in MODELS)
