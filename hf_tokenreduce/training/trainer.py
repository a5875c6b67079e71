"""`TokenReduceTrainer`: the `Trainer` of transformers, extended for reduced models."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..files import model_folder
from ..methods import METHODS, method_of
from ..methods.token_decoder import restore_hidden_states
from ..modeling.encoders import encoder_of, facts_of
from ..modeling.hooks import Reducer
from ..modeling.methods import parse_reduction
from ..modeling.multiply_adds import shares_kept
from ..tasks import facts_on
from .arguments import TokenReduceTrainingArguments
from .augmentation import Collator
from .callbacks import WarmUpKeepRate
from .losses import distillation_loss, task_loss, token_loss
from .teacher import teacher_of


REVERSE_FILE = "reverse_slimming.safetensors"
REDUCTION_FILE = "reduction.json"
MOST_UNREAD = 64  # batches whose token counts stay on the device, because reading them waits for it
REVERSE = "reverse_slimming"  # attribute of the model that holds the token decoder during training; prefix of its keys

logger = logging.get_logger(__name__)


class TokenReduceTrainer(Trainer):
    """Train a reduced model: the `Trainer` of transformers, with these additions.

    - Thresholds and SiT's token decoder have their own learning rates.
    - Thresholds are clamped to [0, 1] after every step.
    - A frozen teacher can be distilled into the model.
    - The keep rate can fall from 1 to its value over the first steps.
    - Labels may be class indices (B,), or probabilities (B, C), as mixup makes them. Several labels per image and
      regression are trained too, as the model's `problem_type` says.
    - The logs show each part of the loss, the mean number of tokens per layer, and the share of the multiply-adds.

    Args:
        model: A reduced model, also inside a PEFT model. `reduce_tokens(model, None)` makes one that reduces nothing,
            for a dense baseline.
        args: The training arguments.
        *others: Further positional arguments of `Trainer`.
        teacher_model: The teacher: a model, a folder or a Hub id. Give one only if `args.logits_weight` or
            `args.token_weight` is set. None: the model as it is when training begins, without its reduction.
        **settings: Further keyword arguments of `Trainer`.

    Example:
        >>> args = TokenReduceTrainingArguments("out", **recipe("tome"), remove_unused_columns=False)
        >>> trainer = TokenReduceTrainer(
        ...     reduce_tokens(model, ToMeConfig(r=8)), args, train_dataset=train, data_collator=Collator()
        ... )
        >>> trainer.train()
    """

    data_collator: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: TokenReduceTrainingArguments,
        *others: Any,
        teacher_model: PreTrainedModel | str | Path | None = None,
        **settings: Any,
    ):
        if model is None or settings.get("model_init") is not None:
            raise ValueError("Give a model. model_init is not supported: make a trainer for each model instead.")
        if not isinstance(args, TokenReduceTrainingArguments):
            raise ValueError(f"args must be TokenReduceTrainingArguments, got a {type(args).__name__}.")
        reduced = _reduced_model(model)
        reduction = reduced.config.reduction
        if not hasattr(reduced, "classifier"):
            raise ValueError(
                f"A {type(reduced).__name__} is for inference: it has no loss. Train a model with one head."
            )
        if settings.get("compute_loss_func") is not None:
            raise ValueError(
                "TokenReduceTrainer computes its own losses, so compute_loss_func would not be called. Leave it out."
            )
        for name in ("train_dataset", "eval_dataset"):
            dataset = settings.get(name)
            if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
                raise ValueError(f"{name} is empty. Check the folder or the split it was loaded from.")
        method = method_of(reduction)
        if args.token_weight and method.token_decoder is None:
            able = ", ".join(known.title for known in METHODS.values() if known.token_decoder is not None)
            raise ValueError(
                f"token_weight is for {able}, which has a token decoder. Use logits_weight to distill other methods."
            )
        if args.keep_rate_warmup and not method.keep_rate_may_change:
            raise ValueError(
                "keep_rate_warmup is for methods whose keep_rate can change during training ("
                f"{', '.join(known.title for known in METHODS.values() if known.keep_rate_may_change)}), got "
                f"{type(reduction).__name__}. Set keep_rate_warmup to 0."
            )
        learned = [p for reducer in encoder_of(reduced).reducers for p in reducer.parameters()]
        if args.freeze_backbone:
            if not learned or method.learn_from_labels is not None:  # that was before the training
                raise ValueError(
                    f"With freeze_backbone, {type(reduction).__name__} has nothing to learn. Set it to False."
                )
        elif not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("No parameter of the model learns. Call model.requires_grad_() before the training.")
        self.teacher = teacher_of(reduced, args, teacher_model)
        self._warm_up = WarmUpKeepRate(reduced, args.keep_rate_warmup) if args.keep_rate_warmup else None
        self._kept_in_step: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._unread: list[tuple[Tensor, int, Any]] = []
        self._batches = 0
        self._scalars: set[str] = set()  # names of parameters that FSDP and DeepSpeed train as vectors
        if args.ddp_find_unused_parameters is None and learned:
            # Trainer would say no if there is gradient checkpointing, but DL-ViT's fitted filter has no gradient.
            args.ddp_find_unused_parameters = True
        super().__init__(model, args, *others, **settings)
        self.model_accepts_loss_kwargs = False  # our losses are means over the batch; Trainer divides them
        if self.teacher is not None:
            self.teacher.to(self.args.device)
        for callback in method.callbacks(reduced):
            self.add_callback(callback)
        if self._warm_up is not None:
            self.add_callback(self._warm_up)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        reduced = _reduced_model(self.model)
        reduced.config.__dict__.pop("calibrated_share", None)  # training changes what was calibrated
        if reduced.config.problem_type is None and reduced.config.num_labels == 1:
            reduced.config.problem_type = "regression"  # as the loss of transformers does; pipelines read it
        with self._frozen():
            return self._train(reduced, *args, **kwargs)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Temporarily freeze the backbone, if it shall not learn. It may be that of other models too."""
        learned = {id(p) for reducer in encoder_of(_reduced_model(self.model)).reducers for p in reducer.parameters()}
        before = [(p, p.requires_grad) for p in self.model.parameters()] if self.args.freeze_backbone else []
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in learned)
        try:
            yield
        finally:
            for parameter, learns in before:
                parameter.requires_grad_(learns)

    def _train(self, reduced: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self._scalars |= _make_scalars_vectors(self.model)
        token_decoder = method_of(reduced.config.reduction).token_decoder if self.args.token_weight else None
        if token_decoder is None:
            try:
                return super().train(*args, **kwargs)
            finally:
                if self._warm_up is not None:  # training may have stopped in the midst of it
                    self._warm_up.end()
        reverse = token_decoder(reduced)
        setattr(reduced, REVERSE, reverse)
        hook = restore_hidden_states(reduced, reverse)
        try:
            return super().train(*args, **kwargs)
        finally:  # the token decoder is not part of the model
            hook.remove()
            delattr(reduced, REVERSE)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        rates = {
            "merge_threshold": self.args.merge_learning_rate,
            "prune_threshold": self.args.prune_learning_rate,
            REVERSE: self.args.learning_rate * self.args.reverse_learning_rate_factor,
        }
        special: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in (self.model if model is None else model).named_parameters():
            for part, rate in rates.items():
                if part in name.split(".") and rate is not None and parameter.requires_grad:
                    special[part].append(parameter)
        special_ids = {id(parameter) for parameters in special.values() for parameter in parameters}
        # If `train` is called again, the token decoder of the training before is still in the optimizer.
        known = {id(parameter) for parameter in (self.model if model is None else model).parameters()}
        usual = known - special_ids
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in known:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in usual]
        for part, parameters in special.items():
            decay = self.args.weight_decay if part == REVERSE else 0.0
            optimizer.add_param_group({"params": parameters, "lr": rates[part], "weight_decay": decay})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_its_goal():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_its_goal():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _at_its_goal(self) -> Iterator[None]:
        """Temporarily end the warm-up of the keep rate, to evaluate and save the model that was asked for."""
        reduced = _reduced_model(self.model)
        warm, goal = reduced.config.reduction, None if self._warm_up is None else self._warm_up.goal
        if goal is None or warm == goal:
            yield
            return
        reduced.set_reduction(goal)
        try:
            yield
        finally:
            reduced.set_reduction(warm)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._unmixed():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._unmixed():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _unmixed(self) -> Iterator[None]:
        """Temporarily use a collator that does not mix: `Trainer` has only one, and evaluation must not mix images."""
        given: Any = self.data_collator
        if isinstance(given, Collator):
            self.data_collator = Collator()
        try:
            yield
        finally:
            self.data_collator = given

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Also measure what all batches of a step keep.

        A loss that is not linear in the kept share needs the share of the whole step before the first batch is
        learned from. So if a step has several batches, they go through the model once more.
        """
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, kept = samples[0], []
        self._kept_in_step = None
        if len(batches) > 1 and _has_own_loss(_reduced_model(self.model)):
            with torch.no_grad():
                for batch in batches:
                    inputs = {name: value for name, value in self._prepare_inputs(batch).items() if name != "labels"}
                    shares = self.model.train()(**inputs).kept_shares
                    if shares is None:
                        return samples
                    kept.append((len(next(iter(inputs.values()))), shares))
            images = sum(count for count, _ in kept)
            self._kept_in_step = sum(count * shares for count, shares in kept) / images
        return samples

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if isinstance(model, nn.DataParallel) and model.training:
            raise ValueError(
                "nn.DataParallel splits each batch, but some losses need the whole batch. Launch one process per "
                "device instead, by accelerate launch or torchrun."
            )
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(
                "The batch has no labels. Check the columns of the data set, and set remove_unused_columns=False."
            )
        learning = model.training
        if learning and self.args.token_weight:
            inputs["output_hidden_states"] = True
        outputs = model(**inputs)
        smoothing = self.args.label_smoothing_factor if learning else 0.0
        reduced = _reduced_model(model)
        parts = {"task_loss": task_loss(outputs.logits, labels, reduced.config, smoothing)}
        if learning:
            num_tokens = facts_on(reduced, inputs[reduced.main_input_name]).num_tokens
            parts |= self._method_losses(reduced, inputs, outputs, num_tokens)
            self._record(parts, outputs.token_counts, num_tokens)
        loss = torch.stack(list(parts.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def _method_losses(
        self, reduced: PreTrainedModel, inputs: dict[str, Any], outputs: Any, num_tokens: int
    ) -> dict[str, Tensor]:
        parts = {}
        if outputs.kept_shares is not None:
            # The loss is not linear in the kept share, so its value needs the images of all ranks. The gradient flows
            # through the images of this rank only.
            kept = outputs.kept_shares
            in_step = kept.detach() if self._kept_in_step is None else self._kept_in_step
            everywhere = self.accelerator.reduce(in_step.clone(), "mean")
            kept = kept + (everywhere - kept.detach())
            parts["auxiliary_loss"] = encoder_of(reduced).reducers[0].auxiliary_loss(kept, num_tokens)
        if self.teacher is None:
            return parts
        with torch.no_grad():
            given = inputs[reduced.main_input_name]
            size = {name: value for name, value in inputs.items() if name == "interpolate_pos_encoding"}
            teacher_outputs = self.teacher(given, output_hidden_states=bool(self.args.token_weight), **size)
        if self.args.logits_weight:
            distance = distillation_loss(
                outputs.logits,
                teacher_outputs.logits,
                self.args.distillation_temperature,
                reduced.config.problem_type,
            )
            parts["distillation_loss"] = self.args.logits_weight * distance
        if self.args.token_weight:
            prefix = facts_of(reduced.config).num_prefix_tokens
            student_tokens, teacher_tokens = (
                [hidden[:, prefix:] for hidden in output.hidden_states[1:]] for output in (outputs, teacher_outputs)
            )
            parts["token_loss"] = self.args.token_weight * token_loss(student_tokens, teacher_tokens)
        return parts

    def _record(self, parts: dict[str, Tensor], token_counts: Tensor, num_tokens: int) -> None:
        if len(parts) > 1:
            self._add({name: part.detach() for name, part in parts.items()})
        self._batches += 1
        self._unread.append((token_counts, num_tokens, _reduced_model(self.model).config.reduction))
        if len(self._unread) == MOST_UNREAD:
            self._read_counts()

    def _read_counts(self) -> None:
        """Add what the batches since the last call kept."""
        config = _reduced_model(self.model).config
        for token_counts, num_tokens, reduction in self._unread:
            counts = token_counts.cpu()
            self._add({"multiply_adds_share": shares_kept(config, counts, num_tokens, reduction).mean()})
            self._add({f"tokens/layer_{layer}": count for layer, count in enumerate(counts.float().mean(dim=0))})
        self._unread.clear()

    def _add(self, seen: dict[str, Tensor]) -> None:
        for name, value in seen.items():
            value = value.float().to(self.args.device)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._batches:
            self._read_counts()
            means = self.accelerator.reduce(torch.stack(list(self._sums.values())) / self._batches, "mean").tolist()
            logs = {**logs, **{name: round(mean, 6) for name, mean in zip(self._sums, means, strict=True)}}
            self._sums, self._batches = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # two processes must not replace the files of one folder
            return super()._save(output_dir, state_dict)
        reverse = {}  # the token decoder, which gets a file of its own
        if self._scalars or getattr(_reduced_model(self.model), REVERSE, None) is not None:
            everything = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {}
            for name, value in everything.items():
                if REVERSE in name.split("."):
                    reverse[name.split(f"{REVERSE}.")[-1]] = value.contiguous()
                else:
                    state_dict[name] = value.reshape(()) if _without_adapter(name) in self._scalars else value
        with self._at_its_goal(), model_folder(output_dir or self.args.output_dir, of_processor=False) as place:
            super()._save(str(place), state_dict)
            if reverse:
                save_file(reverse, place / REVERSE_FILE)
            if not (place / "config.json").is_file():  # the adapters of LoRA have none
                now = _reduced_model(self.model).config.reduction
                (place / REDUCTION_FILE).write_text(json.dumps({"reduction": now and now.to_dict()}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        reduced = _reduced_model(self.model)
        told = next((file for file in (folder / "config.json", folder / REDUCTION_FILE) if file.is_file()), None)
        if told is not None:
            saved = parse_reduction(json.loads(told.read_text()).get("reduction"))
            own = reduced.config.reduction
            if saved != own:
                raise ValueError(
                    f"{folder} is a checkpoint of {saved}, but this model is reduced by {own}. Resume with the same "
                    "setting, or start again in another output_dir."
                )
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {folder} are cut short or broken ({error}). Resume from an earlier checkpoint."
            ) from error
        if self.args.token_weight and not self.is_fsdp_enabled:  # FSDP has loaded the token decoder with the model
            if not (folder / REVERSE_FILE).is_file():
                raise ValueError(
                    f"{folder} was trained without token_weight, so it has no token decoder. Start again."
                )
            getattr(reduced, REVERSE).load_state_dict(load_file(folder / REVERSE_FILE))


def _make_scalars_vectors(model: nn.Module) -> set[str]:
    """Turn parameters of shape () into shape (1,), for FSDP and DeepSpeed. Return their names.

    Neither of them can train a scalar.
    """
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    for name in scalars:
        module, _, own = name.rpartition(".")
        parameter = model.get_parameter(name)
        vector = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(module), own, vector)
    return {_without_adapter(name) for name in scalars}


def _without_adapter(name: str) -> str:
    """Return the name that a parameter of a PEFT model has after the adapters are merged."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")


def _has_own_loss(reduced: PreTrainedModel) -> bool:
    own: Any = encoder_of(reduced).reducers[0].auxiliary_loss  # of the instance, which PEFT may have wrapped
    return own.__func__ is not Reducer.auxiliary_loss


def _reduced_model(model: Any) -> Any:
    """Return the reduced model inside its wrappers, such as PEFT, compiled or parallel models."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(inner, "get_base_model"):  # PEFT
        inner = inner.get_base_model()
    if not hasattr(inner.config, "reduction"):
        raise ValueError(
            f"TokenReduceTrainer trains reduced models, got a {type(inner).__name__}. Reduce it first by "
            "reduce_tokens(model, ...), with None for a dense baseline."
        )
    return inner
