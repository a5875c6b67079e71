"""What is peculiar to BAT, SiT and DL-ViT; what they share with all methods is in test_matrix.py."""

import copy

import pytest
import torch
from helpers import METHODS, reduce_tiny, tiny_images, tiny_model
from torch.nn import functional as F
from transformers.utils import logging

from hf_tokenreduce import BATConfig, DLViTConfig, SiTConfig, ToMeConfig, calibrate, reduce_tokens
from hf_tokenreduce.methods.fitting import before_acting
from hf_tokenreduce.methods.sit import _neighbours_together
from hf_tokenreduce.modeling.bat import density_peaks, fuse_alike, keep_diverse
from hf_tokenreduce.training import reverse_modules


def test_clusters_are_found_where_they_are():
    generator = torch.Generator().manual_seed(0)
    means = 20 * torch.eye(4, 8)
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 1, 0, 1, 3])
    features = (means[labels] + 0.1 * torch.randn(12, 8, generator=generator))[None]
    centre = density_peaks(features, 4)[0]
    assert all((labels == label).equal(centre == centre[labels == label][0]) for label in range(4))
    assert centre.unique().tolist() == [i for i in range(12) if centre[i] == i]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_densities_do_not_depend_on_the_scale_of_the_features(scale):
    features = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(density_peaks(features * scale, 5), density_peaks(features, 5))


def test_ties_go_to_the_earlier():
    same = torch.ones(2, 6, 8)
    assert density_peaks(same, 1)[0].tolist() == [0] * 6
    assert density_peaks(same, 3)[0].tolist() == [0, 1, 2, 0, 0, 0]
    assert fuse_alike(same, 2)[0].tolist() == [1, 1, 1, 3, 4, 5]
    scores = torch.full((2, 6), 0.1)
    assert keep_diverse(scores, same, same, None, 3, 1, 1).target[0].tolist() == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("method", ["bat", "bat-clusters", "bat-pairs", "sit", "dlvit-share"])
def test_constant_and_broken_images(method):
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    images = torch.cat([torch.zeros(1, 3, 32, 32), tiny_images(2)])
    images[1, 0, 3, 3] = torch.nan
    output = model(images)
    assert output.logits[[0, 2]].isfinite().all() and output.logits[1].isnan().all()
    for index in (0, 2):
        torch.testing.assert_close(output.logits[index], model(images[[index]]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_rate", [0.02, 0.3, 0.77, 0.99])
@pytest.mark.parametrize("cluster_share", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("fuse_share", [0.0, 0.41, 1.0])
def test_any_split_gives_the_count_that_was_asked_for(keep_rate, cluster_share, fuse_share):
    setting = BATConfig(keep_rate=keep_rate, layers=(0, 1, 2), cluster_share=cluster_share, fuse_share=fuse_share)
    model = reduce_tokens(tiny_model(), setting)
    output = model(tiny_images(2), output_patch_map=True)
    expected = 64
    for layer in range(3):
        expected = setting.leaving(layer, expected, model.config)
        assert (output.token_counts[:, layer] == 1 + expected).all()
    assert output.patch_map.amax() == expected
    for count in range(1, 65):
        for leaving in range(1, count):
            attentive, fused, clusters = setting.split(count, leaving)
            assert attentive - fused + clusters == leaving
            assert 2 * fused <= attentive <= count - clusters


def test_calibrated_slimming_pools_neighbours():
    stock = tiny_model()
    with torch.no_grad():
        stock.vit.embeddings.position_embeddings.mul_(4)  # so that tokens of random weights show where they are
    model = reduce_tokens(stock, SiTConfig(layers=(0, 2), keep_rate=0.25)).train()
    same = copy.deepcopy(model)
    images = tiny_images(24)
    before = model.eval()(images, output_patch_map=True).patch_weights
    share = calibrate(model.train(), images, steps=120)
    assert model.training and 0.3 < share < 0.6
    assert all("after_layer" not in vars(layer.reducer) for layer in model.vit.layers)
    after = model.eval()(tiny_images(4, seed=11), output_patch_map=True).patch_weights
    # The last 4 slim tokens are quarters of the 8 x 8 grid, each of one piece.
    quarters = torch.arange(64).view(8, 8)[[0, 0, 4, 4], [0, 4, 0, 4]]
    mass = torch.stack([_quarter(after, quarter // 8, quarter % 8) for quarter in quarters.tolist()], dim=-1)
    assert mass.diagonal(dim1=1, dim2=2).mean() > 0.6
    assert before.amax() < 0.1
    calibrate(same, images, steps=120)
    assert torch.equal(same.vit.layers[2].reducer.fc2.weight, model.vit.layers[2].reducer.fc2.weight)


def test_calibrated_slim_tokens_give_back_what_is_alike():
    """Images of two colours, with the border somewhere else in each: what is alike is not in the same place."""
    stock = tiny_model()
    with torch.no_grad():
        stock.vit.embeddings.position_embeddings.mul_(0.1)  # so that tokens show more than where they are
    model = reduce_tokens(stock, SiTConfig(layers=(0,), keep_rate=0.125))

    def images(count, seed):
        draw = torch.Generator().manual_seed(seed)
        left, right = torch.randn(2, count, 3, 1, 1, generator=draw)
        border = torch.randint(1, 32, (count, 1, 1, 1), generator=draw)
        return torch.where(torch.arange(32) < border, left, right).expand(count, 3, 32, 32).contiguous()

    calibrate(model, images(24, 0), steps=200)
    reducer, seen = model.vit.layers[0].reducer, []
    with before_acting([reducer], "after_layer", lambda reducer, state: seen.append(state)):
        model.eval()(images(8, 1))
    patches = seen[0].hidden_states[:, 1:]
    logits = reducer.logits(patches)
    restored = logits.softmax(dim=2) @ (logits.softmax(dim=1).transpose(1, 2) @ patches)
    lost, whole = ((other - patches).square().mean() for other in (restored, patches.mean(dim=1, keepdim=True)))
    assert lost < 0.7 * whole, (lost, whole)


def _quarter(weights, top, left):
    return weights.view(*weights.shape[:2], 8, 8)[:, :, top : top + 4, left : left + 4].sum(dim=(2, 3))


def test_neighbours_stay_together():
    assert _neighbours_together(0, 2, 0, 2, 2) == [0, 1, 2, 3]
    assert _neighbours_together(0, 4, 0, 4, 4)[:4] == [0, 1, 4, 5]
    for height, width in ((14, 14), (3, 7), (1, 5)):
        assert sorted(_neighbours_together(0, height, 0, width, width)) == list(range(height * width))


def test_calibration_of_slimming_refuses():
    model = reduce_tokens(tiny_model(), SiTConfig(layers=(1,)))
    with pytest.raises(ValueError, match=r"keep_rate.*leave target out"):
        calibrate(model, tiny_images(), 0.65)
    with pytest.raises(ValueError, match=r"steps.*0"):
        calibrate(model, tiny_images(), steps=0)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(reduce_tokens(model, ToMeConfig(r=2)), tiny_images(), 0.65)


def test_half_a_model_can_be_calibrated():
    model = reduce_tokens(tiny_model(), SiTConfig(layers=(1,))).to(torch.bfloat16)
    before = model.vit.layers[1].reducer.fc2.weight.clone()
    calibrate(model, tiny_images(8).to(torch.bfloat16), steps=5)
    assert model.dtype == torch.bfloat16
    assert not torch.equal(model.vit.layers[1].reducer.fc2.weight, before)


def test_slimming_refuses_images_with_fewer_patches_than_it_leaves():
    model = reduce_tokens(tiny_model(), SiTConfig(layers=(1,)))
    output = model(torch.randn(1, 3, 40, 40), interpolate_pos_encoding=True)
    assert output.token_counts[0].tolist() == [101, 33, 33, 33]
    with pytest.raises(ValueError, match=r"16 patch tokens cannot be slimmed to 32"):
        model(torch.randn(1, 3, 16, 16), interpolate_pos_encoding=True)


def test_the_way_back_has_a_module_for_every_slim_layer():
    model = reduce_tokens(tiny_model(), SiTConfig(layers=(1, 2)))
    reverse = reverse_modules(model)
    assert list(reverse) == ["1", "2", "3"]
    hidden = model(tiny_images(), output_hidden_states=True).hidden_states
    for layer, module in reverse.items():
        assert module(hidden[int(layer) + 1][:, 1:]).shape == (3, 64, 48)
    assert not set(map(id, reverse.parameters())) & set(map(id, model.parameters()))
    with pytest.raises(ValueError, match="SiTConfig"):
        reverse_modules(tiny_model())


def test_an_untrained_filter_keeps_everything_and_says_so_once(caplog):
    logging.warning_once.cache_clear()  # another test may have made it speak
    stock = tiny_model()
    for _ in range(2):
        model = reduce_tokens(stock, DLViTConfig(keep_rate=0.5))
    assert len([record for record in caplog.records if "not trained yet" in record.getMessage()]) == 1
    torch.testing.assert_close(model(tiny_images()).logits, stock(tiny_images()).logits, rtol=0, atol=1e-5)


def test_the_filter_learns_by_labels_not_through_the_model():
    model = reduce_tokens(tiny_model(), DLViTConfig(trained=True, keep_rate=0.5)).train()
    reducer = model.vit.layers[0].reducer
    assert not any(p.requires_grad for p in reducer.parameters())
    assert [name for name, _ in model.named_parameters() if ".reducer." in name and ".layers.0." not in name] == []
    model(tiny_images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    reducer.requires_grad_(True)
    tokens = model.vit.embeddings(tiny_images())[:, 1:].detach()
    labels = (tokens.norm(dim=-1) > tokens.norm(dim=-1).median()).float()
    optimizer = torch.optim.Adam(reducer.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(reducer.logits(tokens), labels).backward()
        optimizer.step()
    kept = model.eval()(tiny_images(), output_patch_map=True).patch_map >= 0
    assert (kept == labels.bool()).float().mean() > 0.9


def test_thresholds_of_the_filter():
    counts = {}
    for threshold in (0.0, 0.05, 0.2, 1.0):
        model = reduce_tiny(tiny_model(), DLViTConfig(threshold=threshold, trained=True))
        counts[threshold] = model(tiny_images()).token_counts[:, -1].sum().item()
    assert counts[0.0] == 3 * 65 > counts[0.05] > counts[0.2] > counts[1.0] == 3
    capped = reduce_tiny(tiny_model(), DLViTConfig(threshold=0.0, max_tokens=20, trained=True))(tiny_images())
    assert (capped.token_counts == 20).all()
