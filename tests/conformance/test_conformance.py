"""transformers' common model and pipeline tests on the reduced models: `make test-conformance`.

What is not run as it comes stands in `SKIPPED`, `MISSING_HERE` and `OVERRIDDEN`. Beyond these, the tests called
`test_get_*_features_*` pass because there is nothing they apply to.
"""

import re
import unittest
from pathlib import Path
from unittest.mock import patch

import torch
from parameterized import parameterized
from PIL import Image
from torch import nn
from transformers import ViTImageProcessorPil, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device
from transformers_tests import TINY_MODELS, test_pipeline_mixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import (
    TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION,
    ModelTesterMixin,
    _test_eager_matches_sdpa_inference,
    floats_tensor,
    global_rng,
)
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    TokenReduceDeiTConfig,
    TokenReduceDeiTForImageClassification,
    TokenReduceDeiTForImageClassificationWithTeacher,
    TokenReduceDeiTModel,
    TokenReduceDinov2Config,
    TokenReduceDinov2ForImageClassification,
    TokenReduceDinov2Model,
    TokenReduceViTConfig,
    TokenReduceViTForImageClassification,
    TokenReduceViTModel,
    ToMeConfig,
)
from hf_tokenreduce.modeling.modeling_tokenreduce import TokenReduceMixin


# Tests with nothing to check on these models, nor on the stock ViT and DeiT: the name (a regular expression), and a
# part of the reason that transformers gives. They must skip, in every class, and for this reason.
SKIPPED = {
    "test_attn_implementation_composite_models": "not a composite model",
    "test_can_set_attention_dynamically_composite_model": "not composite",
    "test_causal_lm_loss_honors_shift_labels": "No decoder-only language modeling head",
    "test_eager_matches_batched_and_grouped_inference_.*": "does not support grouped_mm",  # of mixtures of experts
    # It looks for an embedding with a `weight`; the patches' is a convolution inside a module.
    "test_enable_input_require_grads_with_gradient_checkpointing": "No model with a differentiable loss was available",
    "test_encoder_decoder_loss_no_double_shift": "No sequence-to-sequence language modeling head",
    "test_inputs_embeds(_matches_input_ids)?": "doesn't use `inputs_embeds`",
    "test_internal_model_config_and_subconfig_are_same": "No subconfigs",
    "test_keep_in_fp32_modules(_exist)?": "no _keep_in_fp32_modules",
    "test_model_rope_scaling_.*": "does not support RoPE scaling",
    "test_model_rope_with_partial_rotation": "does not have RoPE",
    "test_moe_models_record_router_logits": "no sparse experts",
    "test_output_router_logits_from_config": "no `output_router_logits`",
    "test_pipeline_(?!image_classification|image_feature|mask_generation).*": "not in `self.pipeline_model_mapping`",
    "test_pipeline_mask_generation(_fp16)?": "not implemented",
    "test_resize_(tokens_embeddings|embeddings_untied(_no_reinit_on_post_init)?)": "test_resize_embeddings is set to",
    "test_resize_position_vector_embeddings": "does not have position embeddings",  # of positions in a text
    "test_sdpa_can_dispatch_composite_models": "does not support SDPA",  # what it says to all that is not composite
    "test_sliding_window_mask": "does not support sliding window mask",
    "test_tied_head_has_a_tp_plan_entry": "does not have a TP plan",
    "test_tp_plan_matches_params": "does not have a TP plan",
    "test_vision_axial_rope": "no axial RoPE layer",
}

# Except in these classes, where they have something to check: LTMP keeps its thresholds in float32.
RUNS = r"Test\w+LTMP::test_keep_in_fp32_modules(_exist)?"

# A test may also skip because of what the machine lacks.
MISSING_HERE = (
    r"test requires (?:(?:multiple )?accelerators?|CUDA|MPS|Flash Attention.*|bitsandbytes.*|deepspeed|"
    r"the kernels library|Timm|av|PyTesseract)$"
)

# Methods of the tests that ours replace, and why. Those marked + run the original too.
OVERRIDDEN = {
    "test_attention_outputs": "+ it looks at the first layer's shape, ours at every layer's",
    "test_hidden_states_output": "+ it looks at the first layer's shape, ours at every layer's",
    "test_eager_matches_sdpa_inference_.*": "+ an attention mask is refused; where it passes one, run it without",
    "test_model_get_set_embeddings": "it expects an nn.Embedding, which patches do not have",
    "test_pipeline_image_feature_extraction(_fp16)?": "it asks for timm, which these models do not need",
    "test_reverse_loading_mapping": "+ saved as the stock models are, ours keep today's names unless asked",
    "run_task_tests": "+ it loads tiny models from the Hub, ours writes them first",
    # The DeiT with a teacher has two heads and no loss, as the stock one. It is for inference only.
    "_prepare_for_class": "+ no labels for the DeiT with a teacher",
    "test_problem_types": "+ without the DeiT with a teacher",
    "test_training": "+ without the DeiT with a teacher",
    "check_training_gradient_checkpointing": "+ without the DeiT with a teacher",
}

TOME = ToMeConfig(r=2)
EVIT = EViTConfig(keep_rate=0.5, layers=(0, 1))
BAT = BATConfig(keep_rate=0.6, layers=(1,))
SIT = SiTConfig(layers=(0,))
DLVIT = DLViTConfig(keep_rate=0.6, trained=True)
ATS = ATSConfig(layers=(1,), max_tokens=10)
LTMP = LTMPConfig(merge_threshold=0.5, prune_threshold=0.055)

# Several tests pass over models whose names are not here.
MODEL_MAPPING_NAMES["tokenreduce_vit"] = "TokenReduceViTModel"
MODEL_MAPPING_NAMES["tokenreduce_deit"] = "TokenReduceDeiTModel"
MODEL_MAPPING_NAMES["tokenreduce_dinov2"] = "TokenReduceDinov2Model"
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["tokenreduce_vit"] = "TokenReduceViTForImageClassification"
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["tokenreduce_dinov2"] = "TokenReduceDinov2ForImageClassification"
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["tokenreduce_deit"] = (
    "TokenReduceDeiTForImageClassification",
    "TokenReduceDeiTForImageClassificationWithTeacher",
)


class ModelTester:
    """What the tests ask for: a configuration, inputs, and numbers to hold outputs against."""

    batch_size = 5
    hidden_size = 32
    image_size = 32
    is_training = True
    mask_length = 16  # patches, of which the tests mask `num_masks`
    num_attention_heads = 4
    num_hidden_layers = 2
    num_masks = 8
    patch_size = 8

    def __init__(self, config_class, reduction, **fields):
        self.config_class = config_class
        self.reduction = reduction
        self.fields = fields
        prefix = config_class().num_prefix_tokens
        self.num_tokens = self.mask_length + prefix
        self.seq_length = self.num_tokens  # that enter the first layer
        if reduction.hook == "before_encoder":
            self.seq_length = reduction.keeps(self.mask_length) + prefix

    def get_config(self):
        sizes = ("hidden_size", "image_size", "num_attention_heads", "num_hidden_layers", "patch_size")
        return self.config_class(
            **{name: getattr(self, name) for name in sizes},
            **self.fields,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            attn_implementation="eager",
            reduction=self.reduction,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class CommonTests(ModelTesterMixin, PipelineTesterMixin):
    test_resize_embeddings = False  # of a vocabulary
    fields = {"intermediate_size": 37}
    wants_grid = False

    def setUp(self):
        global_rng.seed(0)  # of `floats_tensor`
        self.model_tester = ModelTester(self.config_class, self.reduction, **self.fields)

    def test_config(self):
        reduction = self.reduction.to_dict()
        tester = ConfigTester(self, self.config_class, has_text_modality=False, hidden_size=32, reduction=reduction)
        tester.run_common_tests()

    def outputs_of_all_classes(self, **settings):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).to(torch_device).eval()
            with torch.no_grad():
                outputs = model(**self._prepare_for_class(inputs, model_class), **settings)
            self.assertTrue((outputs.token_counts[:, -1] < self.model_tester.num_tokens).all())
            # Tokens that enter each layer, and then those that leave the last; of the longest image where they differ.
            yield outputs, [self.model_tester.seq_length, *outputs.token_counts.amax(dim=0).tolist()]

    def test_reverse_loading_mapping(self):
        # Our default keeps today's names; asked for the original ones, the mapping is the stock models'.
        original = {**TokenReduceMixin.save_pretrained.__kwdefaults__, "save_original_format": True}
        with patch.object(TokenReduceMixin.save_pretrained, "__kwdefaults__", original):
            super().test_reverse_loading_mapping()

    def test_hidden_states_output(self):
        super().test_hidden_states_output()
        tester = self.model_tester
        for outputs, counts in self.outputs_of_all_classes(output_hidden_states=True):
            shapes = [tuple(states.shape) for states in outputs.hidden_states]
            if self.wants_grid:
                counts = [tester.num_tokens] * len(counts)
            self.assertEqual(shapes, [(tester.batch_size, count, tester.hidden_size) for count in counts])

    def test_attention_outputs(self):
        super().test_attention_outputs()
        tester = self.model_tester
        for outputs, counts in self.outputs_of_all_classes(output_attentions=True):
            shapes = [tuple(attention.shape) for attention in outputs.attentions]
            heads = tester.num_attention_heads
            queries = counts[1:] if self.reduction.method == "ats" else counts  # sampled before attention
            expected = [(tester.batch_size, heads, *pair) for pair in zip(queries, counts[:-1], strict=False)]
            self.assertEqual(shapes, expected)

    @parameterized.expand(TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION)
    def test_eager_matches_sdpa_inference(self, name, dtype, side, use_attention_mask, *settings):
        if use_attention_mask:
            with self.assertRaisesRegex(ValueError, "attention_mask"):
                _test_eager_matches_sdpa_inference(self, name, dtype, side, True, *settings)
        _test_eager_matches_sdpa_inference(self, name, dtype, side, False, *settings)

    def test_model_get_set_embeddings(self):
        config = self.model_tester.get_config()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIs(model.get_input_embeddings(), model.base_model.embeddings.patch_embeddings)
            other = nn.Identity()
            model.set_input_embeddings(other)
            self.assertIs(model.get_input_embeddings(), other)
            self.assertIsNone(model.get_output_embeddings())

    def test_pipeline_image_feature_extraction(self):
        self.run_task_tests("image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self):
        self.run_task_tests("image-feature-extraction", dtype="float16")

    def run_task_tests(self, task, dtype="float32"):
        for model_class in self.pipeline_model_mapping.get(task, ()):
            name = model_class.__name__
            folder = Path(TINY_MODELS.name, self.config_class.model_type, name)
            model_class(self.model_tester.get_config()).save_pretrained(folder)
            side = self.model_tester.image_size
            ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
            test_pipeline_mixin.tiny_model_summary[name] = {
                "tokenizer_classes": [],
                "processor_classes": ["ViTImageProcessorPil"],
            }
        super().run_task_tests(task, dtype)


class PipelineChecks:
    """What the pipeline tests run on a pipeline; the source distribution leaves theirs out."""

    def get_test_pipeline(self, model, tokenizer, image_processor, dtype):
        model = model.to(torch_device, getattr(torch, dtype))
        images = [Image.fromarray(torch.randint(256, (30, 40, 3), dtype=torch.uint8).numpy()) for _ in range(3)]
        return pipeline(self.task, model=model, image_processor=image_processor, device=torch_device), images

    def run_pipeline_test(self, pipe, images):
        for image, result in zip(images, pipe(images), strict=True):
            pixel_values = pipe.image_processor(image, return_tensors="pt").pixel_values
            with torch.no_grad():
                outputs = pipe.model(pixel_values.to(torch_device))
            found, expected = self.compare(result, outputs, pipe.model.config)
            torch.testing.assert_close(found, expected.float().cpu(), atol=1e-3, rtol=1e-3)


class ClassificationChecks(PipelineChecks):
    task = "image-classification"

    def compare(self, result, outputs, config):
        scores = {entry["label"]: entry["score"] for entry in result}
        found = torch.tensor([[scores[config.id2label[index]] for index in range(config.num_labels)]])
        return found, outputs.logits.float().softmax(dim=-1)


class FeatureExtractionChecks(PipelineChecks):
    task = "image-feature-extraction"

    def compare(self, result, outputs, config):
        return torch.tensor(result), outputs.last_hidden_state


for checks in (ClassificationChecks, FeatureExtractionChecks):
    test_pipeline_mixin.pipeline_test_mapping[checks.task]["test"] = f"{__name__}.{checks.__name__}"


class ViTTests(CommonTests):
    config_class = TokenReduceViTConfig
    all_model_classes = (TokenReduceViTModel, TokenReduceViTForImageClassification)
    pipeline_model_mapping = {
        "image-classification": (TokenReduceViTForImageClassification,),
        "image-feature-extraction": (TokenReduceViTModel,),
    }


class DeiTTests(CommonTests):
    config_class = TokenReduceDeiTConfig
    trainable_classes = (TokenReduceDeiTModel, TokenReduceDeiTForImageClassification)
    all_model_classes = (*trainable_classes, TokenReduceDeiTForImageClassificationWithTeacher)
    pipeline_model_mapping = {
        "image-classification": all_model_classes[1:],
        "image-feature-extraction": (TokenReduceDeiTModel,),
    }

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if model_class not in self.trainable_classes:
            inputs.pop("labels", None)
        return inputs

    def test_problem_types(self):
        self.all_model_classes = self.trainable_classes
        super().test_problem_types()

    def test_training(self):
        self.all_model_classes = self.trainable_classes
        super().test_training()

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        self.all_model_classes = self.trainable_classes
        super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)


class Dinov2Tests(CommonTests):
    config_class = TokenReduceDinov2Config
    fields = {"mlp_ratio": 2, "use_swiglu_ffn": True, "use_mask_token": False}
    wants_grid = True
    all_model_classes = (TokenReduceDinov2Model, TokenReduceDinov2ForImageClassification)
    pipeline_model_mapping = {
        "image-classification": (TokenReduceDinov2ForImageClassification,),
        "image-feature-extraction": (TokenReduceDinov2Model,),
    }


class TestDinov2ToMe(Dinov2Tests, unittest.TestCase):
    reduction = TOME


class TestDinov2ATS(Dinov2Tests, unittest.TestCase):
    reduction = ATS


class TestViTToMe(ViTTests, unittest.TestCase):
    reduction = TOME


class TestViTEViT(ViTTests, unittest.TestCase):
    reduction = EVIT


class TestViTBAT(ViTTests, unittest.TestCase):
    reduction = BAT


class TestViTSiT(ViTTests, unittest.TestCase):
    reduction = SIT


class TestViTDLViT(ViTTests, unittest.TestCase):
    reduction = DLVIT


class TestViTATS(ViTTests, unittest.TestCase):
    reduction = ATS


class TestViTLTMP(ViTTests, unittest.TestCase):
    reduction = LTMP


class TestDeiTToMe(DeiTTests, unittest.TestCase):
    reduction = TOME


class TestDeiTEViT(DeiTTests, unittest.TestCase):
    reduction = EVIT


class TestDeiTSiT(DeiTTests, unittest.TestCase):
    reduction = SIT


class TestDeiTLTMP(DeiTTests, unittest.TestCase):
    reduction = LTMP


def test_lists_are_current():
    theirs = {name for mixin in (ModelTesterMixin, PipelineTesterMixin) for name in dir(mixin)}
    replaced = {name for name in theirs if getattr(getattr(TestDeiTToMe, name), "__module__", None) == __name__}
    replaced -= {"__module__"}

    def listed(name):
        return any(re.fullmatch(pattern, name) for pattern in OVERRIDDEN)

    assert [pattern for pattern in SKIPPED if not any(re.fullmatch(pattern, name) for name in theirs)] == []
    assert [pattern for pattern in OVERRIDDEN if not any(re.fullmatch(pattern, name) for name in replaced)] == []
    assert [name for name in replaced if not listed(name)] == []
