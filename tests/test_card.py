"""Cards say what the configuration and the record say, nothing else, and never lose a word of their owner."""

import json

import pytest
import yaml
from families import family_model
from helpers import METHODS, tiny_model
from hub_server import card_errors
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from task_models import CASES, save_case
from transformers import ViTImageProcessor

from hf_tokenreduce import ATSConfig, EViTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.evaluation.accuracy import wilson_interval
from hf_tokenreduce.hub import check_folder, model_card, write_card, write_cards
from hf_tokenreduce.hub.card import _prefix
from hf_tokenreduce.hub.card_text import sections
from hf_tokenreduce.hub.usage import LEAST_TRANSFORMERS
from hf_tokenreduce.loading import load_model
from hf_tokenreduce.methods import METHODS as DESCRIBED
from hf_tokenreduce.modeling.methods import METHOD_CLASSES


RECORD = {
    "method": "evit",
    "settings": METHODS["evit"][0].to_dict(),
    "base_model": "deit-tiny",
    "dataset": "trash/train",
    "eval_dataset": "trash/val",
    "eval_images": 400,
    "seed": 3,
    "earlier_commands": ["python train.py --output_dir dense"],
    "command": "python train.py --reduction_args '{\"layers\": [0, 2]}'",
    "epochs": 5.0,
    "seconds": 754.2,
    "top1": 85.0,
    "baseline_top1": 87.25,
    "mult_adds_ratio": 0.5731,
    "speedup": 1.4142,
    "speed_batch_size": 32,
    "tokens_per_layer": [41.0, 41.0, 26.0, 26.0],
}


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def part(card, name):
    begin, end = sections(card)[name]
    return card[begin:end]


def test_every_method_is_described():
    assert DESCRIBED.keys() - {None} == METHOD_CLASSES.keys()


def test_a_full_card(folder):
    (folder / "token_map.png").write_bytes(b"a picture")
    card = model_card(
        folder,
        record={**RECORD, "machine": "one CPU of two cores"},
        base_model="facebook/deit-tiny-patch16-224",
        base_license="apache-2.0",
        dataset="someone/trash",
        repo_id="someone/deit-evit",
    )
    assert card_errors(card) == []
    assert "\n# deit-evit\n" in card
    method, results, training = (part(card, name) for name in ("method", "results", "training"))
    assert "[facebook/deit-tiny-patch16-224](https://huggingface.co/facebook/deit-tiny-patch16-224)" in method
    assert "https://arxiv.org/abs/2202.07800" in method
    assert "| `keep_rate` | `0.6` |" in method and "| `layers` | `[0, 2]` |" in method
    assert "](token_map.png)" in method
    low, high = wilson_interval(340, 400)
    assert f"| 85.0 % ({low:.1f} to {high:.1f}) |" in results and "| 87.2 % (" in results
    assert "| points of top-1 lost |  | 2.2 |" in results
    assert "| multiply-adds of the encoder | 1 | 0.57 |" in results
    assert "| images per second | 1 | 1.41 |" in results
    assert "400 images of trash/val" in results and "(batch 32, one CPU of two cores)" in results
    assert "layer  3      26  ███" in results
    assert "5 epochs on trash/train, in 13 min, seed 3." in training
    assert f"{RECORD['earlier_commands'][0]}\n{RECORD['command']}" in training
    assert 'from_pretrained("someone/deit-evit"' in part(card, "usage") and "revision" in part(card, "usage")
    assert "apache-2.0" in part(card, "limits")
    data = metadata(card)
    assert data["base_model"] == "facebook/deit-tiny-patch16-224"
    assert (data["license"], data["datasets"], data["library_name"]) == (
        "apache-2.0",
        ["someone/trash"],
        "transformers",
    )
    assert {"token-reduction", "evit", "arxiv:2202.07800"} <= set(data["tags"])


def test_more_training_is_not_a_gain_of_the_reduction(folder, tmp_path):
    record = {**RECORD, "baseline_top1": 84.0, "control_top1": 85.75}
    text = model_card(folder, record=record)
    results = part(text, "results")
    low, high = wilson_interval(343, 400)
    assert f"| top-1 of a dense model, trained as long | 85.8 % ({low:.1f} to {high:.1f}) |  |" in results
    assert "| points of top-1 lost |  | 0.8 |" in results and "counted against the dense model" in results
    file = tmp_path / "report.json"  # an evaluation on other images, of which the control knows nothing
    report = {"images": 200, "top1": 80.0, "baseline_top1": 81.5, "tokens_per_layer": [41.0, 41.0, 26.0, 26.0]}
    file.write_text(json.dumps(report))
    results = part(model_card(folder, record=record, report=file), "results")
    assert "trained as long" not in results and "| points of top-1 lost |  | 1.5 |" in results


def test_the_model_index_survives_the_hub_s_own_reading(folder):
    card = ModelCard(model_card(folder, record=RECORD))
    result = card.data.eval_results[0]
    assert (result.task_type, result.metric_type, result.metric_value) == ("image-classification", "accuracy", 0.85)
    assert (result.dataset_type, result.dataset_name) == ("imagefolder", "trash/val")
    index = metadata(str(card))["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    assert index == metadata(model_card(folder, record=RECORD))["model-index"]


def test_what_is_unknown_is_left_out(folder):
    """Without a record only arithmetic is left, which is certain for a method that keeps the same of every image."""
    card = model_card(folder)
    assert card_errors(card) == []
    results = part(card, "results")
    assert "| multiply-adds of the encoder | 1 | 0.57 |" in results and "layer  0      41" in results
    assert not any(word in results for word in ("top-1", "Top-1", "second", "None", "nan"))
    assert part(card, "training").count("\n") == 1
    assert not {"license", "base_model", "model-index", "datasets", "metrics"} & metadata(card).keys()
    for name in ("base_model", "dataset", "machine", "eval_images", "baseline_top1", "seed", "speed_batch_size"):
        card = model_card(folder, record={**RECORD, name: None})
        assert "None" not in card and card_errors(card) == []
    assert "model-index" not in metadata(model_card(folder, record={**RECORD, "dataset": None, "eval_dataset": None}))
    assert "% (" not in part(model_card(folder, record={**RECORD, "eval_images": None}), "results")


def test_adaptive_and_distilled(tmp_path):
    folder = tmp_path / "adaptive"
    reduce_tokens(tiny_model("deit"), ATSConfig(layers=(1, 2))).save_pretrained(folder)
    card = model_card(folder)
    assert "depends on the image" in part(card, "limits")
    assert "multiply-adds" not in part(card, "results")
    recorded = {
        "method": "ats",
        "settings": ATSConfig(layers=(1, 2)).to_dict(),
        "tokens_per_layer": [66, 30.5, 20, 20],
    }
    results = part(model_card(folder, record=recorded), "results")
    assert "the class token and the distillation token included, averaged over images" in results
    assert "layer  1    30.5  ██████████████████\n" in results


def test_the_record_in_the_folder_is_found_and_must_fit(folder):
    (folder / "record.json").write_text(json.dumps(RECORD))
    assert model_card(folder) == model_card(folder, record=RECORD) == model_card(folder, record=folder / "record.json")
    for changes in (
        {"settings": {**RECORD["settings"], "keep_rate": 0.5}},
        {"method": "tome", "settings": ToMeConfig(r=8).to_dict()},
        {"method": None, "settings": None},
        {"tokens_per_layer": [41.0] * 12},
    ):
        with pytest.raises(ValueError, match="The record is of another model"):
            model_card(folder, record={**RECORD, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "evil"}, "method 'evil'"),
        ({"top1": "85"}, "top1 must be a number from 0 to 100"),
        ({"top1": float("nan")}, "top1"),
        ({"top1": 850}, "top1"),
        ({"eval_images": 0}, "eval_images"),
        ({"eval_images": 4.5}, "eval_images"),
        ({"seed": True}, "seed"),
        ({"command": ["python"]}, "command must be text"),
        ({"earlier_commands": "python"}, "earlier_commands must list"),
        ({"tokens_per_layer": []}, "tokens_per_layer"),
        ({"tokens_per_layer": ["41"] * 4}, "tokens_per_layer"),
        ({"settings": {"method": "evit", "keep": 1}}, "Unknown field"),
        ({"settings": [1]}, "settings"),
    ],
)
def test_records_that_make_no_sense(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        model_card(folder, record={**RECORD, **changes})


def test_an_evaluation_gives_the_card_its_numbers(folder, tmp_path):
    report = {"images": 200, "top1": 80.0, "baseline_top1": 81.5, "mult_adds_ratio": 0.6, "drop": 1.5}
    report |= {"tokens_per_layer": [41.0, 41.0, 26.0, 26.0]}
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    for record in (None, RECORD):
        text = model_card(folder, record=record, report=file)
        assert "80.0 % (73.9 to 85.0)" in text and "Top-1 on 200 images," in text and "trash/val" not in text
        assert ("5 epochs on trash/train" in text) is (record is not None)
    chosen = {**RECORD, "chosen_by_evaluation": True}
    assert "the best on these images was kept" in model_card(folder, record=chosen)
    assert "the best on the evaluation images of the training was kept" in model_card(
        folder, record=chosen, report=file
    )
    own = json.loads((folder / "config.json").read_text())["reduction"]
    file.write_text(json.dumps({**report, "method": own["method"], "settings": own}))
    assert model_card(folder, record=RECORD, report=file) == text
    for other in (None, {"method": "tome", "r": 4}):
        file.write_text(json.dumps({**report, "method": other and other["method"], "settings": other}))
        with pytest.raises(ValueError, match="is of a model with another reduction"):
            model_card(folder, record=RECORD, report=file)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"report\.json is not a report of an evaluation"):
        model_card(folder, report=file)


def test_the_data_of_training_are_not_those_of_the_accuracy(folder, tmp_path):
    """A result names the images that were evaluated, and an older one of ours does not stay beside other numbers."""
    write_card(folder, record=RECORD, dataset="someone/trash", repo_id="me/rubbish")
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert (result.dataset_type, result.dataset_name, result.metric_value) == ("imagefolder", "trash/val", 0.85)
    report = {"images": 200, "top1": 80.0, "baseline_top1": 81.5, "tokens_per_layer": [41.0, 41.0, 26.0, 26.0]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    write_card(folder, report=tmp_path / "report.json")
    text = (folder / "README.md").read_text()
    data = metadata(text)
    assert "model-index" not in data and data["datasets"] == ["someone/trash"] and "80.0 % (" in text
    assert 'from_pretrained("me/rubbish"' in part(text, "usage")  # the id of the card before
    write_card(folder, record=RECORD)
    assert metadata((folder / "README.md").read_text())["model-index"][0]["name"] == "rubbish"
    write_card(folder, repo_id="me/other")
    assert 'from_pretrained("me/other"' in part((folder / "README.md").read_text(), "usage")


def test_a_control_is_not_the_model_before_reduction(folder, tmp_path):
    report = {"images": 200, "top1": 80.0, "baseline_top1": 81.5, "tokens_per_layer": [41.0, 41.0, 26.0, 26.0]}
    (tmp_path / "report.json").write_text(json.dumps({**report, "dense": "control"}))
    results = part(model_card(folder, record=RECORD, report=tmp_path / "report.json"), "results")
    assert "| top-1 |  | 80.0 % (" in results and "trained as long | 81.5 % (" in results
    untrained = {**RECORD, "epochs": 0}  # then it has the weights of the dense model
    results = part(model_card(folder, record=untrained, report=tmp_path / "report.json"), "results")
    assert "| top-1 | 81.5 % (" in results and "trained as long" not in results


def test_the_title_is_the_name_on_the_hub(folder):
    write_card(folder)
    assert "# reduced\n" in (folder / "README.md").read_text()
    write_card(folder, repo_id="me/rubbish")
    assert (
        "# rubbish\n" in (folder / "README.md").read_text() and "# reduced\n" not in (folder / "README.md").read_text()
    )


def test_a_record_cannot_write_markup(folder):
    record = {
        **RECORD,
        "base_model": "x](http://evil) <script>\n# Title",
        "eval_dataset": "a | b <!-- tokenreduce:end results -->",
        "earlier_commands": [],
        "command": "echo '```' <!-- tokenreduce:end training -->\n```",
    }
    card = model_card(folder, record=record)
    assert list(sections(card.split("---\n", 2)[2])) == ["method", "results", "training", "usage", "limits"]
    assert "<script>" not in card.replace("\\<script\\>", "") and "\n# Title" not in card
    assert "````\necho" in card
    assert card_errors(card) == []
    (folder / "README.md").write_text(card)
    assert model_card(folder, record=record) == card


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (340, 400), (1, 2)])
def test_wilson(right, total):
    """Its bounds are where the observed share is as many standard errors away as the level says."""
    share = right / total
    low, high = (bound / 100 for bound in wilson_interval(right, total))
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(share - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / total) ** 0.5)


def test_cards_of_many_records(tmp_path):
    results = tmp_path / "model_cards" / "results"
    results.mkdir(parents=True)
    dense = {"method": None, "settings": None, "base_model": "deit-tiny", "dataset": "trash/train", "top1": 88.0}
    records = {
        "evit-65": RECORD,
        "tome (r 7)": {**RECORD, "method": "tome", "settings": ToMeConfig(r=7).to_dict(), "top1": None},
        "dense": {**dense, "eval_images": 400, "epochs": 10, "seconds": 90.0, "mult_adds_ratio": 1.0},
    }
    for name, record in records.items():
        (results / f"{name}.json").write_text(json.dumps(record))
    written = write_cards(results, tmp_path / "model_cards")
    assert [path.name for path in written] == ["dense.md", "evit-65.md", "tome (r 7).md", "README.md"]
    for path in written[:-1]:
        card = path.read_text()
        assert card_errors(card) == []
        assert f"# {path.stem}" in card
        assert "None" not in card.replace("max_tokens=None", "")
    assert "Its weights are not here; the commands above make them." in written[1].read_text()
    rows = [line for line in written[-1].read_text().splitlines() if line.startswith("| [")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["[dense](<dense.md>)", "[EViT](<evit-65.md>)", "[ToMe](<tome (r 7).md>)"]
    assert cells[1][3:] == ["0.57", "85.0 % (81.2 to 88.2)", "87.2 %", "2.2", "1.41", "5", "13 min", "3"]
    assert cells[2][4] == "" and cells[0][9] == "90 s"

    index = written[-1]
    index.write_text("Mine.\n\n" + index.read_text() + "\nMine too.\n")
    written[1].write_text(written[1].read_text() + "\nMine in a card.\n")
    (results / "dense.json").unlink()
    write_cards(results, tmp_path / "model_cards")
    assert index.read_text().startswith("Mine.\n\n# Models") and index.read_text().endswith("\nMine too.\n")
    assert "dense.md" not in index.read_text()
    assert written[1].read_text().endswith("\nMine in a card.\n") and written[1].read_text().count("## Results") == 1
    (results / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json has method"):
        write_cards(results, tmp_path / "model_cards")


def test_what_a_card_needs(tmp_path):
    for arguments, words in (
        ({"folder": None}, "needs a folder, a record"),
        ({"folder": tmp_path}, "has no config.json"),
        ({"folder": None, "record": tmp_path / "nothing.json"}, "There is no record"),
        ({"folder": None, "record": RECORD, "base_model": "a/b/c"}, "base_model must be an id on the Hub"),
    ):
        with pytest.raises(ValueError, match=words):
            model_card(**arguments)
    with pytest.raises(ValueError, match="There are no records"):
        write_cards(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [
        ("dinov2", "image-classification", ["AutoModelForImageClassification", 'classify("photo.jpg")', ">=5.19"]),
        ("clip", "zero-shot-image-classification", ["candidate_labels=[", "model.get_image_features(pixels, "]),
        ("dinov3", "image-feature-extraction", ["5 prefix tokens, then a row for", "4 registers included"]),
        ("vit-features", "image-feature-extraction", ['"grid.unmerge"', "unmerge(out.last_hidden_state"]),
        ("backbone", "image-feature-extraction", ["AutoBackbone.from_pretrained("]),
        ("depth", "depth-estimation", ['estimate("photo.jpg")', ">=5.19"]),
        ("audio", "audio-classification", ['classify("sound.wav")', "An audio transformer", "Every sound keeps"]),
        ("llava", "image-text-to-text", ["AutoModelForImageTextToText", "max_new_tokens"]),
        ("siglip", "zero-shot-image-classification", ["Tokens that leave each layer:"]),
    ],
)  # fmt: skip
def test_cards_of_every_task(tmp_path, name, tag, words):
    save_case(name, tmp_path / "folder")
    card = model_card(tmp_path / "folder", repo_id="someone/reduced")
    assert card_errors(card) == []
    data = metadata(card)
    assert (data["pipeline_tag"], data["library_name"]) == (tag, "transformers")
    assert ("vision-transformer" in data["tags"]) == (name != "audio")
    assert all(word in card for word in [*words, f"transformers>={LEAST_TRANSFORMERS}"]), card
    assert 'someone/reduced"' in part(card, "usage") and "None" not in card


def test_what_scores_tokens_is_called_by_its_name(tmp_path):
    """Without a class token it is their mean."""
    model = reduce_tokens(CASES["siglip-vision"].make(), METHODS["evit"][0])
    model.save_pretrained(tmp_path)
    method = part(model_card(tmp_path), "method")
    assert "that the mean of all tokens attends to least" in method and "class token" not in method


def test_a_card_of_another_model_is_not_published(tmp_path):
    """As `reduce` over a folder with a card would leave it."""
    folder = tmp_path / "model"
    reduce_tokens(tiny_model(), ToMeConfig(r=4)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    write_card(folder)
    assert check_folder(folder, load=False).ok
    for setting, what in ((ToMeConfig(r=5), "r"), (EViTConfig(layers=(1,)), "the method")):
        reduce_tokens(tiny_model(), setting).save_pretrained(folder)
        report = check_folder(folder, load=False)
        different = f"README.md tells of another model than config.json: they differ in {what}"
        assert not report.ok and different in report.errors[0]
    (folder / "README.md").write_text("# A card of its owner, about ToMe")
    assert check_folder(folder, load=False).ok


def test_one_register_is_no_distillation_token():
    config = family_model("dinov3", num_register_tokens=1).config
    assert _prefix(config) == ", the class token and 1 register included"


def test_a_card_follows_the_method(folder):
    """The tags of the method before go, and other tags stay."""
    write_card(folder)
    model, _ = load_model(str(folder))
    assert "evit" in metadata((folder / "README.md").read_text())["tags"]
    text = (folder / "README.md").read_text().replace("tags:\n", "tags:\n- bat\n")  # it tells bats from birds
    (folder / "README.md").write_text(text)
    model.set_reduction(ToMeConfig(r=3))
    model.save_pretrained(folder)
    write_card(folder)
    tags = metadata((folder / "README.md").read_text())["tags"]
    assert {"bat", "tome", "arxiv:2210.09461"} < set(tags) and not {"evit", "arxiv:2202.07800"} & set(tags)


def test_where_patches_went_is_called_by_its_name(folder):
    assert "`out.patch_map` where each patch went" in part(model_card(folder), "usage")
    model, _ = load_model(str(folder))
    model.set_reduction(METHODS["sit"][0])
    model.save_pretrained(folder)
    text = part(model_card(folder), "usage")
    assert "`out.patch_weights` the weight of each patch in each token" in text and "`out.patch_map`" not in text


def test_a_machine_that_a_record_does_not_know_can_be_named(folder):
    record = {**RECORD, "speedup": 1.4, "machine": None}
    assert "on a laptop" not in model_card(folder, record=record)
    assert "a laptop" in part(model_card(folder, record=record, machine="a laptop"), "results")
