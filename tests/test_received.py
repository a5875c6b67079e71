"""The ways to attention with received attention give the same: one image at a time, groups of images, a GPU kernel."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from hf_tokenreduce.modeling import attention as attention_module
from hf_tokenreduce.modeling import received
from hf_tokenreduce.modeling.attention import PairBias, gpu_kernels
from hf_tokenreduce.modeling.tokens import pad


HEADS, HEAD_DIM = 3, 8
LENGTHS = (7, 4, 9, 1, 9)


def attention(implementation):
    config = SimpleNamespace(_attn_implementation=implementation)
    return SimpleNamespace(config=config, scaling=HEAD_DIM**-0.5, attention_dropout=0.0, training=False)


def drawn(lengths, biased, with_pairs):
    draw = torch.Generator().manual_seed(0)
    rows = (1, HEADS, sum(LENGTHS), HEAD_DIM) if lengths else (len(LENGTHS), HEADS, 9, HEAD_DIM)
    tensors = [torch.randn(rows, generator=draw).requires_grad_() for _ in range(3)]
    bias = torch.rand(rows[0], rows[2], generator=draw) if biased else None
    pairs = None
    if with_pairs:
        places = torch.stack([torch.randperm(9, generator=draw) for _ in LENGTHS])
        places = places[:1] if with_pairs == "shared" else places
        pairs = PairBias(torch.randn(HEADS, 9, 9, generator=draw), places, places)
    return tensors, bias, pairs


@pytest.mark.parametrize("most", [1, 2 * HEADS * 81, 2**24])
@pytest.mark.parametrize("with_pairs", [False, True, "shared"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_groups_of_images_are_as_one_image_at_a_time(monkeypatch, lengths, implementation, biased, with_pairs, most):
    monkeypatch.setattr(received, "MOST_WEIGHTS", most)
    found = []
    for attend in (received._attend_one_by_one, received._attend_by_groups):
        tensors, bias, pairs = drawn(lengths, biased, with_pairs)
        output, weights, column = attend(attention(implementation), *tensors, bias, lengths, pairs)
        output.square().sum().backward()
        found.append((output, weights, column, *(tensor.grad for tensor in tensors)))
    for one, other in zip(*found, strict=True):
        if one is None:
            assert other is None and implementation == "sdpa"
            continue
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    sums = found[1][2].sum(dim=1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


KERNEL = """
import torch
from hf_tokenreduce.modeling.kernels import received_attention
draw = torch.Generator().manual_seed(0)
lengths, heads = (70, 5, 129, 64), 2
ends = [0, 70, 75, 204, 268]
for head_dim, with_bias in ((64, False), (64, True), (80, True)):
    query, key = (torch.randn(ends[-1], heads, head_dim, generator=draw).half().transpose(0, 1) for _ in range(2))
    bias = torch.rand(ends[-1], generator=draw) if with_bias else None
    wanted, log_sums = [], []
    for begin, end in zip(ends, ends[1:]):
        logits = query[:, begin:end].float() @ key[:, begin:end].float().transpose(1, 2) * 0.125
        logits = logits if bias is None else logits + bias[begin:end]
        log_sums.append(logits.logsumexp(dim=-1))
        wanted.append(logits.softmax(dim=-1).mean(dim=(0, 1)))
    found = received_attention(
        query, key, bias, torch.cat(log_sums, dim=1), torch.tensor(ends, dtype=torch.int32), max(lengths), 0.125
    )
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-6)
print("as the map")
"""


WEIGHTED = """
import torch
from hf_tokenreduce.modeling.kernels import weighted_attention
draw = torch.Generator().manual_seed(0)
for head_dim, queries, tokens in ((64, 70, 70), (64, 1, 129), (24, 65, 3)):
    query = torch.randn(3, queries, 2, head_dim, generator=draw).half().transpose(1, 2)
    both = torch.randn(3, tokens, 2, 2 * head_dim, generator=draw).half().transpose(1, 2)  # the rows lie apart
    key, value = both[..., :head_dim], both[..., head_dim:]
    bias = torch.randn(3, tokens, generator=draw)
    logits = query.float() @ key.float().transpose(2, 3) * 0.125 + bias[:, None, None]
    wanted = (logits.softmax(dim=-1) @ value.float()).transpose(1, 2)
    found = weighted_attention(query, key, value, bias, 0.125)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=2e-3)
print("as the map")
"""


@pytest.mark.parametrize("script", [KERNEL, WEIGHTED])
def test_the_gpu_kernels_compute_what_the_map_gives(script):
    """The kernels run in triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton", reason="triton comes with torch for CUDA")
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "as the map" in done.stdout, done.stderr


def test_padding_receives_nothing():
    tensors, bias, _ = drawn(LENGTHS, True, False)
    column = received._attend_by_groups(attention("sdpa"), *tensors, bias, LENGTHS, None)[2]
    real = pad(torch.ones(1, sum(LENGTHS), dtype=torch.bool), LENGTHS)
    assert (column[real] > 0).all() and not column[~real].any()


def test_the_kernel_is_asked_for_only_where_triton_is():
    assert (gpu_kernels() is None) == (find_spec("triton") is None)


def test_an_image_without_tokens_gives_no_nan():
    tensors, bias, _ = drawn(LENGTHS, True, False)
    first = [tensor.detach()[:, :, :7] for tensor in tensors]
    output, maps, column = received._attend_by_groups(attention("eager"), *first, bias[:, :7], (4, 0, 3), None)
    assert output.isfinite().all() and not column[1].any() and not maps[1].any()
    sums = column.sum(dim=1)
    torch.testing.assert_close(sums, torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("changed", "takes"),
    [
        ({}, True),
        ({"is_cuda": False}, False),
        ({"dtype": torch.float32}, False),
        ({"shape": (2, 3, 9, 256)}, False),
        ({"requires_grad": True}, False),
        ({"capability": (7, 5)}, False),
        ({"kernels": None}, False),
        ({"compiling": True}, False),
        ({"tracing": True}, False),
    ],
)
def test_our_kernel_attends_only_where_it_can(monkeypatch, changed, takes):
    """It has no gradient, holds a head in one block, and is not seen by a tracer."""
    asked = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (2, 3, 9, 64), "requires_grad": False} | changed
    query = SimpleNamespace(**{name: asked[name] for name in ("is_cuda", "dtype", "shape", "requires_grad")}, device=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: changed.get("capability", (9, 0)))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: changed.get("compiling", False))
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: changed.get("tracing", False))
    monkeypatch.setattr(attention_module, "gpu_kernels", lambda: changed.get("kernels", "ours"))
    assert attention_module._takes_own_kernel(query, query, query, query) is takes
    if changed.get("requires_grad"):
        with torch.no_grad():
            assert attention_module._takes_own_kernel(query, query, query, query)


def test_our_kernel_gets_the_sizes(monkeypatch):
    """A mask with a row for each query, and dropout, go to torch."""
    tensors, bias, _ = drawn(None, True, False)
    wanted, _ = attention_module._attend_by_sdpa(attention("sdpa"), *tensors, bias)
    seen = []

    def weighted(query, key, value, key_bias, scale):
        seen.append(key_bias)
        logits = query @ key.transpose(2, 3) * scale + key_bias[:, None, None]
        return (logits.softmax(dim=-1) @ value).transpose(1, 2)

    monkeypatch.setattr(attention_module, "_takes_own_kernel", lambda *tensors: True)
    monkeypatch.setattr(attention_module, "gpu_kernels", lambda: attention_module.GpuKernels(weighted, None))
    found, _ = attention_module._attend_by_sdpa(attention("sdpa"), *tensors, bias)
    torch.testing.assert_close(found, wanted)
    training = attention("sdpa")
    training.training, training.attention_dropout = True, 0.5
    for module, one_bias in ((training, bias), (attention("sdpa"), bias[:, None, None].expand(-1, HEADS, 9, -1))):
        attention_module._attend_by_sdpa(module, *tensors, one_bias)
    assert len(seen) == 1 and seen[0] is bias
