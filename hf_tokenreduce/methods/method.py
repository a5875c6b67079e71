"""`Method`: all that the rest of the package needs to know of a method. What runs in a model is in `modeling/`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..modeling.configuration_base import KeepRateConfig, ReductionConfig
from ..modeling.encoders import EncoderFacts


# EViT's fine-tuning of DeiT, which BAT's logs follow too. The batch of 512 is that of all devices together.
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
        config_class: Its configuration class. `config_class.method` is the name of the method.
        title: Its name as its authors write it.
        family: What it does with tokens, in a word or two.
        summary: What it does, in a few sentences, for model cards and pages.
        paper: Title of its paper, or None.
        arxiv: arXiv number of its paper, or None.
        details: How it works, for its page in the documentation.
        limits: What it cannot do, for that page.
        ours: Which decisions in it are those of this library, for that page and the table of methods.
        needs: What it must have before it reduces as it is set: "nothing", unlabelled "images" or "labels".
        is_adaptive: `is_adaptive(config)` returns whether images keep different numbers of tokens.
        at_share: `at_share(facts, share, **settings)` returns the setting that keeps a share of the multiply-adds.
            `facts` are those of the encoder. None: no setting does.
        fit_share: `fit_share(model, pixel_values, share, **settings)` returns the setting that keeps a share on these
            images, if `at_share` is None. The model reduces nothing.
        untrained: `untrained(facts, shares)` returns the settings that a comparison tries on a checkpoint as it is.
            None: the settings that keep these shares.
        prepare: `prepare(model, pixel_values, target, **options)` fits a reduced model to unlabelled images, and
            returns the share of the multiply-adds that it then keeps. None: the method learns nothing from them.
        learn_from_labels: `learn_from_labels(model, dataset, folder, image_processor, **options)` fits a reduced model
            to labelled images before it is trained. `folder` is for its files. None: the method learns nothing from
            them.
        why_not: `why_not(config)` returns why a setting cannot run yet and what to do, or None.
        recipes: Arguments of `TokenReduceTrainingArguments` for each recipe: "paper", "quick", and "demo" if the
            demonstration trains its small model by this method.
        paper_recipe: Where the values of the "paper" recipe come from, and which of them this library chose.
        callbacks: `callbacks(model)` returns the callbacks that its training needs.
        token_decoder: `token_decoder(model)` returns modules that turn its tokens into one per patch, to compare them
            with a teacher's. None: it needs none.
        keep_rate_may_change: Whether its `keep_rate` can change during training.
        any_image_size: Whether it runs on images of another size than the model's own.
        key_settings: Fields that a share decides, and that name a setting in tables.
        shown_settings: Fields that a page shows. None: all.
        learned_numbers: `learned_numbers(model)` returns the numbers that it has learned, one per layer, by a label.
        gathers_the_rest: `gathers_the_rest(config)` returns whether a token of many patches holds what other methods
            would drop.
        tuned_settings: Values of further fields that the tuner tries, one field at a time, besides the default values.
            The tuner also tries layers if the method has a choice of them. None: the tuner leaves the method out,
            because it must be trained before it is of use.
        at_counts: `at_counts(facts, setting, counts)` returns a setting that leaves the given number of patch tokens
            after each layer, and is like `setting` in all else. None: its `r` or `keep_rate` does this, if it has one.

    Example:
        >>> Method(RandomConfig, "Random", "pruning", "Drops tokens at random.", at_share=RandomConfig.for_budget)
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
        "All values are our own decision. They are those of EViT's and BAT's fine-tuning of DeiT, so that methods are "
        "compared on one schedule."
    )
    callbacks: Callable[[PreTrainedModel], list[TrainerCallback]] = lambda model: []
    token_decoder: Callable[[PreTrainedModel], nn.ModuleDict] | None = None
    keep_rate_may_change: bool = False
    any_image_size: bool = True
    key_settings: tuple[str, ...] = ("keep_rate",)
    shown_settings: tuple[str, ...] | None = None
    learned_numbers: Callable[[PreTrainedModel], dict[str, list[float]]] = lambda model: {}
    gathers_the_rest: Callable[[Any], bool] = lambda config: False
    tuned_settings: Mapping[str, Sequence[Any]] | None = field(default_factory=dict)
    at_counts: Callable[[EncoderFacts, Any, Sequence[int]], ReductionConfig] | None = None

    @property
    def name(self) -> str:
        """The name by which the method is asked for."""
        return str(self.config_class.method)

    @property
    def takes_layers(self) -> bool:
        """Whether a setting for a share can be given the layers that reduce."""
        arguments = set() if self.at_share is None else set(inspect.signature(self.at_share).parameters)
        return "layers" in arguments | {entry.name for entry in fields(self.config_class)}


def spread_layers(facts: EncoderFacts, *of_twelve: int) -> tuple[int, ...]:
    """Move layers of a model of 12 layers in proportion to the depth of another model.

    Args:
        facts: Facts of the other model's encoder.
        *of_twelve: 0-based indices of layers in a model of 12 layers.

    Example:
        >>> spread_layers(facts, 3, 6, 9)  # (6, 12, 18) in a model of 24 layers
    """
    return tuple(sorted({layer * facts.num_hidden_layers // 12 for layer in of_twelve}))


def by_keep_rate(config_class: type[KeepRateConfig], *of_twelve: int) -> Callable[..., ReductionConfig]:
    """Make the function `Method.at_share` of a method that keeps a share of the tokens in some layers.

    Args:
        config_class: Configuration class of the method.
        *of_twelve: 0-based indices of its default layers in a model of 12 layers.
    """

    def at_share(facts: EncoderFacts, share: float, **settings: Any) -> ReductionConfig:
        return config_class.for_budget(facts, share, **{"layers": spread_layers(facts, *of_twelve), **settings})

    return at_share
