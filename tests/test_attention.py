import pytest
import torch
from helpers import tiny_images, tiny_model
from transformers.integrations import sdpa_attention
from transformers.models.vit.modeling_vit import eager_attention_forward

from hf_tokenreduce import ToMeConfig, TopKConfig, reduce_tokens
from hf_tokenreduce.modeling import attention as attention_module
from hf_tokenreduce.modeling.attention import AttentionView, fold_key_bias


def heads(dtype, head_dim, queries=9, keys=13):
    shapes = [(2, 3, queries, head_dim), (2, 3, keys, head_dim), (2, 3, keys, head_dim)]
    query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
    bias = torch.randint(1, 40, (2, keys)).float().log()
    return query, key, value, bias


def attention_with_bias(query, key, value, bias, scaling):
    mask = None if bias is None else bias[:, None, None, :].to(query.dtype)
    return eager_attention_forward(torch.nn.Identity(), query, key, value, mask, scaling=scaling)[0]


@pytest.mark.parametrize("head_dim", [8, 14, 16, 30, 64])
def test_folded_bias_is_exact_in_float32(head_dim):
    query, key, value, bias = heads(torch.float32, head_dim)
    scaling = head_dim**-0.5
    wide = fold_key_bias(query, key, value, bias[:, None], scaling)
    assert {tensor.shape[-1] % 8 for tensor in wide} == {0}
    folded = attention_with_bias(*wide, None, scaling)[..., :head_dim]
    torch.testing.assert_close(folded, attention_with_bias(query, key, value, bias, scaling), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [48, 64])
def test_folded_bias_in_half_precision(head_dim, dtype):
    """Of the logits, the folded bias must be good to 16 bits: a bias in one half-precision channel is not."""
    query, key, value, bias = heads(dtype, head_dim)
    scaling = head_dim**-0.5
    wide_query, wide_key, _ = fold_key_bias(query, key, value, bias[:, None], scaling)
    exact = query.double() @ key.double().transpose(2, 3) * scaling + bias[:, None, None, :].double()
    folded = wide_query.double() @ wide_key.double().transpose(2, 3) * scaling
    one_channel = query.double() @ key.double().transpose(2, 3) * scaling + bias[:, None, None, :].to(dtype).double()
    assert (folded - exact).abs().max() < 4.0 * 2**-16
    assert (one_channel - exact).abs().max() > 5 * (folded - exact).abs().max()
    output = attention_with_bias(*fold_key_bias(query, key, value, bias[:, None], scaling), None, scaling)[
        ..., :head_dim
    ]
    reference = attention_with_bias(query.float(), key.float(), value.float(), bias, scaling)
    torch.testing.assert_close(output.float(), reference, rtol=0, atol=0.03)


def test_folding_carries_gradients():
    query, key, value, bias = heads(torch.float32, 16)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    wide = fold_key_bias(*inputs, bias[:, None], 0.25)
    ours = torch.autograd.grad(attention_with_bias(*wide, None, 0.25)[..., :16].pow(2).sum(), inputs)
    theirs = torch.autograd.grad(attention_with_bias(*inputs, bias, 0.25).pow(2).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_flash_kernel_gets_no_mask_and_the_same_logits(monkeypatch):
    """With a stand-in for the kernel: eager attention that refuses a mask and odd head sizes."""
    calls = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
        calls.append(query.shape)
        return eager_attention_forward(module, query, key, value, None, **kwargs)

    stock = tiny_model()
    expected = reduce_tokens(stock, ToMeConfig(r=7))(tiny_images()).logits
    monkeypatch.setitem(attention_module.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model = reduce_tokens(stock, ToMeConfig(r=7))
    model.config._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(model(tiny_images()).logits, expected, rtol=1e-4, atol=1e-5)
    assert [shape[-1] for shape in calls] == [16, 24, 24, 24]  # no bias before the first merge


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # by the stock ViT
def test_flex_attention_takes_the_bias():
    stock = tiny_model()
    expected = reduce_tokens(stock, ToMeConfig(r=7))(tiny_images()).logits
    flex = reduce_tokens(tiny_model(attn_implementation="flex_attention"), ToMeConfig(r=7))
    with torch.no_grad():
        torch.testing.assert_close(flex(tiny_images()).logits, expected, rtol=1e-3, atol=1e-3)


def test_class_attention_is_the_first_row_of_the_map():
    model = reduce_tokens(tiny_model(attn_implementation="eager"), TopKConfig(keep_rate=0.5, layers=(1,)))
    views = []
    plain = model.vit.layers[1].reducer.after_attention
    model.vit.layers[1].reducer.after_attention = lambda view, state: views.append(view) or plain(view, state)
    attentions = model(tiny_images(), output_attentions=True).attentions
    torch.testing.assert_close(views[0].class_attention(), attentions[1][:, :, 0])


def test_class_attention_counts_the_bias_and_stays_float32():
    attention = tiny_model().vit.layers[0].attention.to(torch.bfloat16)
    hidden = torch.randn(2, 9, 48, dtype=torch.bfloat16)
    key = torch.randn(2, 3, 9, 16, dtype=torch.bfloat16)
    bias = torch.rand(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = AttentionView(attention, hidden, key, key, bias, 1).class_attention()
    assert row.dtype == torch.float32
    query = attention.q_proj(hidden[:, :1]).view(2, 1, 3, 16).transpose(1, 2).float()
    expected = (query @ key.float().transpose(2, 3) * 0.25 + bias[:, None, None]).softmax(dim=-1)[:, :, 0]
    torch.testing.assert_close(row, expected)
    torch.testing.assert_close(row.sum(dim=-1), torch.ones(2, 3))


@pytest.mark.parametrize("setting", [ToMeConfig(r=7), TopKConfig(keep_rate=0.5, layers=(0, 1, 2, 3))])
def test_no_attention_map_is_built_beside_the_kernel(setting):
    """The largest tensor made outside the kernel is far below heads * tokens * tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.numel())
            return out

    model = reduce_tokens(tiny_model(image_size=128), setting)
    with torch.no_grad(), Watch():
        model(tiny_images(1, size=128))
    tokens = 1025
    assert largest[0] < tokens * tokens / 2


def test_other_implementations_say_they_give_no_attentions(monkeypatch):
    said = []
    monkeypatch.setattr(sdpa_attention.logger, "warning_once", said.append)
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    output = model(tiny_images(), output_attentions=True)
    assert not output.attentions
    assert said and all("does not support `output_attentions=True`" in message for message in said)
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True
