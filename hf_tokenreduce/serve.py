"""A web page to try a checkpoint: drop an image, pick a method and a budget, and compare it with the dense model.

`serve("folder")` starts the page for this computer only. `SideBySide` computes what the page shows, without a page.
"""

import json
import math
import os
import statistics
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .convert import reduce_tokens, restore
from .guard import Guard, take_uploads_alone
from .loading import load_model
from .methods import METHODS, Method
from .modeling.configuration_base import ReductionConfig
from .modeling.encoders import encoder_of
from .modeling.multiply_adds import multiply_adds
from .pictures import FORMATS, as_rgb
from .tasks import class_scores, facts_on, labelled
from .timing import in_turns
from .training.origin import was_trained
from .visualization import seen_images, token_maps
from .visualization.drawing import draw_layer, resized_to_cells


PUBLISHED = "as published"
MAX_PIXELS = 50_000_000
MORE_THAN_THE_FILE = 2**16  # bytes that a request may have besides the file
REPEATS = 5
TOP = 5
LOOPBACK = ("127.0.0.1", "localhost", "::1")

logger = logging.get_logger(__name__)


def runs_untrained(method: Method) -> bool:
    """Whether the method can keep a share of the multiply-adds of a checkpoint without training."""
    return method.needs == "nothing" and (method.at_share is not None or method.fit_share is not None)


class Side(NamedTuple):
    """Hold what one model predicts for an image, and what that costs.

    Attributes:
        predictions: The most probable labels and their probabilities.
        tokens: Number of tokens that leave each layer, prefix tokens included.
        multiply_adds: Multiply-adds of the encoder's layers.
        milliseconds: Median time of a forward of this image alone.
    """

    predictions: list[tuple[str, float]]
    tokens: list[int]
    multiply_adds: float
    milliseconds: float


class Answer(NamedTuple):
    """Hold the comparison of the reduced and the dense model on one image.

    Attributes:
        name: Title of the method.
        reduction: Configuration of the method.
        dense: Result of the dense model.
        reduced: Result of the reduced model.
        share: Share of the dense model's multiply-adds that the reduced model took.
        seen: The image as the models saw it.
        token_map: The image with the tokens that are left after the last layer.
    """

    name: str
    reduction: ReductionConfig
    dense: Side
    reduced: Side
    share: float
    seen: Image.Image
    token_map: Image.Image


class SideBySide:
    """Compare a checkpoint with its dense model, on one image at a time.

    The reduction is the one that the checkpoint was published with, or one that needs no training. All models share
    the weights of the checkpoint.

    Args:
        model: An image classifier, reduced or not.
        processor: The image processor of the model.
        repeats: Number of timed forwards of each model per image.
        keep: Number of reduced models that are kept for the next images.

    Attributes:
        untrained: The methods that can reduce the model without training, by their titles.
        published: The model as it was published. None if it is not reduced.

    Example:
        >>> comparison = SideBySide(model, processor)
        >>> answer = comparison(Image.open("cat.jpg"), "ToMe", budget=0.65)
    """

    def __init__(self, model: PreTrainedModel, processor: Any, *, repeats: int = REPEATS, keep: int = 8):
        self.processor, self.repeats = processor, repeats
        self.untrained = {method.title: method for method in METHODS.values() if runs_untrained(method)}
        self.unreduced = reduce_tokens(model, None).eval()
        self.dense = restore(self.unreduced)
        self.published = model.eval() if getattr(model.config, "reduction", None) is not None else None
        # A reduced model is a few Python objects around the same weights, so some are kept. The oldest is dropped.
        self._reduced = lru_cache(maxsize=keep)(self._reduce)

    def methods(self) -> list[str]:
        """Return the titles of the methods that can be chosen."""
        return [PUBLISHED, *self.untrained] if self.published is not None else list(self.untrained)

    def setting(self, method: str, budget: float, pixels: Tensor) -> ReductionConfig:
        """Return the mildest setting of a method that keeps at most the share `budget` of the multiply-adds."""
        if method not in self.untrained:
            raise ValueError(f"There is no method {method!r} for this checkpoint. Pick one of {self.methods()}.")
        chosen = self.untrained[method]
        if chosen.at_share is not None:
            return chosen.at_share(facts_on(self.dense, pixels), budget)
        if chosen.fit_share is not None:
            return chosen.fit_share(self.unreduced, pixels, budget)
        raise ValueError(f"{method} has no setting for a share of the multiply-adds.")

    @torch.no_grad()
    def __call__(self, image: Image.Image, method: str, budget: float = 0.65, *, size: int = 384) -> Answer:
        """Run both models on an image.

        Args:
            image: The image.
            method: One of `methods()`.
            budget: Share of the multiply-adds to keep.
            size: About how many pixels the longer side of the pictures has.

        Returns:
            `Answer`: The results of both models.
        """
        pixels = self.processor(as_rgb(image), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.dense.device, self.dense.dtype)
        if method == PUBLISHED and self.published is not None:
            reduced = self.published
        else:
            reduced = self._reduced(json.dumps(self.setting(method, round(budget, 3), pixels).to_dict()))
        maps = token_maps(reduced, pixels)
        times = self._milliseconds([self.dense, reduced], pixels)
        counts = torch.full_like(maps.counts, maps.num_tokens)
        dense_side = self._side(self.dense(pixels).logits, counts, maps.num_tokens, None, times[0])
        settings = reduced.config.reduction
        reduced_side = self._side(maps.logits, maps.counts, maps.num_tokens, settings, times[1])
        patch = encoder_of(reduced).patch_size
        seen = resized_to_cells(seen_images(pixels, self.processor)[0], maps.grid, size, patch)
        return Answer(
            name=method,
            reduction=settings,
            dense=dense_side,
            reduced=reduced_side,
            share=maps.shares[0].item(),
            seen=seen,
            token_map=draw_layer(seen, maps, 0, maps.counts.shape[1] - 1),
        )

    def _reduce(self, setting: str) -> PreTrainedModel:
        return reduce_tokens(self.dense, json.loads(setting))

    def _side(
        self, logits: Any, counts: Tensor, num_tokens: int, reduction: ReductionConfig | None, milliseconds: float
    ) -> Side:
        cost = multiply_adds(self.dense.config, counts, num_tokens, reduction).item()
        return Side(self._predictions(logits[0]), counts[0].tolist(), cost, milliseconds)

    def _milliseconds(self, models: Sequence[PreTrainedModel], pixels: Tensor) -> list[float]:
        """Return the median time of each model."""
        calls = [partial(model, pixels) for model in models]
        return [1000 * statistics.median(taken) for taken in in_turns(calls, self.repeats, pixels.device)]

    def _predictions(self, logits: Tensor) -> list[tuple[str, float]]:
        labels = self.dense.config.id2label
        if not logits.isfinite().all():
            raise ValueError("What the model computes for this image is not finite. Try to load it in float32.")
        best = class_scores(logits, self.dense.config).topk(min(TOP, len(logits)))
        names = [str(labels.get(index, index)).split(",")[0] for index in best.indices.tolist()]
        # Two classes may have the same name, such as the two cranes of ImageNet.
        unique = [
            name if names.count(name) == 1 else f"{name} ({index})"
            for name, index in zip(names, best.indices.tolist(), strict=True)
        ]
        return list(zip(unique, best.values.tolist(), strict=True))


def load_side_by_side(
    folder_or_id: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> SideBySide:
    """Load a folder or Hub id for the comparison. Models that this package saved need no `trust_remote_code`."""
    model, processor = load_model(str(folder_or_id), revision, trust_remote_code)
    return SideBySide(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor)


def read_image(file: str | Path, *, max_upload_mb: float = 10) -> Image.Image:
    """Read an uploaded file, upright and in RGB. Its size is checked from its header, before any pixel is decoded."""
    if Path(file).stat().st_size == 0:
        raise ValueError("The file is empty. Give an image.")
    if Path(file).stat().st_size > max_upload_mb * 1024**2:
        raise ValueError(f"The file is larger than {max_upload_mb} MB. Give a smaller file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                picture = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"The image has more than {MAX_PIXELS // 10**6} megapixels ({error}). Give a smaller image."
        ) from error
    except Exception as error:  # the parsers of broken files raise many kinds
        raise ValueError(f"The file is not an image that can be read. Give one of: {', '.join(FORMATS)}.") from error
    return as_rgb(picture)


def build_app(
    folder_or_id: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_upload_mb: float = 10,
) -> Any:
    """Build the page without launching it.

    Args:
        folder_or_id: Folder or Hub id of a model.
        revision: Commit, tag or branch of the Hub id.
        trust_remote_code: Whether code that comes with the model may run.
        max_upload_mb: Largest size of an uploaded image in MB.

    Returns:
        `gradio.Blocks`: The page.
    """
    gr = _gradio()
    comparison = load_side_by_side(folder_or_id, revision=revision, trust_remote_code=trust_remote_code)
    methods = comparison.methods()
    name = Path(folder_or_id).name if Path(folder_or_id).is_dir() else str(folder_or_id)
    words = (
        "Compare the model on all tokens of an image with the same model on fewer tokens. In the picture of the "
        "tokens, patches that became one token share its colour and an outline. Dropped patches fade."
    )
    if was_trained(str(folder_or_id), revision):
        words += " The model was trained with its reduction, not for all tokens. So *Dense* is no fair comparison."

    def compare(file: str | None, method: str, budget: float) -> tuple[Any, ...]:
        if file is None:
            return None, None, None, None, ""
        try:
            answer = comparison(read_image(file, max_upload_mb=max_upload_mb), method, budget)
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        dense, reduced = (labelled(one.predictions, comparison.dense.config) for one in (answer.dense, answer.reduced))
        return dense, reduced, answer.seen, answer.token_map, report(answer)

    def picture(label: str) -> Any:
        return gr.Image(
            label=label,
            show_label=False,
            format="png",
            interactive=False,
            buttons=["fullscreen", "download"],
            height=300,
        )

    with gr.Blocks(title=f"{name}, with fewer tokens", analytics_enabled=False, delete_cache=(600, 600)) as app:
        gr.Markdown(f"# {_plain(name)}\n{words}")
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    buttons=["fullscreen"],
                    height=300,
                )
                # We read the file ourselves, to say why a file cannot be read.
                image.preprocess = lambda payload: None if payload is None else payload.path
                take_uploads_alone(image, gr.Error)
                method = gr.Dropdown(methods, value=methods[0], label="Method")
                budget = gr.Slider(
                    0.4,
                    1.0,
                    value=0.65,
                    step=0.05,
                    label="Share of the multiply-adds to keep",
                    interactive=methods[0] != PUBLISHED,
                )
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    with gr.Column(min_width=240):
                        gr.Markdown("**What the model sees**")
                        seen = picture("What the model sees")
                    with gr.Column(min_width=240):
                        gr.Markdown("**Tokens that are left**")
                        drawn = picture("Tokens that are left")
                with gr.Row():
                    dense = gr.Label(label="Dense", num_top_classes=TOP)
                    reduced = gr.Label(label="Reduced", num_top_classes=TOP)
                costs = gr.HTML()
        method.change(
            lambda chosen: gr.update(interactive=chosen != PUBLISHED),
            method,
            budget,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        gr.on(
            [image.change, method.change, budget.release],
            compare,
            [image, method, budget],
            [dense, reduced, seen, drawn, costs],
            api_name="compare",
            concurrency_limit=1,  # one at a time, because other work at the same time would change the times
            show_progress="minimal",
        )
    return app.queue(max_size=32)


def serve(
    folder_or_id: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_mb: float = 10,
    open_browser: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Show the page at `http://host:port` until interrupted.

    Everyone who can reach that address can use the page. By default, only this computer can.

    Args:
        folder_or_id: Folder or Hub id of an image classifier, reduced or not.
        host: Address that the page listens on.
        port: Port that the page listens on.
        max_upload_mb: Largest size of an uploaded image in MB.
        open_browser: Whether to open the page in the browser.
        revision: Commit, tag or branch of the Hub id.
        trust_remote_code: Whether code that comes with the model may run. Models that this package saved need none.

    Example:
        >>> serve("vit-tome", open_browser=True)
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port must lie between 1 and 65535, got {port}.")
    if not 0 < max_upload_mb < math.inf:
        raise ValueError(f"max_upload_mb must be a number above 0, got {max_upload_mb}.")
    gr = _gradio()
    app = build_app(folder_or_id, revision=revision, trust_remote_code=trust_remote_code, max_upload_mb=max_upload_mb)
    limit = int(max_upload_mb * 1024**2)
    guard = _middleware(Guard, hosts=LOOPBACK if host in LOOPBACK else None, most_bytes=limit + MORE_THAN_THE_FILE)
    if host not in LOOPBACK:
        logger.warning(f"The page listens on {host}: everyone who can reach port {port} of this computer can use it.")
    try:
        app.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            max_file_size=limit,
            # These fonts are on the reader's computer, so that the page loads nothing from other servers.
            theme=gr.themes.Soft(font=["Helvetica", "Arial", "sans-serif"], font_mono=["Courier", "monospace"]),
            app_kwargs={"middleware": [guard]},
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
        )
    except OSError as error:
        raise ValueError(f"The page cannot listen on port {port} of {host} ({error}). Change one of them.") from error


def report(answer: Answer) -> str:
    """Write HTML that shows the cost of both models, and how many tokens leave each layer."""
    dense, reduced = answer.dense, answer.reduced
    setting = ", ".join(f"{key}={value}" for key, value in answer.reduction.to_dict().items())
    rows = [
        ("Tokens leaving the last layer", f"{dense.tokens[-1]}", f"{reduced.tokens[-1]}", ""),
        (
            "Multiply-adds of the layers",
            f"{dense.multiply_adds / 1e9:.3g} G",
            f"{reduced.multiply_adds / 1e9:.3g} G",
            f"{answer.share:.0%}",
        ),
        (
            "Time of this image alone",
            f"{dense.milliseconds:.1f} ms",
            f"{reduced.milliseconds:.1f} ms",
            f"{dense.milliseconds / reduced.milliseconds:.2f} times as fast",
        ),
    ]
    plain = "border:none;padding:3px 20px 3px 0"
    cells = "".join(
        "<tr style='border:none'>" + "".join(f"<td style='{plain}'>{cell}</td>" for cell in row) + "</tr>"
        for row in [("", "<b>dense</b>", "<b>reduced</b>", ""), *rows]
    )
    most = max(dense.tokens)
    bars = "".join(
        f"<div style='flex:1;text-align:center' title='layer {layer}: {count} tokens'>"
        f"<div style='height:72px;background:var(--border-color-primary);display:flex;align-items:flex-end'>"
        f"<div style='width:100%;height:{100 * count / most:.1f}%;background:var(--color-accent)'></div></div>"
        f"<small>{count}</small></div>"
        for layer, count in enumerate(reduced.tokens)
    )
    return (
        f"<table style='border:none'><tbody>{cells}</tbody></table>"
        f"<p style='margin:12px 0 4px'>Tokens leaving each layer, of {dense.tokens[0]}</p>"
        f"<div style='display:flex;gap:3px;max-width:720px'>{bars}</div>"
        f"<p><small>{escape(setting)}</small></p>"
    )


def _middleware(*args: Any, **options: Any) -> Any:
    from starlette.middleware import Middleware  # comes with Gradio

    return Middleware(*args, **options)


def _plain(text: str) -> str:
    """Escape a text for Markdown."""
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]<>()#+-.!|" else mark for mark in text)


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported and when a page is built
    try:
        import gradio
    except ImportError as error:
        raise ValueError('The page needs Gradio. Install it by pip install "hf-tokenreduce[serve]".') from error
    return gradio
