# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""DeiT with its distillation token and token reduction. Weights and names are those of the stock DeiT classes."""

from dataclasses import dataclass

from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deit.modeling_deit import (
    DeiTAttention,
    DeiTEmbeddings,
    DeiTForImageClassificationWithTeacherOutput,
    DeiTLayer,
    DeiTPooler,
    DeiTPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .backbone import (
    ReducedAttention,
    ReducedForImageClassification,
    ReducedLayer,
    ReducedModel,
    ReducedPreTrainedModel,
    classification_head,
)
from .configuration_tokenreduce import TokenReduceDeiTConfig


class TokenReduceDeiTAttention(ReducedAttention, DeiTAttention):
    pass


class TokenReduceDeiTLayer(ReducedLayer, DeiTLayer):
    attention_class = TokenReduceDeiTAttention


class TokenReduceDeiTPreTrainedModel(DeiTPreTrainedModel):
    config: TokenReduceDeiTConfig
    _no_split_modules = ["DeiTEmbeddings", "TokenReduceDeiTLayer"]


class TokenReduceDeiTModel(ReducedModel, TokenReduceDeiTPreTrainedModel):
    layer_class = TokenReduceDeiTLayer
    embeddings_class = DeiTEmbeddings
    pooler_class = DeiTPooler


class TokenReduceDeiTForImageClassification(ReducedForImageClassification, TokenReduceDeiTPreTrainedModel):
    model_class = TokenReduceDeiTModel


@dataclass
class TokenReduceDeiTWithTeacherOutput(DeiTForImageClassificationWithTeacherOutput):
    """The stock output with `token_counts`, `patch_map` and `patch_weights` of `TokenReduceModelOutput`."""

    token_counts: Tensor | None = None
    patch_map: Tensor | None = None
    patch_weights: Tensor | None = None


class TokenReduceDeiTForImageClassificationWithTeacher(ReducedPreTrainedModel, TokenReduceDeiTPreTrainedModel):
    """The mean of two heads, one on the class and one on the distillation token. For inference only, as the stock
    model is."""

    def __init__(self, config: TokenReduceDeiTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deit = TokenReduceDeiTModel(config, add_pooling_layer=False)
        self.cls_classifier = classification_head(config)
        self.distillation_classifier = classification_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_patch_map: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenReduceDeiTWithTeacherOutput:
        if kwargs.get("labels") is not None:
            raise ValueError(
                "TokenReduceDeiTForImageClassificationWithTeacher is for inference only and has no loss. To train, "
                "load the checkpoint as TokenReduceDeiTForImageClassification."
            )
        outputs = self.deit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            output_patch_map=output_patch_map,
            **kwargs,
        )
        cls_logits = self.cls_classifier(outputs.last_hidden_state[:, 0])
        distillation_logits = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        return TokenReduceDeiTWithTeacherOutput(
            logits=(cls_logits + distillation_logits) / 2,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_counts=outputs.token_counts,
            patch_map=outputs.patch_map,
            patch_weights=outputs.patch_weights,
        )


# Checkpoints on the Hub still carry the key names of older transformers versions.
register_checkpoint_conversion_mapping(
    "TokenReduceDeiTModel", get_checkpoint_conversion_mapping("DeiTModel"), overwrite=True
)
TokenReduceDeiTModel.register_for_auto_class("AutoModel")
TokenReduceDeiTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
TokenReduceDeiTForImageClassificationWithTeacher.register_for_auto_class("AutoModelForImageClassification")
