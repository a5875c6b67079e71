"""What is peculiar to the newer methods; what they share with all others is in test_matrix.py."""

import pytest
import torch
from families import family_inputs, family_model, layers_of
from helpers import NUM_PATCHES, SIZES, reduce_tiny, tiny_images, tiny_model
from transformers import Dinov2Config, Dinov2Model

from hf_tokenreduce import (
    DiffRateConfig,
    MCTFConfig,
    PiToMeConfig,
    PPTConfig,
    ProtectedConfig,
    ShiftConfig,
    ToMeConfig,
    TopKConfig,
    reduce_tokens,
)
from hf_tokenreduce.modeling.matching import into_most_similar
from hf_tokenreduce.modeling.pitome import match_by_energy
from hf_tokenreduce.modeling.ppt import prune_or_merge
from hf_tokenreduce.modeling.protected import merge_unprotected


def run(setting, **changes):
    with torch.no_grad():
        return reduce_tokens(tiny_model(**changes), setting)(tiny_images(4), output_patch_map=True)


def groups(patch_map):
    """Tell for each image which patches share a token, whatever the order of the tokens, and which are dropped."""
    return [
        ({frozenset((row == token).nonzero().flatten().tolist()) for token in row.unique() if token >= 0}, row < 0)
        for row in patch_map
    ]


def test_equal_tokens_go_by_their_places():
    features = torch.ones(1, 8, 4)
    sources, receivers = torch.tensor([[6, 2, 4]]), torch.tensor([[5, 1]])
    receiver, going = into_most_similar(features, sources, receivers, 2)
    assert going.tolist() == [[6, 2]]  # the first of those that are given
    assert receiver.tolist() == [[0, 1, 5, 3, 4, 5, 5, 7]]


@pytest.mark.parametrize("protect", [False, True])
def test_what_stands_alone_is_protected(protect):
    """Four tokens are alike, four are like none."""
    alike = torch.eye(8)[0] + 0.01 * torch.eye(8)[:4]
    keys = torch.cat([alike, torch.eye(8)[4:]])[torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])][None]
    token_map = match_by_energy(keys, None, 2, 0.75, protect)
    assert token_map.num_tokens == 6
    places = token_map.target[0].tolist()
    assert len({places[i] for i in (1, 3, 5, 7)}) == 4 and {places[i] for i in (1, 3, 5, 7)}.isdisjoint(
        places[i] for i in (0, 2, 4, 6)
    )
    assert sorted(token_map.size[0].tolist()) in ([1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 3])


def test_ppt_merges_as_tome_does_or_drops():
    r = [0, 9, 0, 5]
    merged, tome = run(PPTConfig(r=r, threshold=1.0)), run(ToMeConfig(r=r))
    assert torch.equal(merged.patch_map, tome.patch_map) and torch.equal(merged.logits, tome.logits)
    dropped = run(PPTConfig(r=r, threshold=0.0))
    assert ((dropped.patch_map < 0).sum(dim=1) == 14).all()
    assert torch.equal(dropped.token_counts, merged.token_counts)


def test_ppt_decides_for_each_image():
    scores = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    scores[0] = 1.0  # nothing stands out
    scores[1, 3] = 100.0
    keys = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(1))
    token_map = prune_or_merge(scores, keys, None, 4, 1e-3, 1)
    assert token_map.num_tokens == 8
    assert (token_map.target[0] >= 0).all() and token_map.size[0].sum() == 12 and token_map.size[0].max() > 1
    lowest = scores[1].argsort()[:4]
    assert sorted((token_map.target[1] < 0).nonzero().flatten().tolist()) == sorted(lowest.tolist())
    assert token_map.size[1].tolist() == [1.0] * 8 and (token_map.weight[1] == 1).all()


def test_ppt_layers_are_those_of_its_numbers():
    assert PPTConfig(r=[0, 3, 0, 2]).layers == (1, 3)
    assert PPTConfig(**{k: v for k, v in PPTConfig(r=[0, 3, 0, 2]).to_dict().items() if k != "method"}).layers == (
        1,
        3,
    )
    assert PPTConfig(r=7, layers=(0, 2)).schedule(4) == [7, 0, 7, 0]


def test_diffrate_that_only_prunes_keeps_what_top_k_keeps():
    ours = run(DiffRateConfig(r=[0, 16, 0, 0], prune_share=1))
    theirs = run(TopKConfig(keep_rate=0.75, layers=(1,)))
    assert torch.equal(ours.patch_map < 0, theirs.patch_map < 0) and torch.equal(
        ours.token_counts, theirs.token_counts
    )
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (0.25, 4), (1.0, 16)])
def test_diffrate_drops_its_share(share, dropped):
    output = run(DiffRateConfig(r=[0, 0, 16, 0], prune_share=share))
    assert ((output.patch_map < 0).sum(dim=1) == dropped).all() and (output.token_counts[:, 2] == 49).all()


def test_mctf_without_its_criteria_begins_as_tome():
    ours = run(MCTFConfig(r=[0, 1, 0, 0], informativeness_weight=0, size_weight=0))
    theirs = run(ToMeConfig(r=[0, 1, 0, 0]))
    assert [merged for merged, _ in groups(ours.patch_map)] == [merged for merged, _ in groups(theirs.patch_map)]


def test_shift_does_not_see_drop_path():
    """An image whose MLP is dropped in training would keep its first patches."""
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": 32, "drop_path_rate": 0.9}
    model = reduce_tokens(Dinov2Model(Dinov2Config(**sizes)).eval(), ShiftConfig(keep_rate=0.25, layers=(3,)))
    places = model.train()(tiny_images(8), output_patch_map=True).patch_map
    first = torch.arange(NUM_PATCHES) < (places >= 0).sum(dim=1, keepdim=True)
    assert not (first == (places >= 0)).all(dim=1).any()


def test_shift_is_what_the_layer_adds_scaled_as_it_is():
    """LayerScale is part of how far a token moves."""
    model = reduce_tiny(family_model("dinov2"), ShiftConfig(keep_rate=0.5, layers=(1,)))
    layer, seen = layers_of(model)[1], []
    layer.layer_scale2.register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        output = model(**family_inputs("dinov2"), output_patch_map=True)
    moved = seen[0][:, 1:].norm(dim=-1)
    for row, lengths in zip(output.patch_map, moved, strict=True):
        assert set((row >= 0).nonzero().flatten().tolist()) == set(lengths.topk(32).indices.tolist())


@pytest.mark.parametrize(("protect", "drop"), [(0.25, 0.2), (0.0, 0.0), (0.9, 0.0), (1.0, 1.0), (0.5, 0.7)])
def test_a_split_adds_up(protect, drop):
    setting = ProtectedConfig(protect_share=protect, drop_share=drop)
    for count in range(1, 60):
        for leaving in range(1, count + 1):
            split = setting.split(count, leaving)
            assert split.merged + split.dropped == count - leaving and min(split) >= 0
            assert split.merged <= split.sources
            if split.merged:
                assert 2 * split.sources <= count - split.protected - split.dropped
                assert split.dropped < count - split.protected


def test_the_important_are_protected_and_the_least_important_dropped():
    generator = torch.Generator().manual_seed(0)
    importance, features = torch.rand(3, 40, generator=generator), torch.randn(3, 40, 6, generator=generator)
    split = ProtectedConfig().split(40, 24)
    assert split == (10, 13, 13, 3)
    token_map = merge_unprotected(importance, features, None, split)
    ranked = importance.argsort(dim=1, descending=True)
    for target, order in zip(token_map.target, ranked, strict=True):
        assert sorted((target < 0).nonzero().flatten().tolist()) == sorted(order[37:].tolist())
        protected = target[order[:10]]
        assert len(set(protected.tolist())) == 10  # none has gone into another
    assert token_map.num_tokens == 24 and token_map.size.sum(dim=1).tolist() == [37.0] * 3


def test_protected_merging_without_a_class_token():
    model = family_model("siglip-vision")
    output = reduce_tokens(model, ProtectedConfig(keep_rate=0.6, layers=(1,)))(**family_inputs("siglip-vision"))
    assert output.token_counts[0].tolist() == [64, 39, 39, 39]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PiToMeConfig(margin=2), "PiToMeConfig: margin must lie between 0 and 1, got 2"),
        (lambda: PiToMeConfig(r=-1), "PiToMeConfig: r must be an integer"),
        (lambda: DiffRateConfig(prune_share=1.5), "DiffRateConfig: prune_share must lie between 0 and 1, got 1.5"),
        (lambda: PPTConfig(threshold="a"), "PPTConfig: threshold is a variance"),
        (lambda: PPTConfig(layers=(1, 1)), "PPTConfig: layers lists a layer twice"),
        (lambda: MCTFConfig(size_weight=-1), "MCTFConfig: size_weight must lie between 0 and 1"),
        (lambda: ProtectedConfig(drop_share=None), "ProtectedConfig: drop_share must lie between 0 and 1, got None"),
        (lambda: ProtectedConfig(prop_attn=1), "ProtectedConfig: prop_attn must be True or False"),
        (lambda: ShiftConfig(keep_rate=0), "ShiftConfig: keep_rate must be above 0"),
        (lambda: run(DiffRateConfig(prune_share=[0.1])), "a list prune_share needs one value per layer"),
        (lambda: run(PPTConfig()), "PPTConfig: there is no layer 6 in a model of 4 layers"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
