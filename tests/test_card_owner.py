"""A card that is written again keeps every word of its owner."""

import pytest
import yaml
from hub_server import card_errors
from test_card import RECORD, metadata, part

from hf_tokenreduce.hub import write_card
from hf_tokenreduce.hub.card_text import merge_metadata, sections


OWNER = """---
# chosen with care
license: cc-by-4.0   # not apache
tags: [mine, evit]
language: en
model-index:
- name: my name for it
  results:
  - task: {type: image-classification}
    dataset: {name: Mine, type: someone/mine}
    metrics:
    - {type: f1, value: 0.5, name: My F1}
  - task: {type: image-classification}
    dataset: {name: Mine, type: someone/mine}
    metrics:
    - {type: accuracy, value: 0.6, name: Top-1 accuracy}
extra:
  anything: [1, 2]
---

# My own title

Before everything.
"""


def test_the_owner_s_words_stay(folder):
    (folder / "README.md").write_text(OWNER)
    write_card(folder, record=RECORD)
    first = (folder / "README.md").read_text()
    assert first.split("---\n", 2)[2].startswith(
        "\n# My own title\n\nBefore everything.\n\n<!-- tokenreduce:begin method"
    )
    assert "# chosen with care\nlicense: cc-by-4.0   # not apache\n" in first
    assert card_errors(first) == []
    data = metadata(first)
    assert (data["license"], data["language"], data["extra"]) == ("cc-by-4.0", "en", {"anything": [1, 2]})
    assert data["tags"] == [
        "mine",
        "evit",
        "token-reduction",
        "vision-transformer",
        "hf_tokenreduce",
        "arxiv:2202.07800",
    ]
    assert [metric["name"] for result in data["model-index"][0]["results"] for metric in result["metrics"]] == [
        "My F1",
        "Top-1 accuracy",
        "Top-1 accuracy, by hf_tokenreduce",
    ]
    assert data["model-index"][0]["name"] == "my name for it"
    assert "cc-by-4.0" in part(first, "limits")

    between = first.replace("<!-- tokenreduce:begin results -->", "Between.\n\n<!-- tokenreduce:begin results -->")
    begin, end = sections(between)["limits"]
    mine = between[:begin] + "Instead of the limits.\n" + between[end:] + "\nAfter everything."
    (folder / "README.md").write_text(mine)
    write_card(folder, record={**RECORD, "top1": 90.0, "eval_dataset": "other/train"}, base_license="mit")
    second = (folder / "README.md").read_text()
    for words in (
        "Before everything.",
        "Between.",
        "Instead of the limits.",
        "After everything.",
        "# chosen with care",
    ):
        assert second.count(words) == 1
    assert "90.0 % (" in second and "85.0 % (" not in second
    assert "limits" not in sections(second)
    results = metadata(second)["model-index"][0]["results"]
    found = [(one["dataset"]["name"], metric["value"]) for one in results for metric in one["metrics"]]
    assert found == [
        ("Mine", 0.5),
        ("Mine", 0.6),
        ("other/train", 0.9),
    ]
    assert metadata(second)["license"] == "mit"  # given just now


def test_renewing_changes_nothing_that_has_not_changed(folder):
    write_card(folder, record=RECORD, base_model="facebook/deit-tiny-patch16-224", base_license="apache-2.0")
    first = (folder / "README.md").read_bytes()
    write_card(folder, record=RECORD)
    assert (folder / "README.md").read_bytes() == first
    assert not list(folder.glob("*.part"))


def test_line_ends_stay(folder):
    (folder / "README.md").write_bytes(OWNER.replace("\n", "\r\n").encode())
    write_card(folder, record=RECORD)
    written = (folder / "README.md").read_bytes()
    assert written.count(b"\n") == written.count(b"\r\n") > 50
    write_card(folder, record=RECORD)
    assert (folder / "README.md").read_bytes() == written


@pytest.mark.parametrize(
    "text",
    [
        "<!-- tokenreduce:begin results -->\n",
        "<!-- tokenreduce:end results -->\n",
        "<!-- tokenreduce:begin a -->\n<!-- tokenreduce:begin b -->\n<!-- tokenreduce:end b -->\n"
        "<!-- tokenreduce:end a -->\n",
        "<!-- tokenreduce:begin a -->\n<!-- tokenreduce:end b -->\n",
        "<!-- tokenreduce:begin a -->\n<!-- tokenreduce:end a -->\n" * 2,
    ],
)
def test_markers_that_do_not_pair_up(folder, text):
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match="end or delete"):
        write_card(folder)
    assert (folder / "README.md").read_text() == text


@pytest.mark.parametrize("block", ["a: [", "- a\n- b", "model-index:\n- 3"])
def test_metadata_that_cannot_be_merged(folder, block):
    text = f"---\n{block}\n---\nwords\n"
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match="Mend it first"):
        write_card(folder, record=RECORD)
    assert (folder / "README.md").read_text() == text


@pytest.mark.parametrize(
    "block",
    [
        "a: 1\nb: |\n  two\n\n  lines\nc: 3\n",
        "a: 1\nb:\n- x\n# a remark\n- y\nc: 3\n",
        "'b': x\na: {c: 1}\nc: &here [1]\nd: *here\n",
        "{a: 1, b: 2}\n",
        "",
    ],
)
def test_metadata_in_any_form(block):
    before = yaml.safe_load(block) or {}
    assert yaml.safe_load(merge_metadata(block, {"b": ["new"], "e": "more"})) == {**before, "b": ["new"], "e": "more"}
    assert merge_metadata(block, before) == block
