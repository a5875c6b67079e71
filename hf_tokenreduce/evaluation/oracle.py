"""The slice oracle: how fast a reduced model would be if deciding and moving tokens took no time."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..convert import reduce_tokens
from ..modeling.attention import AttentionView
from ..modeling.encoders import encoder_of, facts_of
from ..modeling.hooks import Reducer
from ..modeling.tokens import TokenMap, TokenState, apply_map
from ..tasks import image_side, main_output


class SliceOracle(nn.Module):
    """The dense model, but where a method would act, the sequence is cut to the length that the method leaves.

    Args:
        dense: A model that reduces nothing. The oracle shares its weights.
        hook: The hook where the method acts.
        lengths: Number of tokens that leave each layer, prefix tokens included. It may be changed between calls.
    """

    def __init__(self, dense: PreTrainedModel, hook: str, lengths: list[int] | None = None):
        super().__init__()
        self.model = reduce_tokens(dense, None)
        self.training = self.model.training
        self.lengths = lengths or []
        prefix = facts_of(dense.config).num_prefix_tokens
        for index, layer in enumerate(encoder_of(self.model).layers):
            layer.reducer = _Cut(self, hook, index, prefix)

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        return main_output(image_side(self.model)(*inputs, **kwargs))


class _Cut(Reducer):
    """Keep the first tokens of a layer, as many as the oracle says."""

    built_for = None

    def __init__(self, oracle: SliceOracle, hook: str, layer: int, prefix: int):
        nn.Module.__init__(self)
        # In a tuple the oracle is not registered as a submodule.
        self.oracle, self.hook, self.layer, self.prefix = (oracle,), hook, layer, prefix

    def _first(self) -> TokenMap:
        return TokenMap(None, self.oracle[0].lengths[self.layer] - self.prefix)

    def leaving(self, count: int) -> int:
        return self.oracle[0].lengths[self.layer] - self.prefix

    def before_encoder(self, state: TokenState) -> TokenState:
        return apply_map(state, self._first()) if self.hook == "before_encoder" else state

    def select_queries(self, view: AttentionView, state: TokenState) -> TokenMap | None:
        return self._first() if self.hook == "select_queries" else None

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        # With a method before the encoder each layer still cuts to its own length.
        cuts = self.hook in ("before_encoder", "after_attention")
        return apply_map(state, self._first()) if cuts else state

    def after_layer(self, state: TokenState) -> TokenState:
        return apply_map(state, self._first()) if self.hook == "after_layer" else state
