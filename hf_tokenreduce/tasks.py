"""What the models of each task are given and give: Auto class, pipeline, inputs, main output."""

from typing import Any

from torch import Tensor


# In the order in which an output is asked for what it is about.
MAIN_OUTPUTS = ("logits", "logits_per_image", "predicted_depth", "pooler_output", "image_embeds", "feature_maps",
                "last_hidden_state")  # fmt: skip


def main_output(output: Any) -> Tensor:
    """Of a model's output the tensor that its users read: logits, depths, pooled or plain features."""
    for name in MAIN_OUTPUTS:
        value = output.get(name)
        if value is not None:
            return value[-1] if isinstance(value, tuple) else value
    raise ValueError(f"A {type(output).__name__} has none of {', '.join(MAIN_OUTPUTS)}.")
