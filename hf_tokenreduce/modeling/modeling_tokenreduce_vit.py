# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""ViT with token reduction. Weights and names are those of `ViTModel` and `ViTForImageClassification`."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTLayer,
    ViTPooler,
    ViTPreTrainedModel,
)

from .backbone import ReducedAttention, ReducedForImageClassification, ReducedLayer, ReducedModel
from .configuration_tokenreduce import TokenReduceViTConfig


class TokenReduceViTAttention(ReducedAttention, ViTAttention):
    pass


class TokenReduceViTLayer(ReducedLayer, ViTLayer):
    attention_class = TokenReduceViTAttention


class TokenReduceViTPreTrainedModel(ViTPreTrainedModel):
    config: TokenReduceViTConfig
    _no_split_modules = ["ViTEmbeddings", "TokenReduceViTLayer"]


class TokenReduceViTModel(ReducedModel, TokenReduceViTPreTrainedModel):
    layer_class = TokenReduceViTLayer
    embeddings_class = ViTEmbeddings
    pooler_class = ViTPooler


class TokenReduceViTForImageClassification(ReducedForImageClassification, TokenReduceViTPreTrainedModel):
    model_class = TokenReduceViTModel


# Checkpoints on the Hub still carry the key names of older transformers versions.
register_checkpoint_conversion_mapping(
    "TokenReduceViTModel", get_checkpoint_conversion_mapping("ViTModel"), overwrite=True
)
TokenReduceViTModel.register_for_auto_class("AutoModel")
TokenReduceViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
