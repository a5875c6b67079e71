"""`Method`: all that the rooms of this package ask of a method. What runs in a model is its file in `modeling/`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..modeling.configuration_base import KeepRateConfig, ReductionConfig
from ..modeling.encoders import EncoderFacts


# Fine-tuning after EViT's of DeiT, which BAT's logs follow; its batch of 512 is that of all devices together.
FINE_TUNE: dict[str, Any] = {
    "num_train_epochs": 30,
    "per_device_train_batch_size": 512,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "weight_decay": 1e-6,
    "optim": "adamw_torch",
}
QUICK_FINE_TUNE: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "optim": "adamw_torch",
}
RECIPES: Mapping[str, Mapping[str, Any]] = {"paper": FINE_TUNE, "quick": QUICK_FINE_TUNE}


@dataclass(frozen=True)
class Method:
    """Describe a method to the rest of the package.

    Args:
        config_class: Its configuration. `config_class.method` is the name by which it is asked for.
        title: Its name as its authors write it.
        family: What it does with tokens, in a word or two.
        summary: What it does, in a few sentences, for model cards and pages.
        paper, arxiv: Where it comes from, or None.
        details: How it works, for its page in the documentation.
        limits: What it cannot do, for that page.
        ours: What in it is a decision of this library.
        needs: What it must have before it reduces as it is set: "nothing", unlabelled "images" or "labels".
        is_adaptive: Whether a setting lets images keep different numbers of tokens.
        at_share: The setting that keeps a share of the multiply-adds, given the encoder's facts, the share and further
            settings. None: no setting does.
        fit_share: Instead of `at_share`: the setting that keeps a share on images, given a model that reduces nothing,
            pixel values, the share and further settings.
        untrained: The settings that a comparison tries on a checkpoint as it is, given facts and shares. None: those
            at the shares.
        prepare: What it learns from unlabelled images: given a reduced model, pixel values and a target, it fits the
            model and returns the share of the multiply-adds that it then keeps.
        learn_from_labels: What it learns from labelled images before it is trained: given a reduced model, a data
            set, a folder to work in, the image processor and options.
        why_not: Why a setting cannot run yet and what to do, or None.
        recipes: Arguments of `TokenReduceTrainingArguments`, by the name of the recipe: "paper", "quick", and "demo"
            where the demonstration's small model is trained.
        paper_recipe: Where the values of the "paper" recipe are from, and which are a decision of this library.
        callbacks: What its training needs besides, given the model.
        token_decoder: Modules that bring its tokens back to all patches, to be compared with a teacher's; given the
            model.
        keep_rate_may_change: Whether its `keep_rate` can change while it trains.
        any_image_size: Whether it runs on images of another size than the model's own.
        key_settings: The settings that a share decides, and that name a setting in tables.
        shown_settings: The settings that a page shows. None: all.
        learned_numbers: Numbers that it has learned, one per layer, by what they are called; given the model.
        gathers_the_rest: Whether a token of many patches holds what would else be dropped.
        tuned_settings: Values that the tuner tries of further settings, one at a time, besides the method's own. It
            tries layers anyway where the method has a choice of them. None: the tuner leaves the method out, because
            it must be trained before it is of use.
        at_counts: The setting that leaves given numbers of patch tokens after the layers, and else is like a given
            one; given the encoder's facts, that setting and the numbers. None: by its `r` or its `keep_rate`, if it
            has one of the two.
    """

    config_class: type[ReductionConfig]
    title: str
    family: str
    summary: str
    paper: str | None = None
    arxiv: str | None = None
    details: str = ""
    limits: str = ""
    ours: str = ""
    needs: str = "nothing"
    is_adaptive: Callable[[Any], bool] = lambda config: False
    at_share: Callable[..., ReductionConfig] | None = None
    fit_share: Callable[..., ReductionConfig] | None = None
    untrained: Callable[[EncoderFacts, Sequence[float]], list[ReductionConfig]] | None = None
    prepare: Callable[..., float] | None = None
    learn_from_labels: Callable[..., Any] | None = None
    why_not: Callable[[Any], str | None] = lambda config: None
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: RECIPES)
    paper_recipe: str = (
        "All values are our own: this is the fine-tuning that the authors of EViT and BAT gave DeiT, so that methods "
        "are compared on one schedule."
    )
    callbacks: Callable[[PreTrainedModel], list[TrainerCallback]] = lambda model: []
    token_decoder: Callable[[PreTrainedModel], nn.ModuleDict] | None = None
    keep_rate_may_change: bool = False
    any_image_size: bool = True
    key_settings: tuple[str, ...] = ("keep_rate",)
    shown_settings: tuple[str, ...] | None = None
    learned_numbers: Callable[[PreTrainedModel], dict[str, list[float]]] = lambda model: {}
    gathers_the_rest: bool = False
    tuned_settings: Mapping[str, Sequence[Any]] | None = field(default_factory=dict)
    at_counts: Callable[[EncoderFacts, Any, Sequence[int]], ReductionConfig] | None = None

    @property
    def name(self) -> str:
        return str(self.config_class.method)

    @property
    def takes_layers(self) -> bool:
        """Whether one can choose which layers reduce, when a setting for a share is asked for."""
        given = set() if self.at_share is None else set(inspect.signature(self.at_share).parameters)
        return "layers" in given | {one.name for one in fields(self.config_class)}


def spread_layers(facts: EncoderFacts, *of_twelve: int) -> tuple[int, ...]:
    """Layers of a model of 12 layers, moved in proportion to one of another depth."""
    return tuple(sorted({layer * facts.num_hidden_layers // 12 for layer in of_twelve}))


def by_keep_rate(config_class: type[KeepRateConfig], *of_twelve: int) -> Callable[..., ReductionConfig]:
    """`at_share` of a method that keeps a rate of the tokens in some layers."""

    def at_share(facts: EncoderFacts, share: float, **settings: Any) -> ReductionConfig:
        return config_class.for_budget(facts, share, **{"layers": spread_layers(facts, *of_twelve), **settings})

    return at_share
