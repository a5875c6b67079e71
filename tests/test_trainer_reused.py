"""`TokenReduceTrainer` with a model that changes, shares its weights or has a half type; labels that do not fit."""

import json

import pytest
import torch
from helpers import METHODS, tiny_images, tiny_model
from test_training import ROWS, arguments, gentle, losses, trainer_for

from hf_tokenreduce import BATConfig, LTMPConfig, SiTConfig, ToMeConfig, calibrate, reduce_tokens, restore
from hf_tokenreduce.training import Collator, TokenReduceTrainer
from hf_tokenreduce.training.losses import task_loss
from hf_tokenreduce.training.origin import last_checkpoint


@pytest.mark.parametrize("restored", [False, True])
def test_a_teacher_with_the_weights_of_the_model_freezes_nothing(tmp_path, restored):
    """`reduce_tokens` and `restore` give models around the same weights."""
    dense = gentle(tiny_model())
    model = reduce_tokens(dense, ToMeConfig(r=7))
    teacher = restore(model) if restored else dense
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    options = arguments(tmp_path, logits_weight=1.0, max_steps=2, learning_rate=1e-2)
    trainer = TokenReduceTrainer(model, options, train_dataset=ROWS, teacher_model=teacher)
    trainer.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    moved = {name for name, value in dense.state_dict().items() if not torch.equal(value, before[name])}
    assert len(moved) > 40
    for name, value in trainer.teacher.state_dict().items():  # it still teaches what the model was
        assert torch.equal(value, before[name]), name


def test_a_reduction_that_is_set_later_stays(tmp_path):
    trainer = trainer_for(tmp_path, "tome", ToMeConfig(r=7), eval_dataset=ROWS, max_steps=1)
    for r in (2, 12):
        trainer.model.set_reduction(ToMeConfig(r=r))
        seen = []
        handle = trainer.model.register_forward_pre_hook(
            lambda model, _, seen=seen: seen.append(model.config.reduction)
        )
        trainer.evaluate()
        handle.remove()
        assert set(seen) == {ToMeConfig(r=r)}
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["reduction"]["r"] == 12


def test_a_warm_up_falls_to_the_rate_that_was_set_later(tmp_path):
    trainer = trainer_for(tmp_path, "bat", BATConfig(keep_rate=0.5, layers=(1,)), keep_rate_warmup=0.5, max_steps=8)
    trainer.model.set_reduction(BATConfig(keep_rate=0.8, layers=(1,)))
    for _ in range(2):
        trainer.train()
        counts = losses(trainer, "tokens/layer_1")
        assert counts[0] == 65 and counts[-1] == 53
        assert trainer.model.config.reduction == BATConfig(keep_rate=0.8, layers=(1,))


def test_thresholds_that_are_calibrated_after_the_trainer_was_made_stay(tmp_path):
    model = reduce_tokens(gentle(tiny_model()), LTMPConfig())
    options = arguments(tmp_path, "ltmp", max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = TokenReduceTrainer(model, options, train_dataset=ROWS, eval_dataset=ROWS)
    calibrate(model, tiny_images(16), 0.65)
    thresholds = [parameter for layer in model.vit.layers for parameter in layer.reducer.parameters()]
    calibrated = [parameter.item() for parameter in thresholds]
    trainer.train()
    now = [parameter for layer in model.vit.layers for parameter in layer.reducer.parameters()]
    assert all(one is other for one, other in zip(now, thresholds, strict=True))
    assert 0.3 < losses(trainer, "multiply_adds_share")[-1] < 0.95
    assert any(parameter.item() != value for parameter, value in zip(now, calibrated, strict=True))


def test_train_may_be_called_again(tmp_path):
    """The token decoder of the training before is no longer in the optimizer."""
    plan = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = trainer_for(tmp_path / "whole", "sit", **plan)
    whole.train()
    again = trainer_for(tmp_path / "again", "sit", **plan)
    again.train()
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert len(again.optimizer.param_groups) == len(whole.optimizer.param_groups)


def test_tokens_are_distilled_in_a_half_type(tmp_path):
    model = reduce_tokens(gentle(tiny_model()).to(torch.bfloat16), SiTConfig(keep_rate=0.5, layers=(1,)))
    options = arguments(tmp_path, "sit", max_steps=2)
    trainer = TokenReduceTrainer(model, options, train_dataset=ROWS)
    trainer.train()
    assert all(0 < loss < 1e3 for loss in losses(trainer, "token_loss"))


def test_labels_that_do_not_fit_the_head():
    model = reduce_tokens(tiny_model(), None)
    logits, several = torch.randn(2, 5), torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"do not add up to 1.*problem_type = 'multi_label_classification'"):
        task_loss(logits, several, model.config)
    model.config.problem_type = "multi_label_classification"
    assert task_loss(logits, several, model.config) > 0
    with pytest.raises(ValueError, match=r"of shape \(2, 5\), got \(2,\).*'single_label_classification'"):
        task_loss(logits, torch.tensor([0, 1]), model.config)


def test_several_labels_may_be_tensors():
    rows = [{"pixel_values": tiny_images(1)[0], "labels": labels} for labels in (torch.eye(3)[0], torch.ones(3))]
    assert torch.equal(Collator()(rows)["labels"], torch.stack([row["labels"] for row in rows]))
    assert Collator()([{**rows[0], "labels": 2}])["labels"].tolist() == [2]


def test_a_model_is_given(tmp_path):
    for model, more in ((None, {}), (reduce_tokens(tiny_model(), None), {"model_init": tiny_model})):
        with pytest.raises(ValueError, match=r"Give a model\. model_init is not supported"):
            TokenReduceTrainer(model, arguments(tmp_path), train_dataset=ROWS, **more)


def test_the_newest_checkpoint_is_one_with_a_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-56", "checkpoint-best", "checkpoint-100"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-100":  # which was not written whole
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-56"


def test_adapters_of_a_training_do_not_stay_beside_the_merged_model(tmp_path):
    """`from_pretrained` would load them on top of it."""
    model = reduce_tokens(tiny_model(), METHODS["tome"][0])
    trainer = TokenReduceTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    trainer.save_model()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    trainer.save_model()
    assert not list(tmp_path.glob("adapter_*")) and (tmp_path / "model.safetensors").is_file()
