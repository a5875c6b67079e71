"""Up to a stand-in of the Hub and down again, in fresh processes with HF_ENDPOINT pointing to it."""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import saved
from hub_server import LFS_SUFFIXES, OWNER, STRANGER, HubServer
from huggingface_hub import repocard
from PIL import Image
from safetensors.torch import load_file, save_file
from task_models import save_case
from transformers import ViTImageProcessor, pipeline

from hf_tokenreduce.hub import PublishError, check_folder, publish, write_card


# One process publishes again and again: starting it is what takes the time. The first time everything is checked.
UP = """
import json, os, shutil, sys
from safetensors.torch import load_file, save_file
from hf_tokenreduce.hub import PublishError, publish
folder, owner, stranger, nowhere, texts, backbone = sys.argv[1:7]
results, errors = {}, {}

def attempt(name, *arguments, **options):
    try:
        result = publish(*arguments, **{"load": False, "token": owner, **options})
    except (PublishError, ValueError) as error:
        errors[name] = [type(error).__name__, str(error)]
    else:
        results[name] = {
            "repo_id": result.repo_id, "url": result.url, "revision": result.revision, "files": result.files,
            "pull_request": result.pull_request, "snippet": result.snippet,
            "difference": result.report.max_difference,
        }

attempt("first", folder, "someone/reduced", private=True, load=True)
attempt("unchanged", folder, "someone/reduced")
with open(folder + "/README.md", "a") as card:
    card.write("\\nMore by its owner.\\n")
attempt("card", folder, "someone/reduced", commit_message="More in the card")
attempt("branch", folder, "someone/reduced", revision="next")
attempt("public", folder, "someone/open")
attempt("pull request", folder, "someone/open", token=stranger, create_pr=True)
with open(folder + "/README.md", "a") as card:
    card.write("\\nMore by a stranger.\\n")
attempt("pull request with changes", folder, "someone/open", token=stranger, create_pr=True)
attempt("no right", folder, "someone/open", token=stranger)
attempt("hidden", folder, "someone/reduced", token=stranger, create_pr=True)
attempt("bad token", folder, "someone/other", token="hf_wrong")
attempt("pull request to nothing", folder, "someone/nothing", create_pr=True)
attempt("no network", folder, "someone/reduced", endpoint=nowhere)
card = open(folder + "/README.md").read()
with open(folder + "/README.md", "w") as file:
    file.write(card.replace("license: apache-2.0", "license: none of them"))
attempt("bad card", folder, "someone/open")
shutil.copytree(folder, folder + "-late")
save_file({name: tensor + 1 for name, tensor in load_file(folder + "/model.safetensors").items()},
          folder + "-late/model.safetensors", metadata={"format": "pt"})
with open(folder + "-late/README.md", "w") as file:
    file.write(card)
attempt("broken upload", folder + "-late", "someone/late", token=owner)
attempt("again", folder + "-late", "someone/late", token=owner)
tensors = load_file(folder + "-late/model.safetensors")
os.remove(folder + "-late/model.safetensors")
names, weight_map = sorted(tensors), {}
for part, some in enumerate((names[::2], names[1::2]), start=1):
    file = f"model-0000{part}-of-00002.safetensors"
    save_file({name: tensors[name] for name in some}, folder + "-late/" + file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(some, file)
with open(folder + "-late/model.safetensors.index.json", "w") as file:
    json.dump({"metadata": {}, "weight_map": weight_map}, file)
attempt("in parts", folder + "-late", "someone/late")
attempt("texts", texts, "someone/clip")
attempt("backbone", backbone, "someone/backbone")
print(json.dumps({"results": results, "errors": errors}))
"""

DOWN = """
import json, sys
sys.modules["hf_tokenreduce"] = None  # importing it fails
import torch
from PIL import Image
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoModelForImageClassification, pipeline
repo_id, revision, work, token = sys.argv[1:5]
where = {"revision": revision, "trust_remote_code": True, "token": token}
inputs = load_file(work + "/inputs.safetensors")
model = AutoModelForImageClassification.from_pretrained(repo_id, **where).eval()
assert type(model).__module__.startswith("transformers_modules.someone"), type(model)
with torch.no_grad():
    backbone = AutoBackbone.from_pretrained("someone/backbone", trust_remote_code=True).eval()
    outputs = {"logits": model(inputs["pixels"]).logits, "features": backbone(inputs["pixels"]).feature_maps[-1]}
    save_file(outputs, work + "/outputs.safetensors")
photo = Image.fromarray(inputs["photo"].numpy())
compare = pipeline("zero-shot-image-classification", model="someone/clip", trust_remote_code=True)
answers = pipeline("image-classification", model=repo_id, **where)(photo, top_k=5)
api = HfApi(token=token)
found = {
    "answers": answers,
    "compared": compare(photo, candidate_labels=["cat", "dog"]),
    "files": sorted(api.list_repo_files(repo_id, revision=revision)),
    "private": api.model_info(repo_id).private,
    "head": api.model_info(repo_id).sha,
}
card = ModelCard.load(repo_id, token=token)
card.validate()
card.data.license = "no such license"
try:
    card.validate()
except ValueError as error:
    found["invalid"] = str(error)
try:
    AutoModelForImageClassification.from_pretrained(repo_id, revision=revision, trust_remote_code=True, token=False,
                                                    cache_dir=work + "/another")
except OSError as error:
    found["without a token"] = str(error)
print(json.dumps(found))
"""


def with_network(script, *arguments, home, endpoint):
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=home.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """The whole way, once."""
    if '"https://huggingface.co/api/validate-yaml"' in inspect.getsource(repocard):
        pytest.skip("this version of huggingface_hub has cards judged by the real Hub alone")
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("journey")
    model, folder = saved(work, "vit", "ltmp")
    write_card(folder, base_license="apache-2.0")
    Image.new("RGB", (8, 8)).save(folder / "token_map.png")
    (folder / "images").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "images" / "more.png")
    given = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "left.pyc").write_bytes(b"not for others")
    photo = torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8)
    save_file({"pixels": torch.randn(2, 3, 32, 32), "photo": photo}, work / "inputs.safetensors")
    others = [save_case(name, work / name) for name in ("clip", "backbone")]
    arguments = [folder, OWNER, STRANGER, "http://127.0.0.1:9", work / "clip", work / "backbone"]
    with HubServer() as hub:
        hub.breaks_at = 4  # the weights of another model, after three large files of this one
        up = with_network(UP, *arguments, home=work / "up", endpoint=hub.endpoint)
        sent = len(hub.requests)
        revision = up["results"]["first"]["revision"]
        down = with_network(DOWN, "someone/reduced", revision, work, OWNER, home=work / "down", endpoint=hub.endpoint)
        yield SimpleNamespace(
            model=model, others=others, work=work, given=given, hub=hub, down=down, revision=revision, **up,
            requests=(hub.requests[:sent], hub.requests[sent:]),
        )  # fmt: skip


def test_everything_belongs_arrives_and_nothing_else(journey):
    first = journey.results["first"]
    assert first["files"] == {name: len(data) for name, data in sorted(journey.given.items())}
    served = journey.hub.repositories["someone/reduced"].commits[journey.revision]
    assert served == journey.given
    assert journey.down["files"] == sorted(journey.given)
    assert first["url"] == f"{journey.hub.endpoint}/someone/reduced/commit/{journey.revision}"
    assert first["difference"] <= 1e-5
    assert first["snippet"].splitlines() == [
        "from transformers import AutoModelForImageClassification",
        'model = AutoModelForImageClassification.from_pretrained("someone/reduced", '
        f'revision="{journey.revision}", trust_remote_code=True)',
    ]


def test_what_comes_down_computes_the_same(journey):
    inputs = load_file(journey.work / "inputs.safetensors")
    expected = journey.model(inputs["pixels"]).logits
    torch.testing.assert_close(
        load_file(journey.work / "outputs.safetensors")["logits"], expected, rtol=0, atol=1e-5
    )  # fmt: skip
    processor = ViTImageProcessor.from_pretrained(journey.work / "published")
    pixels = processor(inputs["photo"].numpy(), return_tensors="pt").pixel_values
    scores = journey.model(pixels).logits[0].softmax(dim=-1)
    assert len(journey.down["answers"]) == 5
    for answer in journey.down["answers"]:
        label = journey.model.config.label2id[answer["label"]]
        assert answer["score"] == pytest.approx(scores[label].item(), abs=1e-5)


def test_other_tasks_go_the_same_way(journey):
    clip, backbone = journey.others
    for name, auto_class in (("texts", "AutoModelForZeroShotImageClassification"), ("backbone", "AutoBackbone")):
        assert journey.results[name]["snippet"].startswith(f"from transformers import {auto_class}\n")
        assert f"{auto_class}.from_pretrained(" in journey.results[name]["snippet"]
    assert {"tokenizer.json", "tokenizer_config.json", "processor_config.json"} < journey.results["texts"][
        "files"
    ].keys()
    inputs = load_file(journey.work / "inputs.safetensors")
    features = load_file(journey.work / "outputs.safetensors")["features"]
    torch.testing.assert_close(features, backbone(inputs["pixels"]).feature_maps[-1], rtol=0, atol=1e-5)
    pipe = pipeline("zero-shot-image-classification", model=str(journey.work / "clip"))
    assert type(pipe.model) is type(clip)
    expected = pipe(Image.fromarray(inputs["photo"].numpy()), candidate_labels=["cat", "dog"])
    assert [one["label"] for one in journey.down["compared"]] == [one["label"] for one in expected]
    for one, other in zip(journey.down["compared"], expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_weights_go_and_come_as_large_files_and_tokens_stay_with_the_hub(journey):
    up, down = journey.requests
    oid = hashlib.sha256(journey.given["model.safetensors"]).hexdigest()
    assert [request.path for request in up if request.method == "PUT"].count(f"/lfs/{oid}") == 1  # for all publishing
    fetched = [request for request in down if request.path == f"/lfs/{oid}" and request.method == "GET"]
    assert fetched and all(request.host.startswith("localhost") and request.token is None for request in fetched)
    assert len([name for name in journey.given if name.endswith(LFS_SUFFIXES)]) == 3
    assert {request.token for request in up if request.path == "/api/repos/create"} == {OWNER, STRANGER, "hf_wrong"}
    assert all(request.token == OWNER for request in down if "/resolve/" in request.path and request.token)


def test_private_stays_private(journey):
    assert journey.down["private"] is True
    assert journey.hub.repositories["someone/open"].private is False
    assert "without a token" in journey.down


def test_publishing_again(journey):
    """Unchanged, nothing is committed; a new card is a commit of its own, which leaves the weights where they are."""
    results, repository = journey.results, journey.hub.repositories["someone/reduced"]
    assert results["unchanged"]["revision"] == journey.revision
    assert results["card"]["revision"] == journey.down["head"] != journey.revision
    before, after = (repository.commits[results[name]["revision"]] for name in ("first", "card"))
    assert {name for name in after if after[name] != before[name]} == {"README.md"}
    assert after["README.md"].endswith(b"More by its owner.\n")
    assert repository.branches["next"] == results["branch"]["revision"]


def test_a_pull_request_leaves_main_alone(journey):
    repository, result = journey.hub.repositories["someone/open"], journey.results["pull request with changes"]
    assert repository.branches["main"] == journey.results["public"]["revision"]
    proposed = next(branch for branch, sha in repository.branches.items() if sha == result["revision"])
    assert proposed.startswith("refs/pr/")
    assert result["pull_request"] == f"{journey.hub.endpoint}/someone/open/discussions/{proposed.split('/')[-1]}"
    assert repository.commits[result["revision"]]["README.md"].endswith(b"More by a stranger.\n")
    assert b"stranger" not in repository.commits[repository.branches["main"]]["README.md"]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ("no right", "may not write to someone/open (403)"),
        ("hidden", "no repository someone/reduced"),
        ("bad token", "hf auth login"),
        ("pull request to nothing", "no repository someone/nothing"),
        ("no network", "http://127.0.0.1:9 cannot be reached"),
        ("bad card", "does not take the folder for someone/open"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(journey, attempt, words):
    kind, message = journey.errors.pop(attempt)
    assert kind == ("ValueError" if attempt == "bad card" else "PublishError")
    assert words in message
    assert "\n" not in message
    assert not any(token in message for token in (OWNER, STRANGER, "hf_wrong"))


def test_an_upload_that_broke_off_goes_on(journey):
    kind, message = journey.errors["broken upload"]
    assert kind == "PublishError"
    assert "someone/late broke off" in message
    again = journey.results["again"]
    assert journey.hub.repositories["someone/late"].commits[again["revision"]].keys() == again["files"].keys()


def test_weights_of_an_earlier_model_are_deleted(journey):
    """If old weights in one file stayed, they would be loaded instead of the new parts."""
    result = journey.results["in parts"]
    published = journey.hub.repositories["someone/late"].commits[result["revision"]]
    assert published.keys() == result["files"].keys() and "model.safetensors" not in published


def test_the_stand_in_judges_cards(journey):
    assert "license" in journey.down["invalid"]


def test_a_dry_run_is_exactly_what_would_be_sent(tmp_path):
    _, folder = saved(tmp_path)
    (folder / "training_args.bin").write_bytes(b"not for others")
    (folder / "checkpoint-7").mkdir()
    (folder / "others.bin").write_bytes(b"not for others")
    with pytest.raises(ValueError, match=r"others\.bin may hold pickled objects"):
        publish(folder, "someone/reduced", dry_run=tmp_path / "dry", load=False)
    assert not (tmp_path / "dry").exists()
    result = publish(folder, "someone/reduced", dry_run=tmp_path / "dry", load=False, skip_others=True)
    assert {file.name: file.stat().st_size for file in (tmp_path / "dry").iterdir()} == result.files
    assert all((tmp_path / "dry" / name).read_bytes() == (folder / name).read_bytes() for name in result.files)
    assert "training_args.bin" not in result.files
    assert (result.revision, result.url) == (None, str(tmp_path / "dry"))
    left = [re.findall(r"checkpoint-7/|training_args\.bin|others\.bin", line) for line in result.report.warnings[:3]]
    assert left == [["checkpoint-7/"], ["training_args.bin"], ["others.bin"]]
    with pytest.raises(ValueError, match="not an empty folder"):
        publish(folder, "someone/reduced", dry_run=tmp_path / "dry", load=False, skip_others=True)


def test_code_without_a_name_is_told(tmp_path, caplog):
    _, folder = saved(tmp_path)
    for repo_id, told in ((None, True), ("someone/reduced", False)):
        write_card(folder, repo_id=repo_id)
        caplog.clear()
        publish(folder, "someone/reduced", dry_run=tmp_path / f"dry-{told}", load=False)
        assert ("tokenreduce card" in caplog.text and "--repo-id someone/reduced" in caplog.text) is told


def test_a_report_about_another_folder_is_refused(tmp_path):
    _, folder = saved(tmp_path)
    other = shutil.copytree(folder, tmp_path / "other")
    report = check_folder(other, load=False)
    with pytest.raises(ValueError, match=r"report is about .*other, not about"):
        publish(folder, "someone/reduced", dry_run=tmp_path / "dry", report=report)
    assert publish(other, "someone/reduced", dry_run=tmp_path / "dry", report=report).report is report


@pytest.mark.parametrize("repo_id", ["a/b/c", "someone/../other", "someone/na me", "-x/y", "", "reduced"])
def test_a_repository_needs_a_name(tmp_path, repo_id):
    with pytest.raises(ValueError, match="repo_id must be"):
        publish(tmp_path, repo_id)


def test_a_pull_request_has_no_branch_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="leave revision='next' out"):
        publish(tmp_path, "someone/reduced", create_pr=True, revision="next")


def test_offline_is_said(tmp_path):
    _, folder = saved(tmp_path)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        publish(folder, "someone/reduced", load=False)


def test_code_of_another_repository_is_told(tmp_path, caplog):
    _, folder = saved(tmp_path)
    write_card(folder, repo_id="me/other")
    publish(folder, "someone/reduced", dry_run=tmp_path / "dry", load=False)
    assert "The code in README.md names me/other." in caplog.text and "--repo-id someone/reduced" in caplog.text
