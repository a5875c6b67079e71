"""Heads with one logit, with several labels per image, and with numbers: what pages, graphs and READMEs say."""

import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import slow, tiny_images, tiny_model
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenreduce import ToMeConfig, export, load_exported, reduce_tokens, tune
from hf_tokenreduce.deploy import exporting
from hf_tokenreduce.evaluation import compare, evaluate_model
from hf_tokenreduce.tasks import class_scores, same_decisions, score_text
from hf_tokenreduce.visualization import page, write_page


PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
# Number of logits, and `problem_type`.
HEADS = {"one": (1, None), "several": (4, "multi_label_classification"), "numbers": (2, "regression")}


def model_with(head):
    count, kind = HEADS[head]
    model = reduce_tokens(tiny_model(num_hidden_layers=2, num_labels=count), ToMeConfig(r=7))
    model.config.problem_type = kind
    return model


@pytest.mark.parametrize("head", HEADS)
def test_a_page_shows_the_scores_of_the_head(tmp_path, head):
    model, images = model_with(head), tiny_images(3)
    html = write_page(model, images, PROCESSOR, tmp_path / "page.html", dense=model).read_text("utf-8")
    with torch.no_grad():
        scores = class_scores(model(images).logits, model.config)
    shown = re.findall(r"<dt>reduced</dt><dd>\s*<span[^>]*>[^<]*</span>\s*<span class=\"pale\">([^<]*)</span>", html)
    assert shown == [score_text(row.max().item(), model.config) for row in scores]
    assert ("predictions are the same" in html) is (head != "numbers")
    guesses = page._guesses(torch.tensor([[1.0] * len(scores[0]), [0.0] * len(scores[0])]), model)
    assert (guesses[0].decided == guesses[1].decided) is (head == "numbers")


def test_models_agree_if_they_decide_the_same():
    """The sign of a single logit decides, because its label is always the same."""
    one, several, usual = model_with("one"), model_with("several"), tiny_model()
    logits, others = torch.tensor([[3.0], [-1.0]]), torch.tensor([[2.0], [1.0]])
    assert same_decisions(logits, others, one.config).tolist() == [True, False]
    assert page._agreeing(page._guesses(logits, one), page._guesses(others, one)) == 1
    logits, others = torch.tensor([[3.0, 1.0, -1.0, -1.0]]), torch.tensor([[3.0, -1.0, -1.0, -1.0]])
    assert not same_decisions(logits, others, several.config) and same_decisions(logits, others, usual.config)
    assert page._agreeing(page._guesses(logits, several), page._guesses(others, several)) == 0
    assert page._agreeing(page._guesses(logits, usual), page._guesses(others, usual)) == 1


@pytest.mark.parametrize(
    ("head", "message"), [("one", "has one logit"), ("several", "several labels"), ("numbers", "computes numbers")]
)
def test_classes_are_compared_where_there_are_some(tmp_path, head, message):
    pictures = [Image.new("RGB", (32, 32), (number, 0, 0)) for number in range(20)]
    images = Dataset.from_dict({"image": pictures, "label": [0] * 20})
    with pytest.raises(ValueError, match=message):
        tune(model_with(head), images, PROCESSOR, share=0.65, output_dir=tmp_path / "tuned")
    if head != "several":
        with pytest.raises(ValueError, match=f"evaluate_model compares .*{message}"):
            evaluate_model(model_with(head), images, PROCESSOR)
        with pytest.raises(ValueError, match=f"compare compares .*{message}"):
            compare(model_with(head), images, PROCESSOR, ["tome"], output_dir=tmp_path / "compared")
    assert not list(tmp_path.iterdir())


def test_a_page_refuses_what_is_not_finite(tmp_path):
    model = model_with("one")
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"not finite. Try to load the model in float32"):
        write_page(model, tiny_images(1), PROCESSOR, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("head", "found"),
    [("one", {"same_class": 0.75}), ("several", {"same_class": 0.5}), ("numbers", {"mean_change": 0.1})],
)
def test_8_bits_are_compared_by_what_the_head_decides(monkeypatch, head, found):
    count, kind = HEADS[head]
    full = torch.tensor([[4.0], [-1.0], [2.0], [-4.0]]).repeat(1, count)
    small = full.clone()
    small[1, 0] = 2.0  # another sign
    if head == "several":
        small[2, 3] = -1.0  # the highest class stays the highest
    if head == "numbers":
        small[0, 1] = 4.0 - (0.8 * 8 - 3.0)
    format = exporting.FORMATS["openvino"]._replace(open=lambda *given: lambda part: [small[part.long().flatten()]])
    monkeypatch.setitem(exporting.FORMATS, "openvino", format)
    whole = SimpleNamespace(main=lambda part: full[part.long().flatten()])
    config = SimpleNamespace(problem_type=kind)
    compared = exporting._compare_int8(whole, torch.arange(4.0)[:, None], 4, "openvino", None, 1, "logits", config)
    assert compared == pytest.approx({**found, "images": 4})


@pytest.mark.parametrize("head", ["numbers", *(slow(head) for head in HEADS if head != "numbers")])
def test_the_readme_prints_what_the_head_says(tmp_path, monkeypatch, capsys, head):
    for package in ("openvino", "onnxscript", "nncf"):
        pytest.importorskip(package)
    model, folder = model_with(head), tmp_path / "graph"
    export(model, folder, image_processor=PROCESSOR, format="openvino", int8=True, images=tiny_images(4))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert ("the numbers change by" in text) is (head == "numbers")
    monkeypatch.chdir(folder)
    Image.new("RGB", (40, 40), "red").save("photo.jpg")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    lines = capsys.readouterr().out.strip().splitlines()
    pixels = PROCESSOR(Image.open("photo.jpg"), return_tensors="pt")["pixel_values"]
    scores = class_scores(load_exported(folder)(pixels), model.config)[0]
    if head == "numbers":
        numbers = [float(number) for number in lines[-1].strip("[]").split()]
    else:
        assert [line.rsplit(" ", 1)[0] for line in lines] == list(model.config.id2label.values())
        numbers = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert numbers == pytest.approx(scores.tolist(), abs=1e-3)
