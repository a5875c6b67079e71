"""Pictures of what a reduced model did to each image, such as `write_page(model, images, processor, "page.html")`."""

from .composing import method_comparison, token_map_grid
from .drawing import draw_token_map, draw_token_weights, seen_images
from .maps import TokenMaps, token_maps
from .page import write_page


__all__ = [
    "TokenMaps",
    "draw_token_map",
    "draw_token_weights",
    "method_comparison",
    "seen_images",
    "token_map_grid",
    "token_maps",
    "write_page",
]
