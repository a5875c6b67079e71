"""`TokenReduceTrainer`: every method learns, resumes to the same state, and leaves a folder that loads."""

import json

import pytest
import torch
from helpers import METHODS, NEWER, ONE_OF_EACH, tiny_images, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_tokenreduce import BATConfig, EViTConfig, LTMPConfig, SiTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.methods import METHODS as DESCRIBED
from hf_tokenreduce.training import TokenReduceTrainer, TokenReduceTrainingArguments, recipe
from hf_tokenreduce.training.trainer import REVERSE, _without_adapter


ROWS = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(tiny_images(16))]


def gentle(stock):
    """With weights from which a small model learns in a few steps."""
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(0.3)
    return stock


def arguments(folder, method="tome", **changes):
    values = {
        **recipe(method),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 6,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TokenReduceTrainingArguments(str(folder), **{**values, **changes})


def trainer_for(folder, method, setting=None, **changes):
    model = reduce_tokens(gentle(tiny_model()), METHODS[method][0] if setting is None else setting)
    if method == "ltmp" and setting is None:
        with torch.no_grad():
            for layer in model.vit.layers:
                layer.reducer.merge_threshold.fill_(0.9)
                layer.reducer.prune_threshold.fill_(0.012)
    names = ("teacher_model", "eval_dataset", "compute_loss_func", "compute_metrics")
    others = {name: changes.pop(name) for name in names if name in changes}
    return TokenReduceTrainer(model, arguments(folder, method, **changes), train_dataset=ROWS, **others)


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("method", [name for name in ONE_OF_EACH if name not in NEWER])
def test_every_recipe_lowers_the_loss_and_moves_what_it_should(tmp_path, method):
    changes = (
        {"learning_rate": 3e-3} if method != "ltmp" else {"merge_learning_rate": 0.05, "prune_learning_rate": 1e-4}
    )
    setting = METHODS["dlvit-share"][0] if method == "dlvit" else None
    trainer = trainer_for(tmp_path, method, setting, num_train_epochs=20, **changes)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    seen = losses(trainer, "auxiliary_loss" if method == "ltmp" else "task_loss" if method == "sit" else "loss")
    assert sum(seen[-4:]) < 0.85 * sum(seen[:4])
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    learned = {name for name in before if ".reducer." in name}
    if method == "ltmp":
        assert moved == learned
    elif method == "dlvit":
        assert not moved & learned and moved
    else:
        assert moved >= learned and len(moved) > 40
    last = trainer.state.log_history[-2]
    assert 0 < last["multiply_adds_share"] < 1
    assert last["tokens/layer_3"] <= last["tokens/layer_0"] <= 65
    assert last["tokens/layer_3"] < 65


@pytest.mark.parametrize("method", ["evit", "sit", "ats", "ltmp"])
def test_resumed_is_uninterrupted(tmp_path, method):
    changes = {"keep_rate_warmup": 0.7} if method == "evit" else {}
    plan = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine", **changes}
    if method == "evit":
        plan["save_steps"] = 3
    whole = trainer_for(tmp_path / "whole", method, **plan)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", method, **plan)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{plan['save_steps']}"))
    theirs = whole.model.state_dict()
    assert resumed.model.state_dict().keys() == theirs.keys()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert losses(resumed)[-2:] == losses(whole)[-2:]


def test_what_is_saved_loads_without_the_way_back(tmp_path):
    trainer = trainer_for(tmp_path, "sit", max_steps=4, save_strategy="steps", save_steps=2, eval_dataset=ROWS)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    assert (folder / "reverse_slimming.safetensors").is_file()
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert not hasattr(trainer.model, "reverse_slimming")
    torch.testing.assert_close(model.eval()(tiny_images()).logits, trainer.model.eval()(tiny_images()).logits)
    assert trainer.predict(ROWS).predictions.shape == (16, 5)


def test_learning_rates_of_their_own(tmp_path):
    trainer = trainer_for(tmp_path, "ltmp", freeze_backbone=False, learning_rate=1e-4, optim="adamw_torch")
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    reducer = trainer.model.vit.layers[2].reducer
    assert rates[id(reducer.merge_threshold)] == 5e-3 and rates[id(reducer.prune_threshold)] == 2e-6
    assert rates[id(trainer.model.vit.layers[2].mlp.fc1.weight)] == 1e-4
    assert len(rates) == len(list(trainer.model.parameters()))


def test_a_checkpoint_finds_its_parameters_by_their_places(tmp_path):
    """Those of the token decoder are in the order of the model, whether they decay or not."""
    found = []

    class Watched(TokenReduceTrainer):
        def create_optimizer(self, *given):
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for group in super().create_optimizer(*given).param_groups:
                found.append([name for name in map(names.get, map(id, group["params"])) if REVERSE in name])
            return self.optimizer

    trainer = trainer_for(tmp_path, "sit", max_steps=1)
    trainer = Watched(trainer.model, trainer.args, train_dataset=ROWS)
    trainer.train()
    (names,) = filter(None, found)
    order = ["norm1.weight", "norm1.bias", "token_fc1.weight", "token_fc1.bias"]
    assert [name.split(".", 2)[2] for name in names[:4]] == order


def test_thresholds_stay_between_zero_and_one(tmp_path):
    trainer = trainer_for(tmp_path, "ltmp", LTMPConfig(target=0.1), merge_learning_rate=50.0, prune_learning_rate=50.0)
    trainer.train()
    thresholds = torch.stack([p.detach() for layer in trainer.model.vit.layers for p in layer.reducer.parameters()])
    assert thresholds.amin() == 0 and ((thresholds >= 0) & (thresholds <= 1)).all()


def test_keep_rates_warm_up(tmp_path):
    trainer = trainer_for(tmp_path, "bat", BATConfig(keep_rate=[0.5, 0.8], layers=(1, 2)), keep_rate_warmup=0.5)
    trainer.train()
    counts = [entry["tokens/layer_1"] for entry in trainer.state.log_history if "tokens/layer_1" in entry]
    assert counts[0] == 65 and counts[-1] == 33 and counts == sorted(counts, reverse=True) and len(set(counts)) > 3
    assert trainer.model.config.reduction == BATConfig(keep_rate=[0.5, 0.8], layers=(1, 2))


def test_a_warm_up_is_neither_evaluated_nor_saved(tmp_path):
    trainer = trainer_for(
        tmp_path, "evit", keep_rate_warmup=1.0, max_steps=3, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, eval_dataset=ROWS,
    )  # fmt: skip
    goal = trainer.model.config.reduction
    seen = []
    trainer.model.register_forward_pre_hook(lambda model, _: seen.append((model.training, model.config.reduction)))
    trainer.train()
    assert {reduction for training, reduction in seen if not training} == {goal}
    assert [reduction == goal for training, reduction in seen if training] == [False, False, False]
    for step in (1, 2, 3):
        saved = AutoModelForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert saved.config.reduction == goal
    assert trainer.model.config.reduction == goal


def test_a_teacher_by_any_name(tmp_path):
    stock = gentle(tiny_model())
    stock.save_pretrained(tmp_path / "teacher")
    distances = []
    for teacher in (None, stock, tmp_path / "teacher", str(tmp_path / "teacher")):
        trainer = trainer_for(tmp_path, "tome", logits_weight=1.0, max_steps=1, teacher_model=teacher)
        assert not any(p.requires_grad for p in trainer.teacher.parameters())
        trainer.train()
        distances.append(losses(trainer, "distillation_loss"))
    assert distances[0] == distances[1] == distances[2] == distances[3] and distances[0][0] > 0
    off = trainer_for(tmp_path, "tome", ToMeConfig(r=0), logits_weight=1.0, max_steps=1)
    off.train()
    assert losses(off, "distillation_loss")[0] == pytest.approx(0, abs=1e-5)


def test_soft_targets_and_smoothing(tmp_path):
    soft = [{**row, "labels": torch.full((5,), 0.1) + 0.5 * torch.eye(5)[row["labels"]]} for row in ROWS]
    trainer = trainer_for(tmp_path, "tome")
    batch = {"pixel_values": tiny_images(4), "labels": torch.tensor([0, 1, 2, 3])}
    smoothed = trainer_for(tmp_path, "tome", label_smoothing_factor=0.5)
    mixed = {**batch, "labels": torch.stack([row["labels"] for row in soft[:4]])}
    model = trainer.model.train()
    torch.testing.assert_close(smoothed.compute_loss(model, batch), trainer.compute_loss(model, mixed))
    assert smoothed.compute_loss(model.eval(), batch) == trainer.compute_loss(model.eval(), batch)


def test_wrong_settings(tmp_path):
    wrong = [
        (lambda: trainer_for(tmp_path, "tome", token_weight=1.0), "token_weight is for SiT"),
        (lambda: trainer_for(tmp_path, "sit", keep_rate_warmup=0.5), "keep_rate_warmup is for methods.*SiTConfig"),
        (lambda: trainer_for(tmp_path, "tome", keep_rate_warmup=0.5), "keep_rate_warmup is for methods.*ToMeConfig"),
        (lambda: trainer_for(tmp_path, "tome", freeze_backbone=True), "nothing to learn"),
        (lambda: trainer_for(tmp_path, "dlvit", freeze_backbone=True), "DLViTConfig has nothing to learn"),
        (lambda: trainer_for(tmp_path, "tome", teacher_model=tiny_model()), "would teach nothing"),
        (lambda: trainer_for(tmp_path, "tome", eval_dataset=[]), "eval_dataset is empty"),
        (
            lambda: trainer_for(tmp_path, "tome", logits_weight=1.0, teacher_model=tiny_model(num_labels=7)),
            "teacher's num_labels is 7, the model's 5",
        ),
        (
            lambda: trainer_for(tmp_path, "sit", teacher_model=tiny_model(num_hidden_layers=3)),
            "teacher's num_hidden_layers is 3, the model's 4",
        ),
        (
            lambda: trainer_for(tmp_path, "tome", logits_weight=1.0, teacher_model=tiny_model(image_size=16)),
            "teacher's image_size is 16, the model's 32",
        ),
        (
            lambda: trainer_for(tmp_path, "sit", teacher_model=tiny_model("deit")),
            "teacher's prefix tokens is 2, the model's 1",
        ),
        (
            lambda: trainer_for(tmp_path, "sit", teacher_model=reduce_tokens(tiny_model(), ToMeConfig(r=2))),
            "teacher of tokens must be dense, but this one is reduced by ToMeConfig",
        ),
        (
            lambda: TokenReduceTrainer(reduce_tokens(tiny_model("deit-teacher"), ToMeConfig()), arguments(tmp_path)),
            "WithTeacher is for inference",
        ),
        (lambda: trainer_for(tmp_path, "tome", compute_loss_func=print), "compute_loss_func would not be called"),
        (lambda: arguments(tmp_path, logits_weight=-1.0), "logits_weight.*-1"),
        (lambda: arguments(tmp_path, keep_rate_warmup=1.5), r"keep_rate_warmup.*1\.5"),
        (lambda: TokenReduceTrainer(tiny_model(), arguments(tmp_path)), "got a ViTForImageClassification"),
        (lambda: recipe("tomee"), "'tomee'.*ltmp"),
        (lambda: recipe("tome", "fast"), "paper or quick.*'fast'"),
    ]
    for attempt, message in wrong:
        with pytest.raises(ValueError, match=message):
            attempt()


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    trainer_for(tmp_path, "evit", max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=r"EViTConfig\(.*this model is reduced by ToMeConfig"):
        trainer_for(tmp_path, "tome").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_recipes_are_for_every_method_and_make_arguments(tmp_path):
    for method, variants in ((name, described.recipes) for name, described in DESCRIBED.items()):
        for variant in variants:
            values = {**recipe(method, variant), "report_to": [], "use_cpu": True}
            made = TokenReduceTrainingArguments(str(tmp_path), **values)
            assert made.num_train_epochs == values["num_train_epochs"]
            json.dumps(values)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    for method, setting in (("sit", SiTConfig(layers=(1,))), ("evit", EViTConfig(keep_rate=0.5, layers=(1,)))):
        trainer = trainer_for(
            tmp_path / method,
            method,
            setting,
            max_steps=4,
            learning_rate=0.02,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            eval_dataset=ROWS,
        )
        trainer.train()
        best = min(losses(trainer, "eval_loss"))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_accumulated_batches_learn_as_one(tmp_path):
    """LTMP's budget loss looks at all images of a step, however many batches they come in."""
    learned = []
    for batch, steps in ((8, 1), (4, 2), (2, 4)):
        trainer = trainer_for(
            tmp_path / str(batch),
            "ltmp",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
            merge_learning_rate=0.05,
            prune_learning_rate=1e-4,
        )
        trainer.train()
        learned.append({name: p for name, p in trainer.model.named_parameters() if p.requires_grad})
    for other in learned[1:]:
        for name, value in learned[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)
    assert any((p - 0.9).abs() > 1e-3 for name, p in learned[0].items() if "merge" in name)


def test_data_parallel_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, "ltmp")
    inputs = {name: torch.stack([row[name] for row in ROWS[:2]]) for name in ("pixel_values",)}
    with pytest.raises(ValueError, match=r"nn\.DataParallel .*accelerate launch"):
        trainer.compute_loss(torch.nn.DataParallel(trainer.model), {**inputs, "labels": torch.tensor([0, 1])})


@pytest.mark.parametrize("method", ["tome", "sit"])
def test_bfloat16_on_a_cpu_learns_as_float32(tmp_path, method):
    seen = {}
    for bf16 in (False, True):
        trainer = trainer_for(tmp_path / str(bf16), method, max_steps=8, bf16=bf16)
        trainer.train()
        trainer.save_model()
        seen[bf16] = torch.tensor(losses(trainer))
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / str(bf16))
        assert loaded.dtype == torch.float32 and loaded(tiny_images()).logits.isfinite().all()
    assert not torch.equal(seen[True], seen[False])  # it did compute in bfloat16
    torch.testing.assert_close(seen[True], seen[False], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression", "single_label_classification"])
def test_the_loss_is_that_of_the_models_own_problem(tmp_path, problem):
    trainer = trainer_for(tmp_path, "tome")
    model = trainer.model
    model.config.problem_type = problem
    labels = torch.tensor([0, 3, 1]) if problem.startswith("single") else (torch.rand(3, 5) > 0.5).float()
    inputs = {"pixel_values": tiny_images(), "labels": labels}
    torch.testing.assert_close(trainer.compute_loss(model, inputs), model(**inputs).loss)


def test_one_number_is_trained_by_its_square(tmp_path):
    model = reduce_tokens(tiny_model(num_labels=1), ToMeConfig(r=7))
    trainer = TokenReduceTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    inputs = {"pixel_values": tiny_images(), "labels": torch.tensor([0.5, 3.0, -1.0])}
    torch.testing.assert_close(trainer.compute_loss(model, inputs), model(**inputs).loss)


def test_a_model_that_was_trained_on_numbers_says_so(tmp_path):
    """A pipeline would make a probability of the number otherwise."""
    model = reduce_tokens(gentle(tiny_model(num_labels=1)), ToMeConfig(r=7))
    rows = [{"pixel_values": image, "labels": 0.5 * index} for index, image in enumerate(tiny_images(8))]
    trainer = TokenReduceTrainer(model, arguments(tmp_path, max_steps=1, save_strategy="no"), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.problem_type == "regression"


def test_a_frozen_backbone_learns_in_the_next_training(tmp_path):
    """The weights are those of the dense model, of which the next reduced model is made."""
    dense = gentle(tiny_model())
    model = reduce_tokens(dense, METHODS["ltmp"][0])
    before = dense.vit.layers[0].attention.q_proj.weight.clone()
    TokenReduceTrainer(model, arguments(tmp_path, "ltmp", max_steps=1), train_dataset=ROWS).train()
    assert torch.equal(dense.vit.layers[0].attention.q_proj.weight, before)
    assert all(parameter.requires_grad for parameter in dense.parameters())
    again = reduce_tokens(dense, METHODS["tome"][0])
    TokenReduceTrainer(again, arguments(tmp_path, max_steps=3), train_dataset=ROWS).train()
    assert not torch.equal(dense.vit.layers[0].attention.q_proj.weight, before)
    with pytest.raises(ValueError, match="No parameter of the model learns"):
        TokenReduceTrainer(again.requires_grad_(False), arguments(tmp_path), train_dataset=ROWS)


def test_a_teacher_takes_images_of_another_size_as_the_student_does(tmp_path):
    model = reduce_tokens(gentle(tiny_model()), METHODS["tome"][0])
    rows = [{"pixel_values": image, "labels": 1} for image in tiny_images(8, size=40)]

    def collate(some):
        pixels = torch.stack([row["pixel_values"] for row in some])
        labels = torch.tensor([row["labels"] for row in some])
        return {"pixel_values": pixels, "labels": labels, "interpolate_pos_encoding": True}

    plan = arguments(tmp_path, max_steps=1, logits_weight=1.0)
    trainer = TokenReduceTrainer(model, plan, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert losses(trainer, "distillation_loss")


@pytest.mark.parametrize("method", ["ltmp", "sit"])
def test_names_without_adapters_are_those_of_the_merged_model(method):
    model = reduce_tokens(tiny_model(), METHODS[method][0])
    names = {name for name, _ in model.named_parameters()}
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["reducer", "classifier"]))
    learned = {_without_adapter(name) for name, p in peft.named_parameters() if p.requires_grad and "lora" not in name}
    assert learned and learned <= names


def test_lora_with_accumulated_batches(tmp_path):
    """PEFT wraps the parts of a method. They still have the loss of their own."""
    reduced = reduce_tokens(gentle(tiny_model()), METHODS["ltmp"][0])
    thresholds = [f"layers.{layer}.reducer" for layer in range(4)]
    lora = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=thresholds)
    plan = arguments(tmp_path, "ltmp", max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer = TokenReduceTrainer(get_peft_model(reduced, lora), plan, train_dataset=ROWS)
    trainer.train()
    assert losses(trainer, "auxiliary_loss")


def test_saved_again_the_image_processor_stays(tmp_path):
    trainer = trainer_for(tmp_path, "tome")
    trainer.save_model()
    ViTImageProcessor().save_pretrained(tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    trainer.save_model()
    assert sorted(file.name for file in tmp_path.iterdir()) == before and "preprocessor_config.json" in before
