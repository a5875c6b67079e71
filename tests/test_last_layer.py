"""The last layer of a classifier that reads prefix tokens alone: fewer rows, the same numbers.

The reference is the same model when it is asked for its patch map: then the last layer computes everything.
"""

import copy

import pytest
import torch
from families import FAMILIES, family_inputs, family_model
from helpers import (
    BACKBONES,
    EVERY_CASE,
    METHODS,
    ONE_OF_EACH,
    enable_checkpointing,
    reduce_tiny,
    slow,
    tiny_images,
    tiny_model,
)
from torch._dynamo.testing import CompileCounterWithBackend

from hf_tokenreduce import DLViTConfig, SiTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.evaluation.compute import dense_multiply_adds, measured_multiply_adds, total_multiply_adds
from hf_tokenreduce.modeling.encoders import READ_PREFIX_ALONE, encoder_of


class RowsOfTheLastMLP:
    """How many rows the MLP of the last layer gets. It looks without a hook: one would be somebody who looks."""

    def __init__(self, model):
        self.mlp, self.rows = encoder_of(model).layers[-1].mlp, []
        self.stock = self.mlp.forward
        self.mlp.forward = self._see

    def _see(self, hidden_states):
        self.rows.append(hidden_states.shape[0] * hidden_states.shape[1])
        return self.stock(hidden_states)


@pytest.mark.parametrize(("backbone", "method"), [*EVERY_CASE, *((backbone, None) for backbone in BACKBONES)])
def test_logits_are_those_of_the_whole_layer(backbone, method):
    stock = tiny_model(backbone)
    model = reduce_tokens(stock, None) if method is None else reduce_tiny(stock, METHODS[method][0])
    seen, images = RowsOfTheLastMLP(model), tiny_images(3)
    with torch.no_grad():
        short, whole = model(images), model(images, output_patch_map=True)
    prefix = encoder_of(model).facts.num_prefix_tokens
    assert seen.rows == [3 * prefix, int(seen.rows[1])] and seen.rows[1] > seen.rows[0]
    torch.testing.assert_close(short.logits, whole.logits, rtol=1e-6, atol=2e-6)
    assert torch.equal(short.token_counts[:, :-1], whole.token_counts[:, :-1])
    if method is None:
        torch.testing.assert_close(short.logits, stock(images).logits, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("method", [*ONE_OF_EACH, None])
def test_gradients_are_those_of_the_whole_layer(method):
    model = reduce_tokens(tiny_model(), None) if method is None else reduce_tiny(tiny_model(), METHODS[method][0])
    model.train()
    images, labels, found = tiny_images(3), torch.tensor([0, 3, 1]), []
    for whole in (False, True):
        model.zero_grad()
        model(images, labels=labels, output_patch_map=whole).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["tome", "ltmp"])
def test_attentions_and_types(method, implementation, dtype):
    model = reduce_tiny(tiny_model(attn_implementation=implementation), METHODS[method][0]).to(dtype)
    images = tiny_images(3).to(dtype)
    with torch.no_grad():
        short, whole = model(images).logits, model(images, output_patch_map=True).logits
    torch.testing.assert_close(short, whole, rtol=1e-6, atol=3e-2 if dtype == torch.bfloat16 else 2e-6)


def test_whoever_looks_sees_the_whole_layer():
    model = reduce_tokens(tiny_model(attn_implementation="eager"), ToMeConfig(r=7))
    seen, images = RowsOfTheLastMLP(model), tiny_images(2)
    model(images)
    hidden = model(images, output_hidden_states=True).hidden_states
    attentions = model(images, output_attentions=True).attentions
    assert hidden[-1].shape[1] == seen.rows[1] // 2 == seen.rows[2] // 2 == 65 - 28
    assert attentions[-1].shape[-2:] == (44, 44) and seen.rows[0] == 2
    base = RowsOfTheLastMLP(model)
    assert model.vit(images).last_hidden_state.shape[1] == base.rows[0] // 2 == 65 - 28
    plain = RowsOfTheLastMLP(model)
    again = model(images)  # transformers leaves its hooks in place, but nobody looks through them now
    assert plain.rows == [2] and again.token_counts[:, -1].tolist() == [37, 37]
    fresh = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    seen, kept = RowsOfTheLastMLP(fresh), []
    handle = encoder_of(fresh).layers[-1].register_forward_hook(lambda module, args, output: kept.append(output[0]))
    fresh(images)
    handle.remove()
    fresh(images)
    assert seen.rows == [2 * 37, 2] and kept[0].shape[1] == 37


def test_a_network_in_the_last_layer_learns():
    model = reduce_tokens(tiny_model(), SiTConfig(keep_rate=0.5, layers=(1, 3))).train()
    model(tiny_images(2), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_kind_see_all_rows(kind):
    """They see the rows that a layer takes, and the gradients of the rows that it returns."""
    model, rows = reduce_tokens(tiny_model(), ToMeConfig(r=7)).train(), []
    mlp = encoder_of(model).layers[-1].mlp
    handle = getattr(mlp, f"register_{kind}_hook")(lambda module, first, *others: rows.append(first[0].shape[1]))
    for watched in (True, False):
        seen = RowsOfTheLastMLP(model)
        model(tiny_images(2), labels=torch.tensor([0, 1])).loss.backward()
        assert seen.rows == [2 * 37 if watched else 2]
        handle.remove()
    assert rows == [37]


@pytest.mark.parametrize("method", ["tome", None])
def test_hooks_behind_the_layers_see_all_rows(method):
    """Programs that extract features or explain a model put hooks on the last norm, or on the encoder."""
    model, images = reduce_tokens(tiny_model(), method and ToMeConfig(r=7)), tiny_images(2)
    norm = [part for part in encoder_of(model).module.children() if isinstance(part, torch.nn.LayerNorm)][-1]
    for watched in (norm, encoder_of(model).module):
        seen = []
        handle = watched.register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))
        logits = model(images).logits
        handle.remove()
        rows = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0].last_hidden_state
        assert rows.shape[1] == (65 if method is None else 37)
        torch.testing.assert_close(model(images).logits, logits)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["tome", "ats"])
def test_with_gradient_checkpointing(method, reentrant):
    plain = reduce_tiny(tiny_model(), METHODS[method][0]).train()
    checked = copy.deepcopy(plain)
    enable_checkpointing(checked, {"use_reentrant": reentrant})
    for model in (plain, checked):
        model(tiny_images(2), labels=torch.tensor([0, 1])).loss.backward()
    for one, other in zip(plain.parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("name", READ_PREFIX_ALONE)
def test_what_is_named_reads_the_prefix_alone(name):
    """Nonsense in the patches that leave the encoder changes no logit of a stock model."""
    model, inputs = _stock_of(name)
    encoder = encoder_of(model)
    norm = [part for part in encoder.module.children() if isinstance(part, torch.nn.LayerNorm)][-1]
    prefix = encoder.facts.num_prefix_tokens
    with torch.no_grad():
        before = model(**inputs).logits
        handle = norm.register_forward_hook(
            lambda module, args, rows: torch.cat([rows[:, :prefix], torch.full_like(rows[:, prefix:], torch.nan)], 1)
        )
        after = model(**inputs).logits
        handle.remove()
    assert torch.equal(before, after) and torch.isfinite(after).all()


def _stock_of(name):
    for family in FAMILIES:
        model = family_model(family)
        if type(model).__name__ == name:
            return model, family_inputs(family, 2)
    return tiny_model(next(key for key, (stock, _) in BACKBONES.items() if stock.__name__ == name)), {
        "pixel_values": tiny_images(2)
    }


@pytest.mark.parametrize("method", [*ONE_OF_EACH, None])
def test_it_is_counted_and_papers_number_beside_it(method):
    stock, images = tiny_model(), tiny_images(2)
    model = reduce_tokens(stock, None) if method is None else reduce_tiny(stock, METHODS[method][0])
    with torch.no_grad():
        counts = model(images).token_counts
    ours, papers = (total_multiply_adds(model, counts, as_in_papers=whole) for whole in (False, True))
    assert ours.tolist() == measured_multiply_adds(model, images).tolist()
    assert (ours < papers).all() and (papers <= dense_multiply_adds(stock)).all()
    assert total_multiply_adds(stock).item() == dense_multiply_adds(stock)


@pytest.mark.parametrize("setting", [{"keep_rate": 0.5}, {"threshold": 0.5}])
def test_a_filter_before_the_only_layer_is_counted_once(setting):
    model = reduce_tokens(tiny_model(num_hidden_layers=1), DLViTConfig(trained=True, **setting))
    with torch.no_grad():
        counts = [model(tiny_images(2), output_patch_map=whole).token_counts for whole in (False, True)]
    assert torch.equal(*counts) and (counts[0] < 65).all()


@pytest.mark.parametrize("method", ["tome", "sit", None, *map(slow, ("evit", "bat", "dlvit-share"))])
def test_compiled(method):
    torch._dynamo.reset()
    stock = tiny_model()
    model = reduce_tokens(stock, None) if method is None else reduce_tiny(stock, METHODS[method][0])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in (2, 3):
            images = tiny_images(seed=seed)
            ours, theirs = compiled(images), model(images)
            torch.testing.assert_close(ours.logits, theirs.logits)
            assert torch.equal(ours.token_counts, theirs.token_counts)
    assert counter.frame_count == 1
    torch._dynamo.reset()
