"""The slice oracle: what reducing tokens would give if deciding and moving cost nothing."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.attention import attend, split_heads


class SliceOracle(nn.Module):
    """The dense model, except that where a method acts it cuts the sequence to the length the method leaves there.

    dense: a stock model, base or classifier, whose weights it shares
    lengths: the tokens that leave each layer, prefix included. May be set anew between calls.
    hook: where the method acts
    """

    def __init__(self, dense: PreTrainedModel, hook: str, lengths: list[int] | None = None):
        super().__init__()
        self.dense, self.hook = dense, hook
        self.lengths = lengths or []

    def forward(self, pixel_values: Tensor) -> Tensor:
        base: Any = self.dense.base_model
        hidden = base.embeddings(pixel_values.to(base.embeddings.patch_embeddings.projection.weight.dtype))
        if self.hook == "before_encoder":
            hidden = hidden[:, : self.lengths[0]]
        for layer, length in zip(base.layers, self.lengths, strict=True):
            normed = layer.layernorm_before(hidden)
            if self.hook == "select_queries":
                hidden = hidden[:, :length] + self._of_fewer_queries(layer.attention, normed, length)
            else:
                hidden = hidden + layer.attention(normed)[0]
            if self.hook != "after_layer":
                hidden = hidden[:, :length]
            hidden = (hidden + layer.mlp(layer.layernorm_after(hidden)))[:, :length]
        return self._head(base.layernorm(hidden), base)

    def _of_fewer_queries(self, attention: Any, normed: Tensor, length: int) -> Tensor:
        query, key, value = (
            split_heads(project(rows), attention.head_dim)
            for project, rows in (
                (attention.q_proj, normed[:, :length]),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
        )
        return attention.o_proj(attend(attention, query, key, value, None)[0].flatten(2))

    def _head(self, hidden: Tensor, base: Any) -> Tensor:
        model: Any = self.dense
        if hasattr(model, "cls_classifier"):
            return (model.cls_classifier(hidden[:, 0]) + model.distillation_classifier(hidden[:, 1])) / 2
        if hasattr(model, "classifier"):
            return model.classifier(hidden[:, 0])
        return hidden if base.pooler is None else base.pooler(hidden)
