"""What the tuner tries: methods, their settings, where tokens are removed, and on which images."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from datasets import load_dataset
from helpers import tiny_model
from PIL import Image

from hf_tokenreduce import LTMPConfig, ToMeConfig
from hf_tokenreduce.loading import contents
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.modeling.encoders import facts_of
from hf_tokenreduce.modeling.multiply_adds import even_counts, even_share
from hf_tokenreduce.tuning import Variant, even_setting, search, searched_methods, variants_of
from hf_tokenreduce.tuning.parts import MOST_SEARCHED, split_rows, subset_sizes
from hf_tokenreduce.tuning.space import shape_of
from hf_tokenreduce.tuning.tuner import _without_copies


@pytest.mark.parametrize("depth", [4, 12, 24])
def test_what_is_searched(depth):
    facts = facts_of(tiny_model(num_hidden_layers=depth).config)
    for method in searched_methods():
        variants = variants_of(method, facts)
        assert variants[0] == Variant(method.name)  # the method as it is comes first
        assert len(variants) == len({json.dumps(variant.settings) for variant in variants})
        if method.at_share is None or method.prepare is not None:
            continue
        settings = [even_setting(variant, facts, 0.65) for variant in variants]
        assert settings[0] == method.at_share(facts, 0.65)
        shares = [even_share(setting, facts) for setting in settings if setting is not None]
        assert len(shares) > 2 and max(shares) <= 0.65 and sorted(shares)[len(shares) // 2] > 0.6
    named = [method.name for method in searched_methods()]
    assert named == [name for name, method in METHODS.items() if method.tuned_settings is not None]


def test_what_must_be_trained_first_is_left_out():
    assert not {"sit", "dlvit"} & {method.name for method in searched_methods()}
    with pytest.raises(ValueError, match="SiT cannot be searched: it must be trained before it is of use"):
        searched_methods(["tome", "sit"])


def test_a_description_says_what_is_tried(monkeypatch):
    facts = facts_of(tiny_model().config)
    monkeypatch.setitem(METHODS, "topk", replace(METHODS["topk"], tuned_settings={"keep_rate": (0.3,)}))
    monkeypatch.setitem(METHODS, "tome", replace(METHODS["tome"], tuned_settings=None))
    assert Variant("topk", {"keep_rate": 0.3}) in variants_of(METHODS["topk"], facts)
    assert "tome" not in [method.name for method in searched_methods()]


@pytest.mark.parametrize("name", ["tome", "topk", "evit", "bat"])
@pytest.mark.parametrize("shape", [(0.5, 0.0, 0.25, 0.25), (0.0, 0.0, 1.0, 0.0), (0.1, 0.2, 0.3, 0.4)])
def test_tokens_are_removed_where_a_shape_says(name, shape):
    facts = facts_of(tiny_model().config)
    setting = even_setting(Variant(name, shape=shape), facts, 0.8)
    if setting is None:  # ToMe merges at most half of what a layer has
        assert name == "tome" and shape == (0.0, 0.0, 1.0, 0.0)
        return
    assert 0.77 < even_share(setting, facts) <= 0.8
    counts = [facts.num_patches + 1, *even_counts(setting, facts)]
    assert [new < old for old, new in pairwise(counts)] == [part > 0 for part in shape]
    assert shape_of(setting, facts) == pytest.approx(shape, abs=0.06)


def test_what_cannot_have_another_shape():
    facts = facts_of(tiny_model().config)
    assert shape_of(LTMPConfig(), facts) is None and shape_of(ToMeConfig(r=0), facts) is None


def test_the_parts_of_the_images():
    labels = [row % 7 for row in range(301)]
    parts = split_rows(labels, 301, seed=3)
    assert sorted(parts.search + parts.report) == list(range(301))
    for label in range(7):  # half of each class, give or take one
        counts = [sum(labels[row] == label for row in part) for part in parts]
        assert abs(counts[0] - counts[1]) <= 1
    assert split_rows(labels, 301, seed=3) == parts and split_rows(labels, 301, seed=4) != parts
    large = split_rows(None, 5000, seed=0)
    assert len(large.search) == MOST_SEARCHED and len(large.report) == 5000 - MOST_SEARCHED
    assert subset_sizes(500)[-1] == 500 and subset_sizes(500)[0] < 80 and subset_sizes(20) == [20]


def test_copies_of_a_picture_are_in_one_part(tmp_path):
    for number in range(30):
        picture = Image.new("RGB", (4, 4), (number % 20, 0, 0))  # ten of them are there twice
        picture.save(tmp_path / f"{number}.png")
    photos = load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    parts = _without_copies(photos, split_rows(None, 30, 0), "image")
    search, report = (set(contents(photos.select(rows))) for rows in parts)
    assert search and report and not search & report
    with pytest.raises(ValueError, match="Every image is there several times"):
        _without_copies(photos.select([0] * 40), split_rows(None, 40, 0), "image")


def test_methods_are_compared_at_the_share_that_their_time_asks_for(monkeypatch):
    """A method that is best at equal multiply-adds but slow needs a lower share. There it may be the worse one."""
    fixed = {"slow": 0.4, "fast": 0.0}  # time that a method takes on top of its share
    asked = []

    def quality(setting, count):
        asked.append(setting)
        name, share = setting
        return 1 - share + (0.1 if name == "fast" else 0.0)  # a distance: at equal shares the slow method is better

    trials = SimpleNamespace(
        dataset=range(100), clock=0.0, quality=quality, order=lambda distance: distance,
        speedup=lambda setting: 1 / (setting[1] + fixed[setting[0]]),
    )  # fmt: skip
    ranked = [search.Candidate(name, (name, 0.66)) for name in ("slow", "fast")]
    monkeypatch.setattr(search, "_few_of_each_method", lambda trials, ranked: ranked)
    monkeypatch.setattr(search, "_candidate", lambda trials, name, share: search.Candidate(name, (name, share)))
    found = search._by_expected_share(trials, ranked, 1.5, 0.66, until=1.0)
    assert [candidate.variant for _, candidate in found] == ["fast", "slow"]
    for share, candidate in found:
        assert share == candidate.setting[1] == pytest.approx(1 / (1.02 * 1.5) - fixed[candidate.variant])
    assert len(asked) == 2
