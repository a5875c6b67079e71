"""`record`: start all kernels of a model on a GPU by one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import method_of
from ..tasks import image_side


WARMUP = 2  # calls in which libraries and kernels are prepared


def record(model: nn.Module, pixel_values: Tensor) -> Callable[[Tensor], Any]:
    """Record what a model does on a GPU with one batch, as a CUDA graph that does all of it again for other images.

    With few images the host needs longer to start the kernels one by one than the GPU needs to run them. A graph
    starts all at once. To record takes a few calls of the model, where `torch.compile` takes a minute or more.

    Args:
        model: A model on a GPU, in eval mode. Its method must be an even one, because shapes are recorded too. Of a
            model of images and texts the part for images is recorded. A later `set_reduction` or `.to` does not change
            the graph.
        pixel_values: Images (B, C, H, W) on the same GPU, of the same type as the model.

    Returns:
        A function of images of exactly this shape, which returns what the model returns. Each call overwrites the
        tensors that the call before has returned, so copy what you keep.

    Example:
        >>> run = record(model.cuda().eval(), pixel_values.cuda())
        >>> logits = run(pixel_values.cuda()).logits.clone()
    """
    device = pixel_values.device
    if device.type != "cuda":
        raise ValueError(
            f"Only what runs on a CUDA GPU can be recorded, but pixel_values are on {device}. Move the model and the "
            "images to a GPU."
        )
    reduction = getattr(getattr(model, "config", None), "reduction", None)
    if method_of(reduction).is_adaptive(reduction):
        raise ValueError(
            f"{method_of(reduction).title} keeps a number of tokens that depends on the image, so its shapes cannot "
            "be recorded. Use an even method."
        )
    if model.training:
        raise ValueError("The model is in training mode. Call model.eval() first.")
    if torch.is_autocast_enabled("cuda"):
        raise ValueError("Autocast frees what it has converted, so the graph could not read it. Convert the model.")
    side = image_side(model)
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        held, aside = pixel_values.clone(), torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                side(held)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            output = side(held)

    # The graph reads the weights where they are, so they must stay there, also after `.to`.
    read = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]

    def run(images: Tensor, kept: Any = read) -> Any:
        if images.shape != held.shape:
            raise ValueError(
                f"The model was recorded for images of shape {tuple(held.shape)}, got {tuple(images.shape)}. Record "
                "it for each shape, or fill up the last batch."
            )
        with torch.no_grad():
            held.copy_(images)
        graph.replay()
        return output

    return run
