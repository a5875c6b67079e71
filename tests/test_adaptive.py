"""ATS and LTMP on packed tokens: edges, caps, and that nothing is computed for padding."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers import ADAPTIVE, METHODS, SIZES, reduce_tiny, tiny_images, tiny_model

from hf_tokenreduce import ATSConfig, LTMPConfig, TokenReduceDeiTConfig, TokenReduceViTConfig, reduce_tokens
from hf_tokenreduce.modeling import attention as attention_module
from hf_tokenreduce.modeling import received as received_module
from hf_tokenreduce.modeling.ats import sample_inverse
from hf_tokenreduce.modeling.tokens import pad, unpad


def test_pad_and_unpad():
    rows = torch.randn(1, 9, 2)
    padded = pad(rows, (4, 0, 5))
    assert padded.shape == (3, 5, 2)
    assert torch.equal(padded[0, :4], rows[0, :4]) and torch.equal(padded[2], rows[0, 4:])
    assert not padded[0, 4:].any() and not padded[1].any()
    assert torch.equal(unpad(padded, (4, 0, 5)), rows)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_images_differ_and_padding_is_never_computed(method):
    """Linear layers see exactly the rows that are there, all images at once."""
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    rows = []
    for layer in model.vit.layers:
        layer.mlp.fc1.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:2].numel()))
    counts = model(tiny_images(6)).token_counts
    assert rows == counts.sum(dim=0).tolist()
    if "capped" not in method:
        assert len(set(counts[:, -1].tolist())) > 1


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_constant_image(method):
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()  # then all patches of it are the same
    images = torch.cat([torch.zeros(1, 3, 32, 32), tiny_images(2)])
    together = model(images)
    assert together.logits.isfinite().all()
    torch.testing.assert_close(together.logits[:1], model(images[:1]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [*ADAPTIVE, "tome", "evit"])
def test_nan_pixels_stay_with_their_image(method):
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    images = tiny_images(3)
    clean = model(images).logits
    images[1, 0, 5, 5] = torch.nan
    broken = model(images).logits
    assert broken[1].isnan().all()
    torch.testing.assert_close(broken[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [*ADAPTIVE, "tome", "topk"])
def test_an_empty_batch_is_an_error(method):
    with pytest.raises(ValueError, match="batch is empty"):
        reduce_tiny(tiny_model(), METHODS[method][0])(torch.randn(0, 3, 32, 32))


NOTHING_LEFT = {
    "ats one token": ATSConfig(layers=(1, 2), num_tokens=1),
    "ats cap of one": ATSConfig(layers=(1, 2), max_tokens=1),
    "ltmp prunes all": LTMPConfig(prune_threshold=1.0),
    "ltmp prunes all, no merge": LTMPConfig(prune_threshold=1.0, merge=False),
    "ltmp cap of one": LTMPConfig(merge_threshold=1.0, max_tokens=1),
}


@pytest.mark.parametrize("setting", NOTHING_LEFT.values(), ids=NOTHING_LEFT)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_left_but_the_prefix(setting, attention):
    model = reduce_tokens(tiny_model(attn_implementation=attention), setting)
    output = model(tiny_images(), output_patch_map=True, output_hidden_states=True)
    assert (output.token_counts[:, -1] == 1).all()
    assert (output.patch_map == -1).all()
    assert output.logits.isfinite().all()
    assert output.hidden_states[-1].shape == (3, 1, 48)
    model.zero_grad()
    output.logits.sum().backward()


def test_a_single_sample_is_the_highest_score():
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.2], [0.2, 0.1, 0.1, 0.9]])
    for valid in (None, torch.tensor([[True] * 4, [True, True, True, False]])):
        kept = sample_inverse(scores, valid, 1).target.argmax(dim=1).tolist()
        assert kept == [1, 3 if valid is None else 0]


def test_more_tokens_than_there_are():
    model = reduce_tokens(tiny_model(), ATSConfig(layers=(1,), num_tokens=5000))
    counts = model(tiny_images()).token_counts
    assert (counts[:, -1] <= 65).all() and (counts[:, -1] >= 60).all()
    model = reduce_tokens(tiny_model(), LTMPConfig(merge_threshold=0.0))
    counts = model(tiny_images()).token_counts
    assert (counts >= 33).any() and (counts[:, -1] < 20).all()


@pytest.mark.parametrize("cap", [1, 2, 7, 40])
@pytest.mark.parametrize("make", [lambda cap: ATSConfig(layers=(0, 1, 2, 3), max_tokens=cap), None])
def test_a_cap_holds_whatever_the_input(cap, make):
    setting = make(cap) if make else LTMPConfig(merge_threshold=1.0, max_tokens=cap)
    model = reduce_tokens(tiny_model(), setting)
    for images in (tiny_images(), torch.zeros(2, 3, 32, 32), 1e3 * tiny_images(seed=9)):
        assert (model(images).token_counts <= cap).all()


def test_a_cap_keeps_the_most_important():
    stock = tiny_model()
    free = reduce_tokens(stock, LTMPConfig(merge=False))
    views = []
    act = free.vit.layers[0].reducer.after_attention
    free.vit.layers[0].reducer.after_attention = lambda view, state: views.append(view) or act(view, state)
    free(tiny_images())
    capped = reduce_tokens(stock, LTMPConfig(merge=False, max_tokens=[21, 65, 65, 65]))
    kept = capped(tiny_images(), output_patch_map=True).patch_map >= 0
    best = views[0].received[:, 1:].argsort(dim=1, descending=True)[:, :20]
    assert all(
        set(row.nonzero().flatten().tolist()) == set(order.tolist()) for row, order in zip(kept, best, strict=True)
    )


WRONG = [
    (lambda: ATSConfig(num_tokens=0), "num_tokens.*0"),
    (lambda: ATSConfig(num_tokens=2.5), "num_tokens.*2.5"),
    (lambda: ATSConfig(score="best"), "score.*'best'"),
    (lambda: ATSConfig(layers=(1, 2), max_tokens=[4]), "1 for 2"),
    (lambda: ATSConfig(max_tokens=-3), "max_tokens.*-3"),
    (lambda: LTMPConfig(merge=False, prune=False), "leave nothing to do"),
    (lambda: LTMPConfig(target=1.5), "target.*1.5"),
    (lambda: LTMPConfig(temperature=0), "temperature.*0"),
    (lambda: LTMPConfig(prune_threshold=-0.1), "prune_threshold.*-0.1"),
    (lambda: LTMPConfig(max_tokens="9"), "max_tokens.*'9'"),
    (lambda: TokenReduceViTConfig(**SIZES, reduction=ATSConfig()), "no layer 4 in a model of 4 layers"),
    (lambda: TokenReduceViTConfig(**SIZES, reduction=LTMPConfig(max_tokens=[9, 9])), "2 values for 4 layers"),
    (lambda: TokenReduceDeiTConfig(**SIZES, reduction=LTMPConfig(max_tokens=1)), "max_tokens=1 is less than the 2"),
    (lambda: TokenReduceDeiTConfig(**SIZES, reduction=ATSConfig(layers=(1,), num_tokens=1)), "num_tokens=1 is less"),
]


@pytest.mark.parametrize(("attempt", "message"), WRONG)
def test_wrong_settings(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


@pytest.mark.parametrize("release", ["first", "later"])
def test_a_varlen_kernel_gets_what_it_needs(monkeypatch, release):
    """A stand-in for the CUDA kernel attends one packed sequence after the other. Its first release takes no
    scale. With the attention map never stored, received attention comes from the kernel's sums of exponentials."""
    calls, summed = [], []

    def attend(query, key, value, query_ends, key_ends, longest_query, longest_key, scale):
        assert query_ends.dtype == key_ends.dtype == torch.int32
        assert longest_query == query_ends.diff().max() and longest_key == key_ends.diff().max()
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        calls.append(len(query))
        outputs, log_sums = [], []
        for image in range(len(query_ends) - 1):
            rows = slice(query_ends[image], query_ends[image + 1])
            keys = slice(key_ends[image], key_ends[image + 1])
            logits = torch.einsum("qhd,khd->hqk", query[rows], key[keys]) * scale
            log_sums.append(logits.logsumexp(dim=-1))
            outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), value[keys]))
        return torch.cat(outputs), torch.cat(log_sums, dim=1)

    def received_attention(query, key, bias, log_sums, ends, longest, scale):
        assert longest == ends.diff().max() and log_sums.shape == query.shape[:2]
        summed.append(len(ends) - 1)
        columns = []
        for begin, end in pairwise(ends):
            logits = query[:, begin:end] @ key[:, begin:end].transpose(1, 2) * scale
            logits = logits if bias is None else logits + bias[begin:end]
            columns.append((logits - log_sums[:, begin:end, None]).exp().mean(dim=(0, 1)))
        return torch.cat(columns)

    def first(query, key, value, query_ends, key_ends, longest_query, longest_key, *, return_aux):
        assert return_aux.lse
        scale = query.shape[-1] ** -0.5
        return attend(query, key, value, query_ends, key_ends, longest_query, longest_key, scale)

    def later(query, key, value, query_ends, key_ends, longest_query, longest_key, *, return_aux, scale):
        assert return_aux.lse
        return attend(query, key, value, query_ends, key_ends, longest_query, longest_key, scale)

    kernel = first if release == "first" else later
    settings = METHODS["ats"][0], LTMPConfig(merge_threshold=0.4, prune=False), METHODS["ltmp"][0]
    # The third attends without a map from the first layer on. The last layer, for the class token, needs no columns.
    for setting, packed_layers, all_sums in zip(settings, (3, 3, 4), (0, 0, 3), strict=True):
        model = reduce_tokens(tiny_model(), setting)
        expected = model(tiny_images())
        monkeypatch.setattr(attention_module, "varlen_attn", kernel)
        monkeypatch.setattr(attention_module, "has_varlen_kernel", lambda attention, query: True)
        monkeypatch.setattr(received_module, "has_varlen_kernel", lambda attention, query: True)
        monkeypatch.setattr(received_module, "gpu_kernels", lambda: SimpleNamespace(received=received_attention))
        calls.clear(), summed.clear()
        output = model(tiny_images())
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(output.token_counts, expected.token_counts)
        assert (len(calls), len(summed)) == (packed_layers, all_sums)
        monkeypatch.undo()
