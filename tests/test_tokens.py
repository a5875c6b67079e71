"""Properties of token maps, whatever the method that made them."""

import copy
import pickle
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tokenreduce.modeling import tokens
from hf_tokenreduce.modeling.attention import AttentionView
from hf_tokenreduce.modeling.grid import on_grid
from hf_tokenreduce.modeling.packed import as_numbers, layout_of, on_device
from hf_tokenreduce.modeling.tokens import (
    TokenMap,
    TokenState,
    apply_map,
    follow,
    merge,
    merge_by_product,
    merge_by_sums,
    mix,
    move,
    start,
)
from hf_tokenreduce.modeling.tome import match_most_similar
from hf_tokenreduce.modeling.topk import keep_best, rounded_up_share


@st.composite
def maps(draw, batch=2, min_tokens=1):
    """Any hard map: (map, number of tokens it takes). Every output token has at least one input token."""
    num_tokens = draw(st.integers(min_tokens, 12))
    num_outputs = draw(st.integers(1, num_tokens))
    keeps_all = draw(st.booleans())
    rows = []
    for _ in range(batch):
        order = draw(st.permutations(range(num_tokens)))
        row = [0] * num_tokens
        for position, token in enumerate(order):
            row[token] = (
                position if position < num_outputs else draw(st.integers(0 if keeps_all else -1, num_outputs - 1))
            )
        rows.append(row)
    target = torch.tensor(rows)
    if draw(st.booleans()):
        return merge(target, num_outputs, torch.rand(target.shape) + 0.1, keeps_all=keeps_all)
    one_each = torch.tensor([[value if row.index(value) == i else -1 for i, value in enumerate(row)] for row in rows])
    return TokenMap(one_each, num_outputs)


def states(token_map, prefix):
    batch, num_tokens = token_map.target.shape
    return start(torch.randn(batch, prefix + num_tokens, 3), prefix, track_patches=True)


def dense(token_map):
    """The map as a matrix (B, N, M)."""
    batch, num_tokens = token_map.target.shape
    matrix = torch.zeros(batch, num_tokens, token_map.num_tokens)
    for image in range(batch):
        for token in range(num_tokens):
            goes_to = token_map.target[image, token]
            if goes_to >= 0:
                matrix[image, token, goes_to] = 1.0 if token_map.weight is None else token_map.weight[image, token]
    return matrix


@given(st.integers(1, 12), st.data())
def test_merging_by_one_product_is_merging_by_sums(num_tokens, data):
    """Also for a number of outputs that is no multiple of 8, which the product fills up. Outputs and gradients."""
    length = data.draw(st.integers(1, num_tokens))
    slots = [[data.draw(st.integers(0, length - 1)) for _ in range(num_tokens)] for _ in range(2)]
    slot, weight = torch.tensor(slots), torch.rand(2, num_tokens) + 0.1
    found = []
    for way in (merge_by_sums, merge_by_product):
        rows, weights = (
            torch.arange(2 * num_tokens * 5.0).view(2, num_tokens, 5).sin().requires_grad_(),
            weight.clone(),
        )
        merged = way(rows, slot, length, weights.requires_grad_())
        merged.square().sum().backward()
        found.append((merged, rows.grad, weights.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_product_merges_only_in_half_precision_on_a_gpu_without_gradients():
    fits = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (2, 197, 384), "requires_grad": False}
    assert tokens._product_is_faster(SimpleNamespace(**fits))
    for changed in (
        {"is_cuda": False}, {"dtype": torch.float32}, {"shape": (2, 385, 384)}, {"requires_grad": True},
    ):  # fmt: skip
        assert not tokens._product_is_faster(SimpleNamespace(**fits | changed)), changed


@given(maps(), st.integers(1, 3))
def test_moving_is_a_matrix_product_on_patches_and_leaves_the_prefix(token_map, prefix):
    state = states(token_map, prefix)
    moved = move(state.hidden_states, token_map, prefix)
    assert torch.equal(moved[:, :prefix], state.hidden_states[:, :prefix])
    torch.testing.assert_close(moved[:, prefix:], dense(token_map).transpose(1, 2) @ state.hidden_states[:, prefix:])


@given(maps(), st.integers(0, 3), st.booleans())
def test_what_a_map_says_of_itself_changes_nothing(token_map, prefix, sized):
    state = states(token_map, prefix)
    if sized:
        state = state._replace(size=torch.randint(1, 5, token_map.target.shape).float())
    if token_map.weight is not None:
        mass = torch.ones(token_map.target.shape) if state.size is None else state.size
        token_map = merge(
            token_map.target, token_map.num_tokens, mass, mass_is_size=True, keeps_all=token_map.keeps_all
        )
    ours, theirs = apply_map(state, token_map), apply_map(state, token_map._replace(size=None, keeps_all=False))
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states)
    assert (ours.size is None) == (theirs.size is None) and torch.equal(ours.patch_map, theirs.patch_map)
    if ours.size is not None:
        torch.testing.assert_close(ours.size, theirs.size)


@given(maps(batch=1), st.integers(1, 3))
def test_a_number_for_each_of_one_image_is_even(token_map, prefix):
    state = states(token_map, prefix)
    one = apply_map(state, token_map._replace(num_tokens=(token_map.num_tokens,)))
    even = apply_map(state, token_map)
    assert one.lengths is None and torch.equal(one.hidden_states, even.hidden_states)
    assert torch.equal(one.patch_map, even.patch_map)


@given(maps(), st.integers(1, 3))
@settings(max_examples=50)
def test_gradients_of_moving(token_map, prefix):
    state = states(token_map, prefix)
    hidden = state.hidden_states.requires_grad_()
    moved = move(hidden, token_map, prefix)
    direction = torch.randn_like(moved)
    (ours,) = torch.autograd.grad((moved * direction).sum(), hidden)
    assert torch.equal(ours[:, :prefix], direction[:, :prefix])
    torch.testing.assert_close(ours[:, prefix:], dense(token_map) @ direction[:, prefix:])


@given(st.data(), st.integers(1, 2))
def test_maps_compose(data, prefix):
    first = data.draw(maps())
    state = apply_map(states(first, prefix), first)
    second = data.draw(maps(min_tokens=1).filter(lambda m: m.target.shape[1] == first.num_tokens))
    after = apply_map(state, second)
    assert torch.equal(after.patch_map, follow(first.target, second.target, fill=-1))
    # a patch that was not dropped is held by a token whose size counts it
    if after.size is not None:
        held = torch.stack([(after.patch_map == token).sum(dim=1) for token in range(second.num_tokens)], dim=1)
        torch.testing.assert_close(after.size, held.float())


@given(st.integers(2, 30), st.integers(0, 40), st.integers(1, 4), st.booleans())
def test_merging_loses_no_patch(num_tokens, r, prefix, sized):
    keys = torch.randn(2, num_tokens, 4)
    size = torch.randint(1, 5, (2, num_tokens)).float() if sized else None
    token_map = match_most_similar(keys, size, r, prefix)
    assert token_map.num_tokens == num_tokens - min(r, num_tokens // 2)
    hidden = torch.randn(2, prefix + num_tokens, 5)
    patch_map = torch.arange(num_tokens).repeat(2, 1)
    state = apply_map(TokenState(hidden, size, patch_map, prefix), token_map)
    before = torch.full((2,), float(num_tokens)) if size is None else size.sum(dim=1)
    torch.testing.assert_close(state.size.sum(dim=1), before)
    assert (state.patch_map >= 0).all()
    assert torch.equal(state.hidden_states[:, :prefix], hidden[:, :prefix])
    # the size-weighted mean of all patch tokens does not change
    old = torch.ones(2, num_tokens) if size is None else size
    mean = (hidden[:, prefix:] * old[..., None]).sum(dim=1)
    torch.testing.assert_close((state.hidden_states[:, prefix:] * state.size[..., None]).sum(dim=1), mean)


def test_identical_tokens_merge_in_order_of_their_index():
    token_map = match_most_similar(torch.ones(1, 8, 4), None, 2, num_prefix_tokens=1)
    # even set: patches 1, 3, 5, 7; odd set: 0, 2, 4, 6. The first two of the even set go into the first of the odd.
    assert token_map.target.tolist() == [[2, 2, 3, 2, 4, 0, 5, 1]]


@given(st.integers(1, 20), st.data())
def test_the_best_are_kept_in_order(num_tokens, data):
    count = data.draw(st.integers(1, num_tokens))
    scores = torch.randint(0, 5, (2, num_tokens)).float() / 5
    kept = keep_best(scores, count)
    fused = keep_best(scores, count, fuse=True)
    for image, row in enumerate(scores.tolist()):
        order = sorted(range(num_tokens), key=lambda token: (-row[token], token))
        expected = [order.index(token) if order.index(token) < count else -1 for token in range(num_tokens)]
        assert kept.target[image].tolist() == expected
        assert fused.target[image].tolist() == [count if place < 0 else place for place in expected]
        weights = [row[token] if place < 0 else 1.0 for token, place in enumerate(expected)]
        torch.testing.assert_close(fused.weight[image], torch.tensor(weights))


def test_shares_are_blind_to_the_last_digits_of_a_float():
    assert 0.55 * 100 > 55
    assert rounded_up_share(0.55, 100) == 55
    assert rounded_up_share(0.551, 100) == 56
    assert rounded_up_share(0.01, 3) == 1
    assert rounded_up_share(1.0, 196) == 196
    assert rounded_up_share(1e-12, 100) == 1
    assert rounded_up_share(float(torch.tensor(0.6)), 100) == 60


def test_sums_are_formed_in_float32():
    token_map = TokenMap(torch.zeros(1, 512, dtype=torch.long), 1, torch.full((1, 512), 1 / 512))
    rows = torch.cat([torch.zeros(1, 1, 2), torch.ones(1, 512, 2)], dim=1).to(torch.bfloat16)
    assert torch.equal(move(rows, token_map, 1)[0, 1], torch.ones(2, dtype=torch.bfloat16))


def test_matching_is_that_of_float32_also_under_autocast():
    keys = torch.randn(4, 60, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = match_most_similar(keys, None, 20, 1)
    assert torch.equal(under.target, match_most_similar(keys, None, 20, 1).target)


def test_mixtures_are_those_of_float32_also_under_autocast():
    weights, state = torch.randn(2, 12, 5).softmax(dim=1), start(torch.randn(2, 13, 16), 1, track_patches=True)
    again = torch.randn(2, 5, 3).softmax(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = mix(mix(state, weights), again)
        grid = on_grid(under)
    expected = mix(mix(state, weights), again)
    assert under.patch_weights.dtype == torch.float32 and torch.equal(under.patch_weights, expected.patch_weights)
    assert torch.equal(under.hidden_states, expected.hidden_states) and torch.equal(grid, on_grid(expected))


def test_keys_are_averaged_in_float32():
    key = torch.randn(2, 3, 9, 16).to(torch.bfloat16)
    view = AttentionView(None, None, key, key, None, 1)
    assert torch.equal(view.patch_keys(), key.float().mean(dim=1)[:, 1:])


def test_what_is_remembered_of_packed_rows_cannot_be_changed():
    """A layout is made once for its counts. A mask that a method changes in place is its own."""
    counts = as_numbers(torch.tensor([3, 1, 2]), 3)
    lengths = TokenMap(torch.zeros(3, 3, dtype=torch.long), counts).lengths(1)
    assert lengths == (4, 2, 3) and layout_of(lengths, torch.device("cpu")).starts[:, 0].tolist() == [0, 4, 6]
    assert layout_of(lengths, torch.device("cpu")) is layout_of(lengths, torch.device("cpu"))
    state = TokenState(torch.randn(1, 9, 2), lengths=lengths)
    state.valid().fill_(False)
    assert state.valid().tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert copy.deepcopy(lengths) == pickle.loads(pickle.dumps(lengths)) == lengths
    for one, plain in zip(
        layout_of(lengths, torch.device("cpu")), layout_of((4, 2, 3), torch.device("cpu")), strict=True
    ):
        assert torch.equal(one, plain)


def test_numbers_do_not_go_through_the_default_device():
    with torch.device("meta"):
        assert on_device([1, 2], torch.device("cpu")).tolist() == [1, 2]
