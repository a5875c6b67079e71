"""Tiny stock models of every family, and what goes into them: a new family, or a new head of one, is one more row."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import transformers
from helpers import NEWER, NUM_PATCHES, ONE_OF_EACH, SIZES, tiny_images
from transformers import PreTrainedModel

from hf_tokenreduce.modeling.encoders import encoder_of
from hf_tokenreduce.tasks import main_output


VISION = dict(SIZES)
RATIO = {**{name: value for name, value in VISION.items() if name != "intermediate_size"}, "mlp_ratio": 2}
PART = {name: value for name, value in VISION.items() if name != "num_labels"}
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "projection_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
IMAGE_TOKEN = 99
MEL = 64  # frames of a spectrogram, and its bins
AUDIO = {
    **{name: value for name, value in VISION.items() if name != "image_size"},
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
    "max_length": MEL,
    "num_mel_bins": MEL,
}


class Family(NamedTuple):
    """build: makes the stock model, with weights of no meaning; keywords change the configuration of its encoder
    inputs: what it takes for a batch of images
    prefix: the tokens before the patches
    grid: whether what reads the last layer reads a row for every patch
    last: whether a dropped patch is read as it was last, else as the mean of the others
    """

    build: Callable[..., PreTrainedModel]
    inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    prefix: int = 1
    grid: bool = True
    last: bool = False


def _alone(model: str, config: str, fields: dict, **more) -> Callable[..., PreTrainedModel]:
    """A model whose configuration is that of its encoder."""

    def build(**changes):
        return getattr(transformers, model)(getattr(transformers, config)(**{**fields, **more, **changes}))

    return build


def _pair(model: str, config: str, part: str, **text) -> Callable[..., PreTrainedModel]:
    """A model of images and texts, or a head that takes the configuration of one."""

    def build(**changes):
        vision = getattr(transformers, part)(**{**PART, **changes}).to_dict()
        whole = getattr(transformers, config)(vision_config=vision, text_config={**TEXT, **text}, num_labels=5)
        return getattr(transformers, model)(whole)

    return build


def _llava(**changes) -> PreTrainedModel:
    vision = transformers.CLIPVisionConfig(**{**PART, **changes}).to_dict()
    fields = {name: value for name, value in TEXT.items() if name not in ("projection_dim", "max_position_embeddings")}
    text = transformers.LlamaConfig(**fields, num_key_value_heads=3).to_dict()
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-2
    )
    return transformers.LlavaForConditionalGeneration(config)


def _depth_anything(**changes) -> PreTrainedModel:
    backbone = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": True}
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(**{**RATIO, **backbone, **changes}),
        patch_size=4,
        reassemble_hidden_size=48,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def _images(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": images}


def _in_order(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Patches of a masked autoencoder are shuffled, unless they are told their order."""
    count = (images.shape[2] // 4) * (images.shape[3] // 4)
    return {"pixel_values": images, "noise": torch.arange(count, dtype=torch.float32).expand(len(images), -1)}


def _spectrograms(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(len(images), MEL, MEL, generator=torch.Generator().manual_seed(len(images)))}


def _with_texts(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": images, "input_ids": torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])}


def _with_prompts(images: torch.Tensor) -> dict[str, torch.Tensor]:
    prompts = [[0, 3, *[IMAGE_TOKEN] * NUM_PATCHES, 4 + index % 7, 5] for index in range(len(images))]
    return {"pixel_values": images, "input_ids": torch.tensor(prompts)}


_beit = partial(_alone, "BeitForImageClassification", "BeitConfig", VISION, layer_scale_init_value=0.1)

FAMILIES = {
    "vit": Family(_alone("ViTForImageClassification", "ViTConfig", VISION), _images, grid=False),
    "deit": Family(_alone("DeiTForImageClassification", "DeiTConfig", VISION), _images, prefix=2, grid=False),
    "msn": Family(_alone("ViTMSNForImageClassification", "ViTMSNConfig", VISION), _images, grid=False),
    "ijepa": Family(_alone("IJepaForImageClassification", "IJepaConfig", VISION), _images, prefix=0),
    "mae": Family(_alone("ViTMAEModel", "ViTMAEConfig", PART, mask_ratio=0.0), _in_order),
    "ast": Family(_alone("ASTForAudioClassification", "ASTConfig", AUDIO), _spectrograms, prefix=2, grid=False),
    "clip-vision": Family(_alone("CLIPVisionModel", "CLIPVisionConfig", PART), _images),
    "clip-projection": Family(_alone("CLIPVisionModelWithProjection", "CLIPVisionConfig", PART), _images),
    "clip-classifier": Family(_pair("CLIPForImageClassification", "CLIPConfig", "CLIPVisionConfig"), _images),
    "clip": Family(_pair("CLIPModel", "CLIPConfig", "CLIPVisionConfig"), _with_texts),
    "siglip-vision": Family(_alone("SiglipVisionModel", "SiglipVisionConfig", PART), _images, prefix=0),
    "siglip-classifier": Family(
        _pair("SiglipForImageClassification", "SiglipConfig", "SiglipVisionConfig"), _images, prefix=0
    ),
    "siglip": Family(
        _pair("SiglipModel", "SiglipConfig", "SiglipVisionConfig", projection_size=48), _with_texts, prefix=0
    ),
    "dinov2": Family(_alone("Dinov2ForImageClassification", "Dinov2Config", RATIO), _images),
    "dinov2-swiglu": Family(_alone("Dinov2Model", "Dinov2Config", RATIO, use_swiglu_ffn=True), _images),
    "dinov2-backbone": Family(_alone("Dinov2Backbone", "Dinov2Config", RATIO, out_indices=[2, 4]), _images, last=True),
    "dinov2-registers": Family(
        _alone("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", RATIO, num_register_tokens=4),
        _images,
        prefix=5,
    ),
    "dinov3": Family(_alone("DINOv3ViTModel", "DINOv3ViTConfig", PART, num_register_tokens=4), _images, prefix=5),
    "dinov3-backbone": Family(
        _alone("DINOv3ViTBackbone", "DINOv3ViTConfig", PART, num_register_tokens=4, out_indices=[2, 4]),
        _images,
        prefix=5,
        last=True,
    ),
    "beit": Family(_beit(use_relative_position_bias=True, use_mean_pooling=True), _images),
    "beit-shared": Family(_beit(use_shared_relative_position_bias=True, use_mean_pooling=False), _images),
    "llava": Family(_llava, _with_prompts, last=True),
    "depth-anything": Family(_depth_anything, _images, last=True),
}

GRIDS = [name for name, family in FAMILIES.items() if family.grid]

# The attention of these asks for the place of every token, which a mixture of patches does not have.
WITHOUT_MIXTURES = ("dinov3", "dinov3-backbone", "beit", "beit-shared")

# One setting of each method that is held in every family, by its name in METHODS.
PLAIN = tuple("dlvit-share" if name == "dlvit" else name for name in ONE_OF_EACH if name not in NEWER)

# The others are held in these: one has no prefix token, the other five of them, and places.
TWO = ("siglip-vision", "dinov3")


def cases(methods: Sequence[str] = (*PLAIN, *NEWER), families: Iterable[str] = FAMILIES) -> list[tuple[str, str]]:
    """Every family with every method that can reduce it."""
    return [
        (family, method)
        for family in families
        for method in methods
        if (method != "sit" or family not in WITHOUT_MIXTURES) and (method not in NEWER or family in TWO)
    ]


def family_model(name: str, **changes) -> PreTrainedModel:
    """A stock model in eval mode, with weights large enough that every token matters and decisions have margins."""
    torch.manual_seed(1)
    model = FAMILIES[name].build(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name_of, parameter in model.named_parameters():
            spread = 0.5 if "position" in name_of or "token" in name_of else 0.2
            is_factor = name_of.endswith(("weight", "lambda1", "lambda_1", "lambda_2", "logit_scale"))
            center = float(parameter.ndim <= 1 and is_factor)
            parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def family_inputs(name: str, count: int = 3, size: tuple[int, int] = (32, 32), seed: int = 2) -> dict:
    """What the model of a row takes, for so many images of this height and width."""
    images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))
    return FAMILIES[name].inputs(images if size != (32, 32) else tiny_images(count, seed=seed))


def of_image(inputs: dict, index: int) -> dict:
    """Of the inputs of a batch those of one of its images. Texts that are not an image's own stay."""
    count = len(inputs["input_values"] if "input_values" in inputs else inputs["pixel_values"])
    return {name: value[index : index + 1] if len(value) == count else value for name, value in inputs.items()}


def main_rows(output) -> torch.Tensor:
    """What users read of an output, the batch first: feature maps of all stages, else as `main_output`."""
    if output.get("feature_maps") is not None:
        return torch.stack(output["feature_maps"], dim=1)
    return main_output(output)


def hidden_states_of(output) -> tuple[torch.Tensor, ...]:
    """The hidden states of the images' encoder, where the output has them."""
    inner = output.get("vision_model_output")
    return (output if inner is None else inner)["hidden_states"]


def image_features_of(output) -> torch.Tensor:
    """What LLaVA makes of all images for its language model: (images * patches, width)."""
    inner = output.get("image_outputs")  # from transformers 5.24 on
    features = output.image_hidden_states if inner is None else inner.pooler_output
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))


def layers_of(model: PreTrainedModel) -> list:
    return list(encoder_of(model).layers)
