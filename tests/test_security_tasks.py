"""Folders of other tasks: their parts, their processors and tokenizers are looked at as the rest is."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from task_models import CASES, llava, save_case
from test_security import refused

from hf_tokenreduce import ToMeConfig, reduce_tokens
from hf_tokenreduce.hub import check_folder
from hf_tokenreduce.hub.configuration import CLASSES, check_config


@pytest.fixture(scope="module")
def of_tasks(tmp_path_factory):
    """A folder of each of these tasks, made when it is asked for first."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "folder"
            save_case(name, made[name])
        return made[name]

    return make


def rewritten(path, **values):
    """A JSON file with some values changed, deep inside if they are dictionaries; those that are `...` are gone."""

    def merge(old, new):
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        merged = {**old, **{name: merge(old.get(name), value) for name, value in new.items()}}
        return {name: value for name, value in merged.items() if value is not ...}

    path.write_text(json.dumps(merge(json.loads(path.read_text()), values)))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("clip", {"vision_config": {"hidden_size": 10**12}}, "vision_config.hidden_size must be an integer from 1"),
        ("clip", {"vision_config": {"num_hidden_layers": 10**6}}, "vision_config.num_hidden_layers"),
        ("clip", {"vision_config": {"num_attention_heads": 5}}, "not a multiple of the number of attention"),
        ("clip", {"vision_config": {"image_size": 16000, "patch_size": 1}}, "16000 x 16000 patches"),
        ("clip", {"vision_config": {"model_type": "vit"}}, "vision_config has model_type 'vit'"),
        ("clip", {"vision_config": [1]}, "vision_config must be an object"),
        ("clip", {"vision_config": None}, "vision_config must be an object"),
        ("clip", {"vision_config": {"attn_implementation": "evil/kernel"}}, "vision_config.attn_implementation"),
        ("clip", {"vision_config": {"auto_map": {"AutoModel": "evil/repo--evil.Model"}}}, "vision_config.auto_map"),
        ("clip", {"vision_config": {"id2label": [1]}}, "vision_config.id2label"),
        ("clip", {"vision_config": {"anything": list(range(10**5))}}, "vision_config.anything"),
        ("clip", {"text_config": {"vocab_size": 10**9}}, "text_config.vocab_size"),
        ("clip", {"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers"),
        ("clip", {"text_config": {"max_position_embeddings": 78}}, "(77, 48) in the file, (78, 48) by config.json"),
        ("clip", {"text_config": {"hidden_size": 50}}, "not a multiple of the number of attention"),
        ("dinov3", {"architectures": ["TokenReduceViTModel"]}, "where a tokenreduce_dinov3_vit model is one of"),
        ("dinov3", {"architectures": ["TokenReduceDINOv3ViTBackbone"]}, "without AutoBackbone"),
        ("audio", {"architectures": ["TokenReduceASTModel"]}, "auto_map sends 'AutoModelForAudioClassification' to"),
        ("clip", {"auto_map": {"AutoModelForZeroShotImageClassification": ...}}, "without AutoModelForZeroShot"),
        ("clip", {"auto_map": {"AutoModelForObjectDetection": "modeling_tokenreduce.TokenReduceCLIPModel"}}, "None"),
        ("llava", {"text_config": {"model_type": "evil"}}, "text_config has model_type 'evil'"),
        ("llava", {"text_config": {"model_type": "timm_wrapper"}}, "a causal language model of transformers"),
        ("llava", {"text_config": {"quantization_config": {"quant_method": "x"}}}, "text_config.quantization_config"),
        ("llava", {"text_config": {"head_dim": 10**9}}, "text_config.head_dim"),
        ("llava", {"text_config": {"num_key_value_heads": 0}}, "text_config.num_key_value_heads"),
        ("llava", {"text_config": {"pad_token_id": 10**12}}, "text_config.pad_token_id"),
        ("llava", {"vision_config": {"model_type": "timm_wrapper"}}, "vision_config has model_type 'timm_wrapper'"),
        ("dinov3", {"num_attention_heads": 5}, "hidden_size=48 is no multiple of num_attention_heads=5"),
        ("depth", {"backbone_config": None, "backbone": "evil/repo"}, "has backbone"),
        ("depth", {"backbone_config": None}, "backbone_config must be an object"),
        ("depth", {"backbone_config": {"mlp_ratio": 1e9}}, "backbone_config.mlp_ratio must be a number above 0"),
        ("depth", {"backbone_config": {"mlp_ratio": float("nan")}}, "backbone_config.mlp_ratio"),
        ("depth", {"neck_hidden_sizes": [10**9] * 4}, "neck_hidden_sizes must be an integer"),
        ("depth", {"reassemble_factors": [4, 2, 1, 10**6]}, "reassemble_factors must be a number above 0"),
        ("audio", {"frequency_stride": 0}, "frequency_stride must be an integer from 1"),
        ("audio", {"max_length": 10**9}, "max_length must be an integer from 1"),
        ("audio", {"max_length": 10**7, "time_stride": 1}, "patches, where 1 to"),
        ("audio", {"num_mel_bins": 4}, "patches. There must be at least one"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_configurations_of_other_tasks_that_are_refused(of_tasks, tmp_path, name, values, words):
    folder = shutil.copytree(of_tasks(name), tmp_path / "folder")
    rewritten(folder / "config.json", **values)
    refused(folder, words)


@pytest.mark.parametrize("name", CLASSES)
def test_configurations_of_every_model_are_taken(tmp_path, name):
    """As large as they usually are."""
    config = CLASSES[name].config_class(architectures=[name])
    config.save_pretrained(tmp_path)
    for reference in config.auto_map.values():
        (tmp_path / f"{reference.split('.')[0]}.py").touch()
    assert type(check_config(tmp_path)) is type(config)


@pytest.mark.parametrize("text", ["gemma2", "llama", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen3_moe"])
def test_language_models_are_taken(tmp_path, text):
    name = "TokenReduceLlavaForConditionalGeneration"
    part = transformers.CONFIG_MAPPING[text]()
    config = CLASSES[name].config_class(text_config=part.to_dict(), architectures=[name])
    config.save_pretrained(tmp_path)
    for reference in config.auto_map.values():
        (tmp_path / f"{reference.split('.')[0]}.py").touch()
    assert check_config(tmp_path).text_config.model_type == text


@pytest.mark.parametrize(
    ("name", "file", "values", "words"),
    [
        ("clip", "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil/repo--evil.T", None]}}, "an auto_map"),
        ("clip", "processor_config.json", {"auto_map": {"AutoProcessor": "evil/repo--evil.P"}}, "an auto_map"),
        (
            "clip",
            "processor_config.json",
            {"image_processor": {"auto_map": {"AutoImageProcessor": "e.P"}}},
            "auto_map",
        ),
        ("clip", "processor_config.json", {"image_processor": {"size": {"shortest_edge": 15000}}}, "from 1 to 4,096"),
        ("clip", "processor_config.json", {"image_processor": {"image_std": [0.5, 0, 0.5]}}, "other than 0"),
        ("clip", "processor_config.json", {"processor_class": ...}, "has no processor_class"),
        ("dinov3", "preprocessor_config.json", {"image_mean": [0.5, float("nan"), 0.5]}, "must be finite numbers"),
        ("dinov3", "preprocessor_config.json", {"rescale_factor": float("inf")}, "must be finite numbers other"),
        ("audio", "preprocessor_config.json", {"std": 0}, "std must be finite numbers other than 0"),
        ("audio", "preprocessor_config.json", {"max_length": 10**9}, "max_length must be an integer from 1 to"),
        ("audio", "preprocessor_config.json", {"sampling_rate": 0}, "sampling_rate must be an integer from 1 to"),
        ("audio", "preprocessor_config.json", {"feature_extractor_type": ...}, "has no feature_extractor_type"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_prepares_inputs_is_refused(of_tasks, tmp_path, name, file, values, words):
    folder = shutil.copytree(of_tasks(name), tmp_path / "folder")
    rewritten(folder / file, **values)
    refused(folder, file, words)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_files_of_texts_that_are_no_json(of_tasks, tmp_path, file):
    folder = shutil.copytree(of_tasks("llava"), tmp_path / "folder")
    (folder / file).write_text("[1")
    refused(folder, file, "is not valid JSON")
    (folder / file).write_text("[1]")
    refused(folder, file, "must hold an object")


def test_files_that_a_task_needs(of_tasks, tmp_path):
    folder = shutil.copytree(of_tasks("llava"), tmp_path / "texts")
    for file in ("tokenizer.json", "processor_config.json"):
        (folder / file).unlink()
    refused(folder, "tokenizer.json is missing", "processor_config.json is missing", "processor.save_pretrained")
    (folder / "config.json").unlink()
    assert len(refused(folder, "config.json is missing").errors) == 2  # what it is besides is not known
    images = shutil.copytree(of_tasks("dinov3"), tmp_path / "images")
    for file in ("tokenizer.json", "generation_config.json"):
        (images / file).write_text("{}")
    refused(images, "tokenizer.json is for models that take texts", "generation_config.json is for models")
    (images / "modeling_tokenreduce_vit.py").write_text("")
    refused(images, "modeling_tokenreduce_vit.py is code of an earlier version", "save it in a new folder")


def test_one_tensor_of_two_names(tmp_path):
    """Saved once, it is whole; without both it is not."""
    stock = llava()
    stock.config.text_config.tie_word_embeddings = stock.config.tie_word_embeddings = True
    stock.tie_weights()
    model = reduce_tokens(stock, ToMeConfig(r=7))
    model.save_pretrained(tmp_path)
    CASES["llava"].processor().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    report = check_folder(tmp_path, load=False)
    assert report.ok, report.errors
    del tensors["model.language_model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "lacks")


def test_sounds_must_be_sounds(of_tasks):
    with pytest.raises(ValueError, match=r"images must be spectrograms .* got \(2, 3, 32, 32\)"):
        check_folder(of_tasks("audio"), images=torch.randn(2, 3, 32, 32))
