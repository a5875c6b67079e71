"""A tiny reduced model of every task and family, with all that a user saves beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import helpers
import torch
import transformers
from helpers import METHODS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from hf_tokenreduce import reduce_tokens


SIZES = {name: size for name, size in helpers.SIZES.items() if name != "num_labels"}
WITHOUT_INNER = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
TEXT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
SOUND = {
    **{name: size for name, size in SIZES.items() if name not in ("image_size", "patch_size")},
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
    "max_length": 64,
    "num_mel_bins": 64,
}
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "This", "is", "a", "photo", "of", "cat.", "dog.", "what?")
LABELS = {"id2label": dict(enumerate("abcde")), "label2id": {name: index for index, name in enumerate("abcde")}}
SQUARE = {"height": 32, "width": 32}
SHORTEST = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}


class Case(NamedTuple):
    """A family for a task. make, processor: make the stock model and what prepares its inputs."""

    task: str
    method: str
    make: Callable[[], Any]
    processor: Callable[[], Any]


def clip_vision() -> dict[str, Any]:
    return {**SIZES, "projection_dim": 32}


def words() -> Any:
    """A tokenizer of a few words."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def bytes_of_clip() -> Any:
    """CLIP's tokenizer, of single letters."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(vocabulary)}, merges=[], model_max_length=77
    )


def clip_text() -> dict[str, Any]:
    return {**TEXT, "vocab_size": 600, "max_position_embeddings": 77, "projection_dim": 32, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip


def llava() -> Any:
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=3, vocab_size=len(WORDS), pad_token_id=0,
                                    bos_token_id=1, eos_token_id=2)  # fmt: skip
    vision = transformers.CLIPVisionConfig(**SIZES)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=4,
                                 vision_feature_layer=-2)
    )  # fmt: skip


def depth_anything() -> Any:
    backbone = transformers.Dinov2Config(**WITHOUT_INNER, mlp_ratio=2, out_indices=[1, 2, 3, 4],
                                         reshape_hidden_states=False, apply_layernorm=True)  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(backbone_config=backbone, patch_size=4, reassemble_hidden_size=48,
                                         neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, head_hidden_size=8)
    )  # fmt: skip


def of(name: str, config: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**values))


def vit_images() -> Any:
    return transformers.ViTImageProcessorPil(size=SQUARE)


def clip_images() -> Any:
    return transformers.CLIPImageProcessorPil(**SHORTEST)


def siglip_images() -> Any:
    return transformers.SiglipImageProcessorPil(size=SQUARE)


def bit_images() -> Any:
    return transformers.BitImageProcessorPil(**SHORTEST)


CLASSIFIER, ZERO_SHOT, FEATURES = "image-classification", "zero-shot-image-classification", "image-feature-extraction"
MAE = {"decoder_hidden_size": 48, "decoder_num_attention_heads": 3, "decoder_num_hidden_layers": 1,
       "decoder_intermediate_size": 48}  # fmt: skip
SIGLIP_TEXT = {**TEXT, "vocab_size": len(WORDS), "max_position_embeddings": 64, "projection_size": 48,
               "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip

CASES = {
    "registers": Case(
        CLASSIFIER,
        "ats",
        of("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **WITHOUT_INNER, **LABELS,
           mlp_ratio=2, num_register_tokens=4),
        bit_images,
    ),
    "dinov2": Case(
        CLASSIFIER,
        "bat",
        of("Dinov2ForImageClassification", "Dinov2Config", **WITHOUT_INNER, **LABELS, mlp_ratio=2),
        bit_images,
    ),
    "clip-classifier": Case(
        CLASSIFIER, "tome", of("CLIPForImageClassification", "CLIPConfig", vision_config=SIZES, **LABELS), clip_images
    ),
    "siglip-classifier": Case(
        CLASSIFIER,
        "tome",
        of("SiglipForImageClassification", "SiglipConfig", vision_config=SIZES, **LABELS),
        siglip_images,
    ),
    "beit": Case(
        CLASSIFIER,
        "topk",
        of("BeitForImageClassification", "BeitConfig", **SIZES, **LABELS, use_relative_position_bias=True,
           use_mean_pooling=True, layer_scale_init_value=0.1),
        lambda: transformers.BeitImageProcessorPil(size=SQUARE, crop_size=SQUARE),
    ),
    "ijepa": Case(
        CLASSIFIER, "tome", of("IJepaForImageClassification", "IJepaConfig", **SIZES, **LABELS), vit_images
    ),
    "msn": Case(CLASSIFIER, "ltmp", of("ViTMSNForImageClassification", "ViTMSNConfig", **SIZES, **LABELS), vit_images),
    "clip": Case(
        ZERO_SHOT,
        "ltmp",
        of("CLIPModel", "CLIPConfig", vision_config=clip_vision(), text_config=clip_text(), projection_dim=32),
        lambda: transformers.CLIPProcessor(clip_images(), bytes_of_clip()),
    ),
    "siglip": Case(
        ZERO_SHOT,
        "tome",
        of("SiglipModel", "SiglipConfig", vision_config=SIZES, text_config=SIGLIP_TEXT),
        lambda: transformers.SiglipProcessor(siglip_images(), words()),
    ),
    "dinov2-features": Case(
        FEATURES, "evit", of("Dinov2Model", "Dinov2Config", **WITHOUT_INNER, mlp_ratio=2), bit_images
    ),
    "dinov3": Case(
        FEATURES,
        "tome",
        of("DINOv3ViTModel", "DINOv3ViTConfig", **SIZES, num_register_tokens=4),
        vit_images,
    ),
    "clip-vision": Case(FEATURES, "sit", of("CLIPVisionModel", "CLIPVisionConfig", **SIZES), clip_images),
    "siglip-vision": Case(FEATURES, "tome", of("SiglipVisionModel", "SiglipVisionConfig", **SIZES), siglip_images),
    "mae": Case(FEATURES, "evit", of("ViTMAEModel", "ViTMAEConfig", **SIZES, **MAE), vit_images),
    "clip-projection": Case(
        FEATURES, "topk", of("CLIPVisionModelWithProjection", "CLIPVisionConfig", **clip_vision()), clip_images
    ),
    "vit-features": Case(FEATURES, "evit", of("ViTModel", "ViTConfig", **SIZES), vit_images),
    "audio-features": Case(
        FEATURES,
        "tome",
        of("ASTModel", "ASTConfig", **SOUND),
        lambda: transformers.ASTFeatureExtractor(num_mel_bins=64, max_length=64),
    ),
    "dinov3-backbone": Case(
        "backbone",
        "topk",
        of("DINOv3ViTBackbone", "DINOv3ViTConfig", **SIZES, num_register_tokens=4, out_indices=[2, 4]),
        vit_images,
    ),
    "backbone": Case(
        "backbone",
        "tome",
        of("Dinov2Backbone", "Dinov2Config", **WITHOUT_INNER, mlp_ratio=2, out_indices=[2, 4]),
        bit_images,
    ),
    "depth": Case(
        "depth-estimation",
        "tome",
        depth_anything,
        lambda: transformers.DPTImageProcessorPil(size=SQUARE, ensure_multiple_of=4),
    ),
    "audio": Case(
        "audio-classification",
        "evit",
        of("ASTForAudioClassification", "ASTConfig", **SOUND, **LABELS),
        lambda: transformers.ASTFeatureExtractor(num_mel_bins=64, max_length=64),
    ),
    "llava": Case(
        "image-text-to-text",
        "tome",
        llava,
        lambda: transformers.LlavaProcessor(
            clip_images(), words(), patch_size=4, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template="{% for message in messages %}{% for part in message['content'] %}"
            "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endfor %}",
        ),
    ),
}  # fmt: skip


def save_case(name: str, folder: Any) -> Any:
    """The reduced model, after it was saved to a folder with its processor."""
    case = CASES[name]
    torch.manual_seed(1)
    stock = case.make()
    spread = 0.4 if name == "llava" else 0.2  # enough for it to say one thing and another
    with torch.no_grad():
        for parameter_name, parameter in stock.named_parameters():
            center = float(parameter.ndim == 1 and "norm" in parameter_name and parameter_name.endswith("weight"))
            parameter.copy_(center + spread * torch.randn_like(parameter))
    model = reduce_tokens(stock.eval(), METHODS[case.method][0])
    model.save_pretrained(folder)
    case.processor().save_pretrained(folder)
    return model


def inputs_of(name: str) -> dict[str, Any]:
    """Of a model's forward."""
    generator = torch.Generator().manual_seed(2)
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if name.startswith("audio"):
        return {"input_values": torch.randn(2, 64, 64, generator=generator)}
    if CASES[name].task == ZERO_SHOT:
        return {**pixels, "input_ids": torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])}
    if name == "llava":
        return {**pixels, "input_ids": torch.tensor([[1, 7, *[4] * 64, 8, 9]] * 2)}
    return pixels
