"""The description of SiT, and how its networks get a start without training."""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import EncoderFacts, encoder_of, facts_of
from ..modeling.multiply_adds import even_share
from ..modeling.sit import SiTConfig, SiTReducer
from ..modeling.tokens import TokenState
from ..tasks import all_layers_act, image_side
from .fitting import before_acting
from .method import QUICK_FINE_TUNE, Method
from .token_decoder import reverse_modules


def fit_slimming(model: PreTrainedModel, pixels: Tensor, target: Any = None, *, steps: int = 600) -> float:
    """Teach the slimming networks, layer by layer, to pool neighbouring tokens, and then tokens that are alike.

    The model can then be used, and it is a good start for training.

    Args:
        model: A model that SiT reduces.
        pixels: Pixel values of the images, (B, C, H, W).
        target: Must be None, because `keep_rate` of the configuration says what is kept.
        steps: Number of steps of each network for either lesson, of 16 images each.

    Returns:
        The share of the multiply-adds that the model keeps.
    """
    if target is not None:
        raise ValueError("SiTConfig(keep_rate=...) says what is kept, so leave target out.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    slimming = [reducer for reducer in encoder_of(model).reducers if reducer.num_slim is not None]
    height, width = facts_of(model.config).grid
    order = torch.tensor(_neighbours_together(0, height, 0, width, width), device=model.device)
    with logging.tqdm(total=2 * steps * len(slimming), desc="calibrating slimming", leave=False) as progress:

        def teach(reducer: SiTReducer, state: TokenState) -> None:
            _teach_pools(reducer, state, order, steps, progress)

        with torch.no_grad(), before_acting(slimming, "after_layer", teach):
            image_side(model)(pixels, **all_layers_act(model))
    return even_share(model.config.reduction, model.config)


def _teach_pools(reducer: SiTReducer, state: TokenState, order: Tensor, steps: int, progress: Any) -> None:
    """Teach the network of one layer which tokens belong to each slim token.

    In the first layer that slims these are the tokens of a part of the image. Later they are tokens that follow each
    other, because tokens of neighbouring parts are then beside each other.

    From there it learns to pool by content: each token is restored from the slim tokens, by a softmax of the same
    logits over them, and should come back as it was.
    """
    patches = state.hidden_states[:, state.num_prefix_tokens :].float()
    count, slim = patches.shape[1], reducer.fc2.out_features
    pool = torch.arange(count, device=patches.device) * slim // count
    if count == len(order):
        pool = torch.empty_like(pool).scatter(0, order, pool)
    share = F.one_hot(pool, slim).float()
    share = share / share.sum(dim=0)  # (N, K)
    generator = torch.Generator().manual_seed(0)
    student = copy.deepcopy(reducer).float().requires_grad_()  # in float32, whatever the model's dtype is

    def of_pools(logits: Tensor, tokens: Tensor) -> Tensor:
        return -(logits.log_softmax(dim=1) * share).sum(dim=1).mean()

    def of_restored(logits: Tensor, tokens: Tensor) -> Tensor:
        restored = logits.softmax(dim=2) @ (logits.softmax(dim=1).transpose(1, 2) @ tokens)
        return F.mse_loss(restored, tokens) / tokens.var()

    for loss_of, learning_rate in ((of_pools, 3e-3), (of_restored, 1e-3)):
        optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        with torch.enable_grad():
            for _ in range(steps):
                some = torch.randint(len(patches), (16,), generator=generator).to(patches.device)
                loss = loss_of(student.logits(patches[some]), patches[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
    for parameter, value in zip(reducer.parameters(), student.parameters(), strict=True):
        parameter.copy_(value)


def _neighbours_together(top: int, bottom: int, left: int, right: int, width: int) -> list[int]:
    """List the patches of a part of the grid. It is halved again and again, so that neighbours stay close."""
    height, across = bottom - top, right - left
    if height * across <= 1:
        return [top * width + left] * (height * across)
    if height >= across:
        middle = top + (height + 1) // 2
        parts = (top, middle, left, right), (middle, bottom, left, right)
    else:
        middle = left + (across + 1) // 2
        parts = (top, bottom, left, middle), (top, bottom, middle, right)
    return [patch for part in parts for patch in _neighbours_together(*part, width)]


LEAST_KEPT = 0.25  # a network that keeps a smaller part of the tokens at once loses too much


def at_share(facts: EncoderFacts, share: float, **settings: Any) -> ReductionConfig:
    """Make the setting for a share: one network, or two of them for shares that one alone should not reach.

    One network loses less than several. Late in the model it must drop nearly all tokens to save as much, and early
    it sees tokens that know little of the image. So it slims after the last layer where the part of the tokens that it
    keeps is at least the part of the layers that it leaves as they are.
    """
    depth = facts.num_hidden_layers
    if "layers" not in settings:
        for layer in reversed(range(depth)):
            with contextlib.suppress(ValueError):
                setting = SiTConfig.for_budget(facts, share, layers=(layer,), **settings)
                rate: Any = setting.keep_rate  # one number, because `for_budget` gives all layers the same
                if rate >= max((layer + 1) / depth, LEAST_KEPT):
                    return setting
        settings["layers"] = tuple(sorted({0, depth // 4}))
    return SiTConfig.for_budget(facts, share, **settings)


DISTILLED = {**QUICK_FINE_TUNE, "logits_weight": 2.0, "token_weight": 2.0}

SIT = Method(
    SiTConfig,
    title="SiT",
    family="slimming: soft mixtures",
    summary=(
        "After some layers a small network replaces the patch tokens by fewer tokens, which are soft mixtures of "
        "them. The network is learned."
    ),
    paper="Self-slimmed Vision Transformer",
    arxiv="2111.12624",
    details=(
        "After each of `layers` a small network mixes the patch tokens into fewer ones, by soft weights. In training "
        "the dense model is the teacher. It teaches the logits, and also the tokens, through a token decoder that "
        "exists only in training. `calibrate` first teaches the networks to pool tokens that are alike, because the "
        "initialisation of the authors makes every slim token nearly the mean of all tokens. With a share there is "
        "one network, or two if the share is small, because several networks lose more than one."
    ),
    limits="Without training it loses much accuracy. Calibration is only a start.",
    ours="the layers; the calibrated start",
    needs="images",
    at_share=at_share,
    prepare=fit_slimming,
    recipes={
        "paper": {
            "num_train_epochs": 135,
            "per_device_train_batch_size": 1024,
            "learning_rate": 4e-4,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-5},
            "weight_decay": 0.05,
            "optim": "adamw_torch",
            "reverse_learning_rate_factor": 5.0,
            "logits_weight": 2.0,
            "token_weight": 2.0,
        },
        # The slimming networks have more to learn than a backbone, so it has twice the epochs of other methods.
        "quick": {**DISTILLED, "num_train_epochs": 6, "learning_rate": 1e-4},
        "demo": {**DISTILLED, "num_train_epochs": 2, "learning_rate": 5e-4},
    },
    paper_recipe=(
        "The authors' code gives the batch, the learning rates, the weight decay and the number of epochs. Our own "
        "decisions: the cosine falls over all 135 epochs, while the authors' falls over 125 and stays at its end for "
        "10. The authors' drop-path of 0.1 is left out, because the ViT and DeiT of transformers have none."
    ),
    token_decoder=reverse_modules,
    any_image_size=False,
    tuned_settings=None,
)
