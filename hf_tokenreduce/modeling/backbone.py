# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The reduced attention, layer, model and heads that every backbone shares, as mixins over its stock classes.

Parameter names stay those of the stock model; a method's own are `layers.{i}.reducer.*`. The annotations of a mixin
are what it expects the stock class to have.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import AttentionView, attend, attend_masked, attend_with_map, split_heads
from .hooks import Reducer
from .reducers import build_reducer
from .tokens import TokenMap, TokenState, apply_map, move, pad, start, unpad


@dataclass
class TokenReduceModelOutput(BaseModelOutputWithPooling):
    """token_counts: long (B, L), the tokens that leave each layer, prefix tokens included.
    patch_map: long (B, N0), for each patch the index into `last_hidden_state` of the token that holds it, -1 if it
        was dropped. Only with `output_patch_map=True`.
    patch_weights: float32 (B, M, N0), instead of `patch_map` where tokens are mixtures of patches (SiT): what each
        patch weighs in each of the last patch tokens.
    auxiliary_loss: what a method adds to the task's loss in training, if it does.
    kept_shares: (L,) what it was computed from: the mean share of the tokens that each layer passes on.
    """

    token_counts: Tensor | None = None
    patch_map: Tensor | None = None
    patch_weights: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    kept_shares: Tensor | None = None


@dataclass
class TokenReduceImageClassifierOutput(ImageClassifierOutput):
    """An `ImageClassifierOutput` with `token_counts`, `patch_map` and `patch_weights` of `TokenReduceModelOutput`.

    If a method adds a loss of its own in training, `loss` is the sum of `task_loss` and `auxiliary_loss`. Whoever
    computes the task's loss outside, without `labels`, has to add `auxiliary_loss` to it.
    """

    token_counts: Tensor | None = None
    patch_map: Tensor | None = None
    patch_weights: Tensor | None = None
    task_loss: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    kept_shares: Tensor | None = None


class ReducedAttention(nn.Module):
    """The stock attention, except that a reducer may select the queries, and that keys may carry a bias."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int

    def forward(
        self, hidden_states: Tensor, state: TokenState, reducer: Reducer, **kwargs
    ) -> tuple[Tensor, Tensor | None, AttentionView, TokenMap | None]:
        key = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        prefix, lengths = state.num_prefix_tokens, state.lengths
        key_bias = None
        if reducer.prop_attn and state.size is not None:
            key_bias = F.pad(state.size.detach().log(), (prefix, 0))
            if lengths is not None:
                key_bias = unpad(key_bias, lengths)
        view = AttentionView(self, hidden_states, key, value, key_bias, prefix, lengths)
        selected = reducer.select_queries(view, state)
        rows, query_lengths = hidden_states, lengths
        if selected is not None:
            rows, query_lengths = move(hidden_states, selected, prefix, lengths), selected.lengths(prefix)
        query = split_heads(self.q_proj(rows), self.head_dim)
        if state.mask is not None:
            mask = F.pad(state.mask, (prefix, 0), value=1.0)
            output, weights, received = attend_masked(self, query, key, value, key_bias, mask)
            view = view._replace(received=received)
        elif reducer.needs_received:
            output, weights, received = attend_with_map(self, query, key, value, key_bias, lengths)
            view = view._replace(received=received)
        else:
            output, weights = attend(self, query, key, value, key_bias, query_lengths, lengths, **kwargs)
        return self.o_proj(output.flatten(2)), weights, view, selected


class ReducedLayer(nn.Module):
    """The stock layer with its reducer's hooks. Takes the fields of a `TokenState` and returns a `TokenState`."""

    attention_class: type[nn.Module]
    layernorm_before: nn.Module
    layernorm_after: nn.Module
    mlp: nn.Module
    dropout: nn.Module
    reducer: Reducer

    def __init__(self, config, layer: int):
        super().__init__(config)
        self.attention = self.attention_class(config)
        self.reducer = build_reducer(config, layer)

    def forward(self, *state_fields: Any, **kwargs) -> TokenState:
        state = self._attention_block(TokenState(*state_fields), **kwargs)
        hidden_states = state.hidden_states
        hidden_states = hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return self.reducer.after_layer(state._replace(hidden_states=hidden_states))

    def _attention_block(self, state: TokenState, **kwargs) -> TokenState:
        # A method of its own, so that keys and values are freed before the MLP needs its memory.
        output, _, view, selected = self.attention(
            self.layernorm_before(state.hidden_states), state, self.reducer, **kwargs
        )
        if selected is not None:
            state = apply_map(state, selected)
        state = state._replace(hidden_states=state.hidden_states + self.dropout(output))
        return self.reducer.after_attention(view, state)


class ReducedPreTrainedModel(nn.Module):
    """What all reduced models of a backbone share."""

    config: Any
    base_model: Any
    base_model_prefix: str
    post_init: Any
    loss_function: Any
    config_class: Any

    def __init__(self, config, *inputs, **kwargs):
        # By name: from a folder, configuration and model are classes of two modules.
        if type(config).model_type != self.config_class.model_type:
            raise ValueError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got a {type(config).__name__}. Make one "
                f"by {self.config_class.__name__}.from_pretrained(..., reduction=...), or reduce a loaded model by "
                "hf_tokenreduce.reduce_tokens."
            )
        if config.num_hidden_layers < 1:
            raise ValueError(f"A reduced model needs at least one layer, got {config.num_hidden_layers}.")
        super().__init__(config, *inputs, **kwargs)

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As the stock model's, but under the names the parameters have, not those of older versions: Trainer resumes
        from a checkpoint without renaming."""
        if any(layer.reducer.built_for != self.config.reduction for layer in self.base_model.layers):
            raise ValueError(
                "config.reduction is not what this model runs: it was set without set_reduction, or by another model "
                "that shares the configuration. Call model.set_reduction(...) with the setting you want, then save."
            )
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Reducer):
            module.init_weights()

    def set_reduction(self, reduction) -> None:
        """Change the method in place: a method configuration, its dictionary form, or None. Weights stay as they
        are; the learned parts of the method that was there are dropped, those of the new one start untrained.
        """
        self.config.reduction = reduction
        for index, layer in enumerate(self.base_model.layers):
            like = layer.layernorm_before.weight
            layer.reducer = build_reducer(self.config, index).to(device=like.device, dtype=like.dtype)
            layer.reducer.apply(self._init_weights).train(layer.training)


class ReducedModel(ReducedPreTrainedModel):
    """The stock model, except that every layer may hand on fewer tokens than it got."""

    layer_class: type[nn.Module]
    embeddings_class: type[nn.Module]
    pooler_class: type[nn.Module]
    embeddings: Any

    def __init__(self, config, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config, use_mask_token=use_mask_token)
        self.layers: Any = nn.ModuleList(
            [self.layer_class(config, index) for index in range(config.num_hidden_layers)]
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = self.pooler_class(config) if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_patch_map: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenReduceModelOutput:
        """As the stock model's, and `output_patch_map`: return the `patch_map`, or `patch_weights`."""
        images = self._checked_images(pixel_values, interpolate_pos_encoding, attention_mask)
        embedded = self.embeddings(
            images.to(self.embeddings.patch_embeddings.projection.weight.dtype),
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        state = start(embedded, self.config.num_prefix_tokens, track_patches=output_patch_map)
        stages: list[tuple[int, ...] | None] = []
        outputs = self._encode(state, stages, return_dict=True, **kwargs)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(
                hidden if lengths is None or hidden is None else pad(hidden, lengths)
                for hidden, lengths in zip(outputs.hidden_states, stages, strict=True)
            )
        return outputs

    @capture_outputs(tie_last_hidden_states=False)
    def _encode(
        self, state: TokenState, stages: list[tuple[int, ...] | None], **kwargs: Unpack[TransformersKwargs]
    ) -> TokenReduceModelOutput:
        """From embedded images to the output. `stages` is filled with the lengths before and after each layer."""
        state = self.layers[0].reducer.before_encoder(state)
        stages.append(state.lengths)
        counts, kept = [], []
        for layer in self.layers:
            state = TokenState(*layer(*state, **kwargs))
            stages.append(state.lengths)
            counts.append(state.counts())
            if state.mask is not None:
                kept.append(F.pad(state.mask, (state.num_prefix_tokens, 0), value=1.0).mean())

        last_hidden_state = self.layernorm(state.hidden_states)
        if state.lengths is not None:
            last_hidden_state = pad(last_hidden_state, state.lengths)
        patch_map = state.patch_map
        if patch_map is not None:
            patch_map = torch.where(patch_map < 0, patch_map, patch_map + state.num_prefix_tokens)
        num_tokens = state.num_prefix_tokens + state.num_patches
        kept_shares = torch.stack(kept) if kept else None
        return TokenReduceModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pooler(last_hidden_state) if self.pooler is not None else None,
            token_counts=torch.stack(counts, dim=1),
            patch_map=patch_map,
            patch_weights=state.patch_weights,
            auxiliary_loss=self.layers[0].reducer.auxiliary_loss(kept_shares, num_tokens) if kept else None,
            kept_shares=kept_shares,
        )

    def _checked_images(self, pixel_values, interpolate_pos_encoding, attention_mask) -> Tensor:
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass a batch of images, (batch, channels, height, width).")
        if pixel_values.shape[0] == 0:
            raise ValueError("The batch is empty: pass at least one image.")
        if attention_mask is not None:
            raise ValueError(
                "attention_mask does not work with token reduction: it would name tokens that may be gone. Leave it "
                "out, or use the stock model: hf_tokenreduce.restore(model)."
            )
        height, width = pixel_values.shape[-2:]
        expected = tuple(self.embeddings.image_size)
        if not interpolate_pos_encoding and (height, width) != expected:
            raise ValueError(
                f"The images are {height}x{width}, the model takes {expected[0]}x{expected[1]}. Resize them, or pass "
                "interpolate_pos_encoding=True."
            )
        return pixel_values


class ReducedForImageClassification(ReducedPreTrainedModel):
    """The stock classifier on a reduced model; its output also has `token_counts` and `patch_map`."""

    model_class: type[nn.Module]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.model_class(config, add_pooling_layer=False))
        self.classifier = classification_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_patch_map: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenReduceImageClassifierOutput:
        outputs = self.base_model(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            output_patch_map=output_patch_map,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        loss = task_loss = None
        auxiliary_loss = outputs.auxiliary_loss
        if auxiliary_loss is not None and kwargs.get("num_items_in_batch") is not None:
            # Trainer divides nothing itself then: over accumulated batches and ranks, the parts must add up to a mean.
            auxiliary_loss = auxiliary_loss * len(logits) / kwargs["num_items_in_batch"]
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
            if auxiliary_loss is not None:
                task_loss, loss = loss, loss + auxiliary_loss
        return TokenReduceImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_counts=outputs.token_counts,
            patch_map=outputs.patch_map,
            patch_weights=outputs.patch_weights,
            task_loss=task_loss,
            auxiliary_loss=auxiliary_loss,
            kept_shares=outputs.kept_shares,
        )


def classification_head(config) -> nn.Module:
    return nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
