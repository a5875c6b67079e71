"""Zero-shot classification: logits of the stock models, names and prompts, and evaluation as of any classifier."""

import json

import numpy as np
import pytest
import torch
from datasets import Value, load_dataset
from helpers import METHODS, SIZES, reduce_tiny, tiny_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    ViTImageProcessor,
    pipeline,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_tokenreduce import EViTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.evaluation import class_names_of, compare, evaluate_model, zero_shot_classifier
from hf_tokenreduce.evaluation.compute import measured_multiply_adds
from hf_tokenreduce.evaluation.zero_shot import plain_name, typed_names


QUICK = {"batch_size": 4, "progress": False}
VISION = {**{name: size for name, size in SIZES.items() if name != "num_labels"}, "projection_dim": 32}
TEXT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
NAMES = ["cat", "great white shark", "owl"]
FOLDERS = ["0001_cat", "0002_great_white_shark", "0005_owl"]
PROMPTS = ["a photo of a {}", "{}", "a bad sketch of {} at night"]


def letters():
    """CLIP's tokenizer, of single letters."""
    known = list(bytes_to_unicode().values())
    words = ["<|startoftext|>", "<|endoftext|>", *known, *(letter + "</w>" for letter in known)]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def words():
    text = " ".join([*PROMPTS, *NAMES]).replace("{}", "")
    known = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(text.split()))])}
    inner = Tokenizer(WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids"],
        model_max_length=64,
    )


def clip():
    text = {**TEXT, "vocab_size": 514, "max_position_embeddings": 77, "projection_dim": 32, "eos_token_id": 1}
    config = CLIPConfig(vision_config=VISION, text_config={**text, "bos_token_id": 0}, projection_dim=32)
    return CLIPModel(config), letters(), CLIPProcessor


def siglip():
    text = {**TEXT, "vocab_size": 99, "max_position_embeddings": 64, "projection_size": 48}
    return SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)), words(), SiglipProcessor


def made(build):
    """A stock model with weights large enough that every token matters, and its processor."""
    model, tokenizer, processor_class = build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                center = float(parameter.ndim == 1 and name.endswith("weight") and "norm" in name)
                parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    images = ViTImageProcessor(size={"height": 32, "width": 32})
    return model.eval(), processor_class(image_processor=images, tokenizer=tokenizer)


@pytest.fixture(params=[clip, siglip], ids=["clip", "siglip"])
def pair(request):
    return made(request.param)


def image_files(folder, count=10):
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / FOLDERS[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(place / f"{number:02}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    return load_dataset("imagefolder", data_dir=str(image_files(tmp_path / "photos")), split="train")


def pixels_of(photos, processor):
    return processor.image_processor([photo.convert("RGB") for photo in photos["image"]], return_tensors="pt")


def tokens_of(texts, model, processor):
    padding = {"padding": True} if isinstance(model, CLIPModel) else {"padding": "max_length", "max_length": 64}
    return processor.tokenizer(texts, return_tensors="pt", **padding)


def test_logits_are_those_of_the_stock_forward(pair, photos):
    model, processor = pair
    pixels = pixels_of(photos, processor)
    for prompt in PROMPTS:
        texts = tokens_of([prompt.replace("{}", name) for name in NAMES], model, processor)
        with torch.no_grad():
            expected = model(**texts, **pixels).logits_per_image
            for one in (model, reduce_tokens(model, ToMeConfig(r=0))):
                found = zero_shot_classifier(one, processor, NAMES, [prompt])(**pixels)
                torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
            reduced = reduce_tokens(model, EViTConfig(keep_rate=0.4, layers=(1, 2)))
            found = zero_shot_classifier(reduced, processor.tokenizer, NAMES, [prompt])(**pixels)
            stated = reduced(**texts, **pixels)
            torch.testing.assert_close(found.logits, stated.logits_per_image, atol=1e-5, rtol=1e-5)
            assert torch.equal(found.token_counts, stated.token_counts)
        assert expected.std(dim=0).min() > 1e-3  # the images and classes differ at all


def test_logits_are_in_float32(pair, photos):
    """Logits near 25 have steps of 1/8 in bfloat16, so two of many classes would often be equal."""
    model, processor = pair
    pixels = pixels_of(photos, processor)["pixel_values"]
    with torch.no_grad():
        classifier = zero_shot_classifier(model.to(torch.bfloat16), processor, NAMES)
        logits = classifier(pixels.to(torch.bfloat16)).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_prompts_are_averaged(pair, photos):
    model, processor = pair
    pixels = pixels_of(photos, processor)
    sums = 0
    with torch.no_grad():
        for prompt in PROMPTS:
            texts = tokens_of([prompt.replace("{}", name) for name in NAMES], model, processor)
            sums = sums + F.normalize(model.get_text_features(**texts).pooler_output, dim=-1)
        images = F.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
        expected = model.logit_scale.exp() * images @ F.normalize(sums / 3, dim=-1).T
        if isinstance(model, SiglipModel):
            expected = expected + model.logit_bias
        found = zero_shot_classifier(model, processor, NAMES, PROMPTS)
        torch.testing.assert_close(found(**pixels).logits, expected, atol=1e-5, rtol=1e-5)
        alone = zero_shot_classifier(model, processor, NAMES, PROMPTS[:1])(**pixels).logits
    assert (found(**pixels).logits - alone).abs().max() > 1e-3
    assert not found.text_embeddings.requires_grad and not found.training


def test_many_texts_go_in_parts(monkeypatch, pair):
    model, processor = pair
    whole = zero_shot_classifier(model, processor, NAMES).text_embeddings
    monkeypatch.setattr("hf_tokenreduce.evaluation.zero_shot.TEXTS_AT_ONCE", 2)
    torch.testing.assert_close(zero_shot_classifier(model, processor, NAMES).text_embeddings, whole)


@pytest.mark.parametrize("method", ["tome", "ats", "sit"])
def test_evaluated_like_any_classifier(pair, photos, method):
    stock, processor = pair
    model = reduce_tiny(stock, METHODS[method][0])
    names = class_names_of(photos)
    assert names == dict(zip(FOLDERS, NAMES, strict=True))
    classifier = zero_shot_classifier(model, processor, names, PROMPTS[:2])
    dense = zero_shot_classifier(stock, processor, names, PROMPTS[:2])
    before = (model.config.id2label, stock.config.id2label)
    report = evaluate_model(classifier, photos, processor.image_processor, **QUICK)
    pixels = pixels_of(photos, processor)
    with torch.no_grad():
        ours, theirs = classifier(**pixels), dense(**pixels)
    truth = torch.tensor(photos["label"])
    right = ours.logits.argmax(dim=-1) == truth
    assert report.top1 == pytest.approx(100 * right.double().mean().item())
    assert report.baseline_top1 == pytest.approx(100 * (theirs.logits.argmax(dim=-1) == truth).double().mean().item())
    assert torch.equal(report.per_image["tokens"], ours.token_counts) and report.top5 == 100
    cost = measured_multiply_adds(model, pixels.pixel_values).mean().item()
    # Texts are not counted: they are read once. What is measured has what puts mixtures back on the grid (SiT), and
    # the mean that stands for a class token (ATS in SigLIP).
    assert report.multiply_adds["mean"] == pytest.approx(cost, rel=1e-6 if method == "tome" else 0.03)
    again = evaluate_model(classifier, photos, processor.image_processor, dense=dense, **QUICK)
    assert again.to_dict() == report.to_dict()
    assert (model.config.id2label, stock.config.id2label) == before
    assert classifier.config.num_labels == 3 and classifier.config.reduction == model.config.reduction


def test_names_given_and_found(pair, photos):
    model, processor = pair
    images = processor.image_processor
    expected = evaluate_model(
        zero_shot_classifier(model, processor, class_names_of(photos)), photos, images, **QUICK
    ).per_image["predictions"]
    # By the index a folder begins with: there are classes here that no image shows.
    more = ["hen", "cat", "great white shark", "ox", "pig", "owl"]
    six = zero_shot_classifier(model, processor, more)
    report = evaluate_model(six, photos, images, **QUICK)
    assert report.per_image["labels"].tolist() == [{0: 1, 1: 2, 2: 5}[label] for label in photos["label"]]
    # By name, in any order, with underscores or spaces.
    plain = photos.rename_column("label", "class")
    feature = plain.features["class"]
    feature.names = ["cat", "great_white_shark", "owl"]
    feature._str2int = {name: index for index, name in enumerate(feature.names)}
    turned = zero_shot_classifier(model, processor, ["owl", "cat", "great white shark"])
    report = evaluate_model(turned, plain.cast_column("class", feature), images, label_column="class", **QUICK)
    assert report.per_image["labels"].tolist() == [{0: 1, 1: 2, 2: 0}[label] for label in photos["label"]]
    assert report.per_image["predictions"].tolist() == [{0: 1, 1: 2, 2: 0}[label] for label in expected.tolist()]
    # By number.
    numbers = photos.cast_column("label", Value("int64"))
    three = zero_shot_classifier(model, processor, NAMES)
    report = evaluate_model(three, numbers, images, **QUICK)
    assert torch.equal(report.per_image["predictions"], expected)
    assert report.per_image["labels"].tolist() == photos["label"]


def test_names():
    assert [plain_name(label) for label in ("0001_goldfish", "goldfish", "great_white_shark", "7", "1_", "3d_model")] \
        == ["goldfish", "goldfish", "great white shark", "7", "1", "3d model"]  # fmt: skip
    assert typed_names("cat, great white shark,owl,") == NAMES


def test_bad_input(tmp_path, pair, photos):
    model, processor = pair
    (tmp_path / "names.txt").write_text("cat\ngreat white shark\n\nowl\n")
    assert typed_names(str(tmp_path / "names.txt")) == NAMES
    many = [f"the class of number {number}" for number in range(1000)]
    assert typed_names(",".join(many)) == many  # longer than any path
    (tmp_path / "names.txt").write_bytes("Küken\nhen\n".encode())
    assert typed_names(str(tmp_path / "names.txt")) == ["Küken", "hen"]
    (tmp_path / "names.txt").write_text("cat\nhen\n", encoding="utf-8-sig")  # with a byte order mark
    assert typed_names(str(tmp_path / "names.txt")) == ["cat", "hen"]
    for arguments, message in (
        ((tiny_model(), processor, NAMES), "has no text tower"),
        ((model, processor.image_processor, NAMES), "cannot read texts. Give the model's processor"),
        ((model, processor, []), "class_names must be a list of names"),
        ((model, processor, "cat,dog"), "class_names must be a list of names"),
        ((model, processor, ["cat", "dog", "cat"]), "Two classes are called 'cat'"),
        ((model, processor, NAMES, ["a photo"]), r"The prompt 'a photo' has no {} where the name of a class goes"),
        ((model, processor, NAMES, "a {}"), "prompts must be a list of texts"),
        ((model, processor, NAMES, []), "prompts must be a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot_classifier(*arguments)
    with pytest.raises(ValueError, match=r"names no classes. Give their names, in the order of the labels"):
        class_names_of(photos.cast_column("label", Value("int64")))
    (tmp_path / "photos" / "0005_owl").rename(tmp_path / "photos" / "0005_n01443537")
    numbered = load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), split="train")
    with pytest.raises(ValueError, match=r"'0005_n01443537' is a number.*--class-names a,b,c"):
        class_names_of(numbered)
    with pytest.raises(ValueError, match=r"has no classes of its own. Give it their names: .*zero_shot_classifier"):
        evaluate_model(model, photos, processor.image_processor)
    two = zero_shot_classifier(model, processor, ["cat", "dog"])
    with pytest.raises(ValueError, match="is not a label of the model"):
        evaluate_model(two, photos, processor.image_processor)
    other = zero_shot_classifier(model, processor, ["a", "b", "c"])
    three = zero_shot_classifier(reduce_tokens(model, ToMeConfig(r=5)), processor, class_names_of(photos))
    with pytest.raises(ValueError, match="classes of dense differ"):
        evaluate_model(three, photos, processor.image_processor, dense=other)


def test_compared_like_any_classifier(tmp_path, pair, photos):
    model, processor = pair
    names = class_names_of(photos)
    classifier = zero_shot_classifier(model, processor, names)
    options = {"output_dir": tmp_path / "out", "calibration_images": 6, "repeats": 2, **QUICK}
    settings = [ToMeConfig(r=5), {"method": "ltmp", "target": 0.7}, {"method": "sit", "layers": [1, 2]}]
    found = compare(classifier, photos, processor.image_processor, settings, **options)
    dense, tome, ltmp, sit = found.rows
    assert [row["method"] for row in found.rows] == [None, "tome", "ltmp", "sit"]
    reduced = zero_shot_classifier(reduce_tokens(model, ToMeConfig(r=5)), processor, names)
    expected = evaluate_model(reduced, photos, processor.image_processor, **QUICK).to_dict()
    assert {name: tome[name] for name in expected} == json.loads(json.dumps(expected))
    assert ltmp["mult_adds_ratio"] == pytest.approx(0.7, abs=0.03) and sit["top1"] is not None
    assert dense["top1"] == tome["baseline_top1"] and tome["speedup"] > 0
    assert "| top-1 % |" in (tmp_path / "out" / "table.md").read_text()
    assert compare(classifier, photos, processor.image_processor, settings, **options).rows == found.rows
    other = zero_shot_classifier(model, processor, names, ["{}"])
    with pytest.raises(ValueError, match="made with other settings: model was"):
        compare(other, photos, processor.image_processor, settings, **options)


def test_the_commands(call, tmp_path, pair, photos):
    model, processor = pair
    for name, one in (("stock", model), ("tome", reduce_tokens(model, ToMeConfig(r=9)))):
        one.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    names, arguments = class_names_of(photos), ["evaluate", tmp_path / "tome", tmp_path / "photos", "--json"]
    for more, prompts in (([], ["a photo of a {}"]), (["--prompt", PROMPTS[1], "--prompt", PROMPTS[2]], PROMPTS[1:])):
        code, printed, errors = call(*arguments, *more)
        assert code == 0, errors
        reduced = zero_shot_classifier(reduce_tokens(model, ToMeConfig(r=9)), processor, names, prompts)
        expected = evaluate_model(reduced, photos, processor.image_processor, **QUICK).to_dict()
        assert json.loads(printed) == json.loads(json.dumps(expected))
    code, printed, errors = call(*arguments, "--dense", tmp_path / "stock", "--class-names", "hen,cat,great white "
                                 "shark,ox,pig,owl", "--limit", 4)  # fmt: skip
    assert code == 0 and json.loads(printed)["images"] == 4, errors
    arguments = ["compare", tmp_path / "stock", tmp_path / "photos", "-r", "tome", "--share", 0.7, "--no-speed"]
    code, printed, errors = call(*arguments, "-o", tmp_path / "texts", "--prompt", "{}")
    assert code == 0 and "top-1 %" in printed and "kNN" not in printed, errors
    code, printed, errors = call(*arguments, "-o", tmp_path / "features")
    assert code == 0 and "kNN %" in printed and "cosine, patches" in printed, errors
    code, _, errors = call(*arguments, "-o", tmp_path / "texts", "--prompt", "no name")
    assert code == 2 and "has no {} where the name of a class goes" in errors
    tiny_model().save_pretrained(tmp_path / "vit")
    processor.image_processor.save_pretrained(tmp_path / "vit")
    for command in (["evaluate"], ["compare", "-o", tmp_path / "vit-out"]):
        code, _, errors = call(*command, tmp_path / "vit", tmp_path / "photos", "--prompt", "a {}")
        assert code == 2 and "A ViTForImageClassification reads no texts. Leave these options out." in errors
    assert not (tmp_path / "vit-out").exists()


def test_as_the_pipeline_of_transformers(pair, photos):
    model, processor = pair
    pipe = pipeline("zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
                    image_processor=processor.image_processor, processor=processor, device="cpu")  # fmt: skip
    classifier = zero_shot_classifier(model, processor, NAMES, ["This is a photo of {}."])
    with torch.no_grad():
        logits = classifier(**pixels_of(photos, processor)).logits
    scores = logits.sigmoid() if isinstance(model, SiglipModel) else logits.softmax(dim=-1)
    for photo, own in zip(photos["image"], scores, strict=True):
        theirs = pipe(photo.convert("RGB"), candidate_labels=NAMES)
        found = {entry["label"]: entry["score"] for entry in theirs}
        assert [found[name] for name in NAMES] == pytest.approx(own.tolist(), abs=1e-5)
