"""The places where later methods act, with a small learned method that uses all of them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import BACKBONES, tiny_images, tiny_model
from torch import nn

from hf_tokenreduce import TokenReduceViTForImageClassification, ToMeConfig, reduce_tokens, restore
from hf_tokenreduce.modeling.configuration_base import ReductionConfig
from hf_tokenreduce.modeling.hooks import Reducer
from hf_tokenreduce.modeling.methods import METHOD_CLASSES, MethodClasses
from hf_tokenreduce.modeling.tokens import apply_map
from hf_tokenreduce.modeling.topk import keep_best


class EverywhereReducer(Reducer):
    """Drops 4 patches before the encoder, 8 inside the attention of layer 1, 2 after every layer; learns a scale."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.layer = layer
        self.norm = nn.LayerNorm(config.hidden_size)
        self.scorer = nn.Linear(config.hidden_size, 1)

    def before_encoder(self, state):
        return apply_map(state, keep_best(self._scores(state.hidden_states), state.num_patch_tokens - 4))

    def select_queries(self, view, state):
        if self.layer != 1:
            return None
        return keep_best(view.class_attention().mean(dim=1)[:, state.num_prefix_tokens :], state.num_patch_tokens - 8)

    def after_layer(self, state):
        hidden_states = state.hidden_states * self.norm.weight
        scores = self._scores(hidden_states)
        state = state._replace(hidden_states=hidden_states)
        return apply_map(state, keep_best(scores, state.num_patch_tokens - 2, fuse=True))

    def _scores(self, hidden_states):
        return self.scorer(hidden_states).squeeze(-1).float()[:, -(hidden_states.shape[1] - self.prefix) :]

    prefix = 1


@pytest.fixture
def everywhere(monkeypatch):
    @dataclass(frozen=True)
    class EverywhereConfig(ReductionConfig):
        method: ClassVar[str] = "everywhere"

    monkeypatch.setitem(METHOD_CLASSES, "everywhere", MethodClasses(EverywhereConfig, EverywhereReducer))
    return EverywhereConfig()


def test_every_hook_is_called_in_its_place(everywhere):
    model = reduce_tokens(tiny_model(), everywhere)
    output = model(tiny_images(), output_patch_map=True, output_hidden_states=True)
    # 64 patches: -4, then per layer -2 dropped +1 fused, and -8 in layer 1
    assert output.token_counts[0].tolist() == [1 + 59, 1 + 50, 1 + 49, 1 + 48]
    assert [hidden.shape[1] for hidden in output.hidden_states] == [61, 60, 51, 50, 49]
    assert (output.patch_map < 0).sum(dim=1).min() >= 12  # a dropped token may have been a fused one


def test_hooks_of_an_idle_dropout_are_called():
    model, seen = reduce_tokens(tiny_model(), ToMeConfig(r=7)), []
    dropout = model.vit.layers[1].dropout
    model(tiny_images())
    for register, name in ((dropout.register_forward_pre_hook, "before"), (dropout.register_forward_hook, "after")):
        handle = register(lambda *args, name=name: seen.append(name))
        model(tiny_images())
        handle.remove()
    model(tiny_images())
    assert sorted(set(seen)) == ["after", "before"] and len(seen) == 2 * seen.count("after")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_selected_queries_attend_to_all_keys(everywhere, attention):
    stock = tiny_model(attn_implementation=attention)
    model = reduce_tokens(stock, everywhere)
    layer, seen = model.vit.layers[1], {}
    layer.register_forward_hook(lambda module, args, output: seen.update(inputs=args, output=output))
    select = layer.reducer.select_queries
    layer.reducer.select_queries = lambda view, state: seen.update(map=select(view, state)) or seen["map"]
    layer.reducer.after_layer = lambda state: state
    model(tiny_images())
    dense = stock.vit.layers[1](seen["inputs"][0])
    target = seen["map"].target
    for image in range(3):
        for patch, goes_to in enumerate(target[image].tolist()):
            if goes_to >= 0:
                ours = seen["output"].hidden_states[image, 1 + goes_to]
                torch.testing.assert_close(ours, dense[image, 1 + patch], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen["output"].hidden_states[image, 0], dense[image, 0], rtol=1e-4, atol=1e-5)


def test_learned_parts_are_named_initialised_trained_and_saved(everywhere, tmp_path):
    stock = tiny_model()
    model = reduce_tokens(stock, everywhere).train()
    own = {name for name, _ in model.named_parameters()} - {name for name, _ in stock.named_parameters()}
    parts = ("norm.weight", "norm.bias", "scorer.weight", "scorer.bias")
    assert own == {f"vit.layers.{layer}.reducer.{part}" for layer in range(4) for part in parts}
    model(tiny_images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(layer.reducer.norm.weight.grad.abs().sum() > 0 for layer in model.vit.layers)
    # what the last layer fuses after it has attended can no longer reach the class token
    assert all(layer.reducer.scorer.weight.grad.abs().sum() > 0 for layer in model.vit.layers[:3])

    with torch.no_grad():
        model.vit.layers[2].reducer.scorer.bias.fill_(0.25)
    model.save_pretrained(tmp_path)
    loaded, info = TokenReduceViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.vit.layers[2].reducer.scorer.bias.item() == 0.25


def test_a_plain_checkpoint_misses_only_the_learned_parts(everywhere, tmp_path):
    stock = tiny_model()
    stock.save_pretrained(tmp_path)
    model, info = TokenReduceViTForImageClassification.from_pretrained(
        tmp_path, reduction=everywhere, output_loading_info=True
    )
    assert len(info["missing_keys"]) == 16
    assert all(".reducer." in name for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for layer in model.vit.layers:
        assert torch.equal(layer.reducer.norm.weight, torch.ones(48))
        assert torch.equal(layer.reducer.scorer.bias, torch.zeros(1))
        assert 0 < layer.reducer.scorer.weight.std() < 0.1
    assert torch.equal(restore(model).eval()(tiny_images()).logits, stock(tiny_images()).logits)


def test_learned_parts_go_with_the_dtype_and_leave_with_the_method(everywhere):
    model = reduce_tokens(tiny_model().to(torch.bfloat16), everywhere)
    assert model.vit.layers[0].reducer.scorer.weight.dtype == torch.bfloat16
    model.set_reduction(ToMeConfig(r=3))
    assert not [name for name, _ in model.named_parameters() if "reducer" in name]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_prefix_is_passed_on_untouched_by_maps(backbone, everywhere, monkeypatch):
    monkeypatch.setattr(EverywhereReducer, "prefix", 1 if backbone == "vit" else 2)
    model = reduce_tokens(tiny_model(backbone), everywhere)
    states = []
    model.base_model.layers[0].register_forward_pre_hook(lambda module, args: states.append(args))
    model(tiny_images())
    embedded = model.base_model.embeddings(tiny_images())
    prefix = model.config.num_prefix_tokens
    assert torch.equal(states[0][0][:, :prefix], embedded[:, :prefix])
    assert states[0][0].shape[1] == embedded.shape[1] - 4
