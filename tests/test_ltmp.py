"""LTMP's thresholds: what is trained is what runs, the budget, calibration, and their file."""

import copy

import pytest
import torch
from helpers import BACKBONES, slow, tiny_images, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
)

from hf_tokenreduce import LTMPConfig, ToMeConfig, calibrate, load_thresholds, reduce_tokens, save_thresholds
from hf_tokenreduce.modeling.ltmp import budget_share
from hf_tokenreduce.modeling.multiply_adds import multiply_adds, shares_kept


MLP = 2 * 48 * 96  # multiply-adds of the MLP of the models here, for one token
KINDS = [LTMPConfig(), LTMPConfig(prune=False), LTMPConfig(merge=False), LTMPConfig(max_tokens=[60, 44, 30, 9])]


def with_random_thresholds(setting, seed, backbone="vit"):
    model = reduce_tokens(tiny_model(backbone), setting)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.rand((), generator=generator)
            if name.endswith("merge_threshold"):
                parameter.copy_(0.3 + 0.6 * draw)
            elif name.endswith("prune_threshold"):
                parameter.copy_(0.016 * draw)
    return model


@pytest.mark.parametrize("setting", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_masked_equals_removed(setting, backbone):
    for seed in range(6):
        model = with_random_thresholds(setting, seed, backbone)
        images = tiny_images(4, seed=seed)
        removed = model.eval()(images, output_patch_map=True)
        masked = model.train()(images, output_patch_map=True)
        torch.testing.assert_close(masked.logits, removed.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(masked.token_counts, removed.token_counts)
        for image in range(4):  # the same patches together: the index of one names the index of the other
            pairs = {*zip(masked.patch_map[image].tolist(), removed.patch_map[image].tolist(), strict=True)}
            assert len(pairs) == len({masked for masked, _ in pairs}) == len({removed for _, removed in pairs})
            assert all((masked < 0) == (removed < 0) for masked, removed in pairs)
        assert (removed.token_counts[:, -1] < removed.token_counts[:, 0]).any()


@pytest.mark.parametrize("setting", KINDS)
@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_masked_equals_removed_however_steep_attention_is(setting, scale):
    """With larger weights logits differ by hundreds: a dead key must weigh nothing, and not set the maximum."""
    for seed in range(3):
        model = with_random_thresholds(setting, seed)
        with torch.no_grad():
            for layer in model.vit.layers:
                layer.attention.q_proj.weight.mul_(scale)
                layer.attention.k_proj.weight.mul_(scale)
        states = []
        for layer in model.vit.layers:
            layer.register_forward_hook(lambda module, args, state: states.append(state))  # noqa: B023
        removed = model.eval()(tiny_images())
        states.clear()
        masked = model.train()(tiny_images())
        assert all(torch.equal(state.mask, (state.mask > 0.5).float()) for state in states)
        assert torch.equal(masked.token_counts, removed.token_counts)
        torch.testing.assert_close(masked.logits, removed.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", KINDS)
def test_masked_features_of_live_tokens_are_those_of_packed_ones(setting):
    model = with_random_thresholds(setting, 1)
    states = {True: [], False: []}
    model.vit.layers[2].register_forward_hook(lambda module, args, state: states[module.training].append(state))
    model.eval()(tiny_images())
    model.train()(tiny_images())
    packed, masked = states[False][0], states[True][0]
    for image, rows in enumerate(packed.hidden_states[0].split(packed.lengths)):
        torch.testing.assert_close(masked.hidden_states[image, 0], rows[0], rtol=1e-4, atol=1e-4)
        for row, rank in enumerate(masked.rank[image].tolist()):
            if rank >= 0:
                torch.testing.assert_close(masked.hidden_states[image, 1 + row], rows[1 + rank], rtol=1e-4, atol=1e-4)
        assert (masked.rank[image] >= 0).sum() == len(rows) - 1


@pytest.mark.parametrize("setting", KINDS[:3])
def test_the_loss_has_two_parts_and_every_threshold_learns(setting):
    model = with_random_thresholds(setting, 0).train()
    output = model(tiny_images(), labels=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(output.loss, output.task_loss + output.auxiliary_loss)
    kept = output.token_counts.float().mean(dim=0) / 65
    expected = 10 * (budget_share(kept, 65, 48, MLP) - 0.75) ** 2
    torch.testing.assert_close(output.auxiliary_loss, expected)
    alone = model(tiny_images())  # whoever computes the task's loss outside needs it too
    torch.testing.assert_close(alone.auxiliary_loss, expected)
    output.loss.backward()
    thresholds = {name: p for name, p in model.named_parameters() if "threshold" in name}
    assert len(thresholds) == 4 * (setting.merge + setting.prune)
    assert all(p.grad.abs() > 0 for p in thresholds.values())
    assert model.eval()(tiny_images(), labels=torch.tensor([0, 1, 2])).auxiliary_loss is None


def test_the_budget_counts_once_however_batches_are_accumulated(tmp_path):
    """Trainer neither divides by accumulation steps nor averages when it tells a model the number of items."""
    rows = [{"pixel_values": image, "labels": label} for label, image in enumerate(tiny_images(4))]
    reached = []
    for batch_size in (4, 1):
        model = with_random_thresholds(KINDS[0], 0)
        model.requires_grad_(False)
        model.vit.layers[3].reducer.requires_grad_()  # the last thresholds learn by the budget alone
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=1,
            learning_rate=1e-3,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        before = model.vit.layers[3].reducer.merge_threshold.item()
        Trainer(model, arguments, train_dataset=rows).train()
        reached.append(model.vit.layers[3].reducer.merge_threshold.item() - before)
    assert reached[0] != 0
    assert reached[1] == pytest.approx(reached[0], rel=0.2)  # the square of a mean is not the mean of squares


def test_the_budget_formula():
    n, d = 65, 48
    assert budget_share(torch.ones(5), n, d, 8 * d**2).item() == pytest.approx(1.0)
    kept, before = [0.8, 0.5], [1.0, 0.8]
    parts = [2 * b * n * d**2 + (b * n) ** 2 * d + 4 * k * n * d**2 for b, k in zip(before, kept, strict=True)]
    expected = sum(parts) / 2 / (6 * n * d**2 + n**2 * d)
    assert budget_share(torch.tensor(kept), n, d, 8 * d**2).item() == pytest.approx(expected)


def test_the_budget_counts_the_mlp_that_the_model_has():
    """The authors' formula is that of an MLP four times as wide as the tokens. SigLIP and DINOv2-giant have others."""
    config = ViTConfig(
        hidden_size=48, num_attention_heads=3, num_hidden_layers=2, intermediate_size=70, image_size=128
    )
    counts = torch.tensor([[50, 30]])
    share = budget_share(counts[0] / 65, 65, 48, 2 * 48 * 70)
    assert share.item() == pytest.approx(shares_kept(config, counts, 65, None).item())


@pytest.mark.parametrize("setting", [KINDS[0], *map(slow, KINDS[1:3])])
def test_thresholds_alone_learn_to_meet_a_budget(setting):
    model = with_random_thresholds(setting, 3)
    model.requires_grad_(False)
    thresholds = [p.requires_grad_() for name, p in model.named_parameters() if "threshold" in name]
    images, labels = tiny_images(8), torch.arange(8) % 5
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.endswith("merge_threshold")], "lr": 5e-3},
        {"params": [p for n, p in model.named_parameters() if n.endswith("prune_threshold")], "lr": 2e-5},
    ]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]])
    first = model.train()(images, labels=labels).auxiliary_loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for threshold in thresholds:
                threshold.clamp_(0, 1)
    assert model(images, labels=labels).auxiliary_loss.item() < 0.5 * first


@pytest.mark.parametrize("setting", KINDS[:3])
@pytest.mark.parametrize("target", [0.85, 0.6])
def test_calibration_meets_its_target(setting, target):
    model = reduce_tokens(tiny_model(), setting).train()
    images = tiny_images(32)
    share = calibrate(model, images, target, tolerance=0.01)
    assert share == pytest.approx(target, abs=0.02)
    assert model.training
    counts = model.eval()(images, output_patch_map=True).token_counts  # by which all layers act
    dense = multiply_adds(model.config, torch.full((1, 4), 65), 65)
    reached = multiply_adds(model.config, counts, 65, model.config.reduction).mean() / dense
    assert reached.item() == pytest.approx(share)
    assert all("after_attention" not in vars(layer.reducer) for layer in model.vit.layers)


def test_calibration_on_a_folder_of_images(tmp_path):
    for number in range(5):
        folder = tmp_path / f"any{number % 2}"
        folder.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    model = reduce_tokens(tiny_model(), LTMPConfig())
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    assert calibrate(model, tmp_path, 0.7, image_processor=processor) == pytest.approx(0.7, abs=0.05)
    with pytest.raises(ValueError, match="image_processor"):
        calibrate(model, tmp_path, 0.7)
    (tmp_path / "any0" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read"):
        calibrate(model, tmp_path, 0.7, image_processor=processor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No images"):
        calibrate(model, tmp_path / "empty", 0.7, image_processor=processor)


def test_calibration_refuses():
    model = reduce_tokens(tiny_model(), LTMPConfig())
    with pytest.raises(ValueError, match="LTMPConfig"):
        calibrate(reduce_tokens(model, ToMeConfig(r=3)), tiny_images(), 0.7)
    with pytest.raises(ValueError, match=r"1\.7"):
        calibrate(model, tiny_images(), 1.7)
    with pytest.raises(ValueError, match="pixel values"):
        calibrate(model, tiny_images(0), 0.7)
    with pytest.raises(ValueError, match=r"max_images.*0"):
        calibrate(model, tiny_images(), 0.7, max_images=0)
    with pytest.raises(ValueError, match="target is missing"):
        calibrate(model, tiny_images())
    model = with_random_thresholds(LTMPConfig(max_tokens=20), 1)
    model.train().vit.embeddings.eval()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for target, message in ((0.01, "cannot be reached.*higher target"), (0.9, "cannot be reached.*higher cap")):
        with pytest.raises(ValueError, match=message):
            calibrate(model, tiny_images(), target)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.training and not model.vit.embeddings.training


def test_calibration_takes_the_images_and_the_share_it_is_told():
    seen, model = [], reduce_tokens(tiny_model(), LTMPConfig())
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    calibrate(model, tiny_images(32), 0.7, max_images=8)
    assert set(seen) == {1, 8}  # the first image alone, to see whether its numbers are finite
    merged = []
    for merge_share in (0.0, 0.9):
        calibrate(model, tiny_images(32), 0.7, merge_share=merge_share)
        dropped = model(tiny_images(32), output_patch_map=True).patch_map < 0
        merged.append(1 - dropped.float().mean().item())
    assert merged[0] < 0.8 < merged[1]


def test_calibration_leaves_the_first_layers_alone():
    images = tiny_images(32)
    for target, options, dense in (
        (0.8, {}, 1),
        (0.8, {"first_layer": 2}, 2),
        (0.4, {}, 0),
        (0.8, {"first_layer": 0}, 0),
    ):
        model = reduce_tokens(tiny_model(), LTMPConfig())
        calibrate(model, images, target, **options)
        counts = model(images, output_patch_map=True).token_counts.double().mean(dim=0)
        assert counts[:dense].tolist() == [65] * dense and (counts[dense:] < 64).all()
    with pytest.raises(ValueError, match=r"first_layer must be the index of a layer, from 0 to 3, got 4"):
        calibrate(model, images, 0.8, first_layer=4)
    with pytest.raises(ValueError, match=r"from layer 3 on, .* are kept\. .* an earlier first_layer"):
        calibrate(model, images, 0.3, first_layer=3)


@pytest.mark.parametrize("setting", KINDS[:3])
def test_thresholds_in_a_file(tmp_path, setting):
    model = with_random_thresholds(setting, 5)
    expected = model(tiny_images()).logits
    save_thresholds(model, tmp_path / "folder" / "thresholds.safetensors")
    saved = load_file(tmp_path / "folder" / "thresholds.safetensors")
    assert sum(values.numel() for values in saved.values()) == 4 * (setting.merge + setting.prune)
    other = reduce_tokens(tiny_model(), setting)
    assert not torch.equal(other(tiny_images()).logits, expected)
    load_thresholds(other, tmp_path / "folder" / "thresholds.safetensors")
    assert torch.equal(other(tiny_images()).logits, expected)
    load_thresholds(
        reduce_tokens(tiny_model().to(torch.bfloat16), setting), tmp_path / "folder" / "thresholds.safetensors"
    )


def test_thresholds_of_another_model_are_refused(tmp_path):
    path = tmp_path / "thresholds.safetensors"
    save_thresholds(with_random_thresholds(LTMPConfig(), 5), path)
    with pytest.raises(ValueError, match="LTMPConfig"):
        load_thresholds(reduce_tokens(tiny_model(), ToMeConfig(r=3)), path)
    with pytest.raises(ValueError, match=r"holds .*merge_threshold.*, the model has \['prune_threshold'\]"):
        load_thresholds(reduce_tokens(tiny_model(), LTMPConfig(merge=False)), path)
    with pytest.raises(ValueError, match=r"4 values.*3 layers"):
        load_thresholds(reduce_tokens(tiny_model(num_hidden_layers=3), LTMPConfig()), path)
    related = reduce_tokens(tiny_model(), LTMPConfig())
    with torch.no_grad():
        for layer in related.vit.layers:
            layer.mlp.fc2.weight.add_(0.01 * torch.randn_like(layer.mlp.fc2.weight))
    with pytest.raises(ValueError, match=r"other weights.*check_backbone=False"):
        load_thresholds(related, path)
    load_thresholds(related, path, check_backbone=False)
    numbers = load_file(path)
    save_file({**numbers, "merge_threshold": numbers["merge_threshold"] + 3}, path)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        load_thresholds(related, path)


def test_thresholds_that_training_carried_out_of_range_are_saved_in_it(tmp_path):
    model = with_random_thresholds(LTMPConfig(), 5)
    with torch.no_grad():
        model.vit.layers[1].reducer.prune_threshold.fill_(-0.02)
        model.vit.layers[2].reducer.merge_threshold.fill_(1.02)
    expected = model(tiny_images()).logits
    save_thresholds(model, tmp_path / "thresholds.safetensors")
    load_thresholds(model, tmp_path / "thresholds.safetensors")
    assert model.vit.layers[1].reducer.prune_threshold.item() == 0
    assert torch.equal(model(tiny_images()).logits, expected)


def test_a_threshold_of_one_merges_nothing_though_patches_are_the_same():
    model = reduce_tokens(tiny_model(), LTMPConfig(merge_threshold=1.0, prune=False))
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
    assert (model(torch.ones(1, 3, 32, 32)).token_counts == 65).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_are_never_rounded(tmp_path, dtype):
    """A bfloat16 would round a threshold: the numbers it has beside 0.9 are 0.004 apart."""
    model = reduce_tokens(tiny_model(), LTMPConfig(merge_threshold=0.9013, prune_threshold=0.00471)).to(dtype)
    exact = {"merge_threshold": 0.9013, "prune_threshold": 0.00471}

    def check(model):
        for name, parameter in model.named_parameters():
            wanted = exact.get(name.split(".")[-1])
            assert parameter.dtype == (dtype if wanted is None else torch.float32)
            assert wanted is None or parameter.item() == torch.tensor(wanted).item()

    check(model)
    assert model(tiny_images().to(dtype)).logits.dtype == dtype
    model.save_pretrained(tmp_path)
    check(type(model).from_pretrained(tmp_path, dtype=dtype))
    check(reduce_tokens(model, model.config.reduction))
    check(copy.deepcopy(model).float().to(dtype))


def test_the_budget_is_that_of_the_images_and_not_of_the_configuration():
    """The configuration of DINOv2 names the largest images, and smaller ones come in."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4, "mlp_ratio": 2, "patch_size": 8}
    stock = Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=128, num_labels=3))
    model = reduce_tokens(stock, LTMPConfig(merge_threshold=0.5, prune_threshold=0.05, target=0.75)).train()
    output = model(torch.randn(3, 3, 32, 32), labels=torch.tensor([0, 1, 2]))
    assert output.token_counts[:, 0].max() <= 17
    expected = 10 * (budget_share(output.token_counts.float().mean(dim=0) / 17, 17, 48, MLP) - 0.75) ** 2
    torch.testing.assert_close(output.auxiliary_loss, expected)


def test_an_adapter_in_the_mlp_leaves_the_backbone_recognised(tmp_path):
    """The second part of an adapter begins with zeros, which have no direction."""
    peft = pytest.importorskip("peft")
    model = reduce_tokens(tiny_model(), LTMPConfig())
    save_thresholds(model, tmp_path / "before.safetensors")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "fc1", "fc2"], r=2))
    save_thresholds(model, tmp_path / "after.safetensors")
    for name in ("before", "after"):
        load_thresholds(model, tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "0.65"}, "target must be the share"),
        ({"target": 0.7, "merge_share": "0.8"}, "merge_share must lie between"),
        ({"target": 0.7, "first_layer": 1.5}, "first_layer must be the index of a layer"),
    ],
)
def test_calibration_takes_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(reduce_tokens(tiny_model(), LTMPConfig()), tiny_images(), **options)
    with pytest.raises(ValueError, match="target must be above 0"):
        LTMPConfig(target=0)


def test_calibration_keeps_the_closest_share(monkeypatch, caplog):
    """Where the share jumps over the target, the last try may be on the farther side."""
    model, images = reduce_tokens(tiny_model(), LTMPConfig()), tiny_images(1)
    tried = []

    def shares(*arguments):
        tried.append(shares_kept(*arguments))
        return tried[-1]

    monkeypatch.setattr("hf_tokenreduce.methods.ltmp.shares_kept", shares)
    for target in (0.62, 0.66, 0.7, 0.74, 0.78):
        tried.clear()
        kept = calibrate(model, images, target, tolerance=1e-6)
        assert abs(kept - target) == min(abs(share.item() - target) for share in tried)
        counts = model(images, output_patch_map=True).token_counts
        assert shares_kept(model.config, counts, 65, model.config.reduction).item() == pytest.approx(kept)
    assert "is the closest" in caplog.text
