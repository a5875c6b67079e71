"""Held against what the authors' released code computes on a small random ViT (numbers in parity/)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

from hf_tokenreduce import ATSConfig, EViTConfig, LTMPConfig, SiTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.modeling.tokens import TokenState, mix, pad
from hf_tokenreduce.training import ReverseSlimming, distillation_loss, token_loss


FOLDER = Path(__file__).parent / "parity"
CONFIG = {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": 10,
    "layer_norm_eps": 1e-6,
}
SETTINGS = {
    "tome/r4_prop": ToMeConfig(r=4),
    "tome/r8_prop": ToMeConfig(r=8),
    "tome/r4_noprop": ToMeConfig(r=4, prop_attn=False),
    "evit/fuse": EViTConfig(keep_rate=0.6, layers=(1, 3)),
    "evit/nofuse": EViTConfig(keep_rate=0.6, layers=(1, 3), fuse=False),
    "ats/full": ATSConfig(layers=range(2, 6)),
    "ltmp/ltmp": LTMPConfig(),
    "ltmp/ltm": LTMPConfig(prune=False),
    "ltmp/ltp": LTMPConfig(merge=False),
}


@pytest.fixture(scope="module")
def stock():
    numbers = load_file(FOLDER / "model_seed1.safetensors")
    model = ViTForImageClassification(ViTConfig(**CONFIG)).eval()
    weights = {name: value for name, value in numbers.items() if name.startswith(("vit.", "classifier."))}
    model.load_state_dict(weights)
    return model, numbers["pixel_values"].float(), numbers


def expected(setting):
    method, prefix = setting.split("/")
    numbers = load_file(FOLDER / f"{method}_seed1.safetensors")
    return {name.removeprefix(prefix + "/"): v for name, v in numbers.items() if name.startswith(prefix + "/")}


def run(stock, setting):
    """Logits, gradient of their sum in the images, and the states that left each layer."""
    model = reduce_tokens(stock[0], SETTINGS[setting])
    theirs = expected(setting)
    with torch.no_grad():
        for layer, module in enumerate(model.vit.layers):
            for kind, threshold in module.reducer.named_parameters():
                threshold.copy_(theirs[f"threshold_{kind.removesuffix('_threshold')}"][layer])
    states = []
    for layer in model.vit.layers:
        layer.register_forward_hook(lambda module, args, state: states.append(state))
    pixels = stock[1].clone().requires_grad_()
    output = model(pixels, output_patch_map=True)
    output.logits.sum().backward()
    return output, pixels.grad, states


def class_token(theirs, image, layer):
    if f"block{layer}/cls" in theirs:
        return theirs[f"block{layer}/cls"][image]
    return theirs["cls"][image, layer] if "cls" in theirs else theirs[f"img{image}/cls"][layer]


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_counts_class_token_and_gradients(stock, setting):
    output, gradient, states = run(stock, setting)
    theirs = expected(setting)
    close(output.logits, theirs["logits"], 2e-5)
    counts = theirs["counts"] if theirs["counts"].ndim == 2 else theirs["counts"].repeat(3, 1)
    assert torch.equal(output.token_counts, counts)
    for layer, state in enumerate(states):
        hidden = state.hidden_states if state.lengths is None else pad(state.hidden_states, state.lengths)
        for image in range(3):
            close(hidden[image, 0], class_token(theirs, image, layer), 2e-5)
    close(gradient.flatten(1).norm(dim=1), theirs["grad_norm"], 1e-4)
    close(gradient[:, 1, 20, 10:30], theirs["grad_slice"], 1e-4)
    patches = gradient.unfold(2, 8, 8).unfold(3, 8, 8).pow(2).sum(dim=(1, 4, 5)).sqrt().flatten(1)
    close(patches, theirs["grad_patch_norm"], 1e-4)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name.startswith("tome")])
def test_tome_merges_the_same_tokens(stock, setting):
    _, _, states = run(stock, setting)
    theirs = expected(setting)
    for layer, state in enumerate(states):
        assert torch.equal(state.patch_map + 1, theirs[f"block{layer}/assign"][:, 1:])
        assert torch.equal(state.size, theirs[f"block{layer}/size"][:, 1:])
    if "last_hidden" in theirs:
        close(states[-1].hidden_states, theirs["last_hidden"], 2e-5)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name.startswith("evit")])
def test_evit_keeps_the_same_tokens(stock, setting):
    _, _, states = run(stock, setting)
    theirs = expected(setting)
    for layer in (1, 3):
        length = states[layer].hidden_states.shape[1] - 1
        for image, kept in enumerate(theirs[f"block{layer}/kept_original"].tolist()):
            patch_map = states[layer].patch_map[image]
            alone = {patch + 1 for patch in range(64) if (patch_map == patch_map[patch]).sum() == 1}
            if setting == "evit/nofuse":
                alone = {patch + 1 for patch in range(64) if patch_map[patch] >= 0}
            assert alone == {number for number in kept if number > 0}
            assert len([number for number in kept if number != 0]) == length
    if setting == "evit/fuse":
        close(states[1].hidden_states[:, -1], theirs["block1/fused_token_after_block"], 2e-5)


def test_ats_keeps_the_same_tokens(stock):
    _, _, states = run(stock, "ats/full")
    theirs = expected("ats/full")
    for layer in range(2, 6):
        for image in range(3):
            kept = {patch + 1 for patch in range(64) if states[layer].patch_map[image, patch] >= 0}
            assert kept | {0} == set(theirs[f"img{image}/block{layer}/kept_original"].tolist())


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name.startswith("ltmp")])
def test_ltmp_merges_and_prunes_the_same_tokens(stock, setting):
    _, _, states = run(stock, setting)
    theirs = expected(setting)
    for layer, state in enumerate(states):
        for image in range(3):
            assign = theirs[f"img{image}/block{layer}/assign"][1:]
            patch_map = state.patch_map[image]
            assert torch.equal(torch.where(patch_map < 0, patch_map, patch_map + 1), assign)
            if setting != "ltmp/ltp":
                sizes = theirs[f"img{image}/block{layer}/size"][1:]
                assert torch.equal(state.size[image, : len(sizes)], sizes)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name.startswith("ltmp")])
def test_ltmp_trains_what_it_runs(stock, setting):
    """The authors' masked graph drifts from what they run; ours gives the logits and counts of real removal."""
    output, _, _ = run(stock, setting)
    model = reduce_tokens(stock[0], SETTINGS[setting]).train()
    theirs = expected(setting)
    with torch.no_grad():
        for layer, module in enumerate(model.vit.layers):
            for kind, threshold in module.reducer.named_parameters():
                threshold.copy_(theirs[f"threshold_{kind.removesuffix('_threshold')}"][layer])
    masked = model(stock[1])
    close(masked.logits, theirs["logits"], 2e-5)
    assert torch.equal(masked.token_counts, output.token_counts)


SIT_NAMES = {"weight.0": "norm", "weight.1": "fc1", "weight.3": "fc2"}
REVERSE_NAMES = {"mlp1": "token", "mlp2": "feature"}


def load_slimming(reducer, numbers, prefix):
    """Their names are places in a sequence, ours are words."""
    state = {name.removeprefix(prefix): v.float() for name, v in numbers.items() if name.startswith(prefix)}
    for theirs, ours in SIT_NAMES.items():
        state = {name.replace(theirs, ours, 1): value for name, value in state.items()}
    state["scale"] = state["scale"].reshape(())
    reducer.load_state_dict(state)


def test_sit_slims_and_reverses_as_theirs(stock):
    numbers = load_file(FOLDER / "sit_seed1.safetensors")
    reducer = reduce_tokens(stock[0], SiTConfig(layers=(1,))).vit.layers[1].reducer
    load_slimming(reducer, numbers, "tsm/state/")
    reverse = ReverseSlimming(32, 64, 96)
    state = {n.removeprefix("rtsm/state/"): v.float() for n, v in numbers.items() if n.startswith("rtsm/state/")}
    for theirs, ours in REVERSE_NAMES.items():
        state = {name.replace(theirs + ".", ours + "_"): value for name, value in state.items()}
    reverse.load_state_dict(state)

    tokens = numbers["tsm/input"].requires_grad_()
    slim = mix(TokenState(tokens, num_prefix_tokens=0), reducer.weights(tokens)).hidden_states
    close(slim, numbers["tsm/output"], 1e-5)
    close(reverse(slim), numbers["rtsm/output"], 1e-5)
    reverse(slim).pow(2).mean().backward()
    close(tokens.grad[:, ::8], numbers["tsm_rtsm/grad_input"], 1e-5)
    close(reducer.scale.grad, numbers["tsm_rtsm/grad_tsm_scale"][0], 1e-5)


def test_sit_end_to_end(stock):
    numbers = load_file(FOLDER / "sit_seed1.safetensors")
    model = reduce_tokens(stock[0], SiTConfig(layers=(1, 3)))
    for number, layer in enumerate((1, 3)):
        load_slimming(model.vit.layers[layer].reducer, numbers, f"e2e/tsm{number}/state/")
    output = model(stock[1], output_hidden_states=True)
    close(output.logits, numbers["e2e/logits"], 1e-5)
    assert torch.equal(output.token_counts, numbers["e2e/counts"].repeat(3, 1))
    close(output.hidden_states[-1][:, 1:], numbers["e2e/tokens_last"], 1e-5)


@pytest.mark.parametrize("temperature", [1, 3])
def test_sit_distills_as_theirs(temperature):
    numbers = load_file(FOLDER / "sit_seed1.safetensors")
    theirs = {name: numbers[f"loss/tau{temperature}/{name}"].item() for name in ("cls", "token", "logits", "total")}
    logits, labels = numbers["loss/student_logits"], numbers["loss/labels"]
    parts = {
        "cls": torch.nn.functional.cross_entropy(logits, labels),
        "token": 2 * token_loss(numbers["loss/student_tokens"], numbers["loss/teacher_tokens"]),
        "logits": 2 * distillation_loss(logits, numbers["loss/teacher_logits"], temperature),
    }
    for name, value in parts.items():
        assert value.item() == pytest.approx(theirs[name], rel=1e-5)
    assert sum(parts.values()).item() == pytest.approx(theirs["total"], rel=1e-5)
