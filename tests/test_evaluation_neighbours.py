"""Nearest neighbours that vote for a class, against a plain loop, and on photographs."""

import math

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import ViTImageProcessor

from hf_tokenreduce import ToMeConfig, reduce_tokens
from hf_tokenreduce.evaluation import evaluate_features, features, nearest_neighbour_classes
from hf_tokenreduce.loading import load_images


def naive_votes(queries, bank, labels, k, leave_one_out):
    """Image by image, neighbour by neighbour."""
    voted = []
    for row, query in enumerate(queries):
        near = []
        for other, feature in enumerate(bank):
            if not (leave_one_out and other == row):
                near.append((float(query @ feature / (query.norm() * feature.norm())), int(labels[other])))
        votes = {}
        for cosine, label in sorted(near, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / 0.07)
        voted.append(max(sorted(votes), key=votes.get))
    return voted


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("k", [1, 3, 20, 500])
@pytest.mark.parametrize("bank_at_once", [4, 1000])
def test_votes_are_those_of_a_plain_loop(monkeypatch, bank_at_once, k, leave_one_out):
    monkeypatch.setattr(features, "QUERIES_AT_ONCE", 7)  # so that there are several parts
    monkeypatch.setattr(features, "BANK_AT_ONCE", bank_at_once)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 4
    bank = torch.randn(30, 6, generator=generator) + 2 * F.one_hot(labels, 6)
    queries = bank if leave_one_out else torch.randn(17, 6, generator=generator) * torch.arange(1, 18)[:, None]
    found = nearest_neighbour_classes(queries, bank, labels, k=k, leave_one_out=leave_one_out)
    assert found.tolist() == naive_votes(queries.double(), bank.double(), labels, k, leave_one_out)
    if leave_one_out:
        assert (found == labels).double().mean() > 0.5


def test_votes_need_a_neighbour():
    one = torch.ones(1, 3)
    assert nearest_neighbour_classes(one, one, torch.tensor([2])).tolist() == [2]
    with pytest.raises(ValueError, match="no neighbour to vote"):
        nearest_neighbour_classes(one, one, torch.tensor([2]), leave_one_out=True)


@pytest.mark.slow
def test_neighbours_on_photographs(shared, tmp_path):
    """TrashNet's classes by the class token of a ViT-Tiny that was trained for ImageNet's."""
    where = shared / "models" / "vit-tiny-patch16-224"
    model = transformers.AutoModel.from_pretrained(where, add_pooling_layer=False)
    images = load_images(str(shared / "data" / "trashnet224"))
    processor = ViTImageProcessor.from_pretrained(where)
    report = evaluate_features(reduce_tokens(model, ToMeConfig(r=8)), images, processor, progress=False)
    assert report.baseline_knn == pytest.approx(85.6, abs=0.5) and report.knn == pytest.approx(83.8, abs=0.5)
