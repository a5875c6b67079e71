"""What training needs beside the models."""

from .reverse import ReverseSlimming, reverse_modules


__all__ = ["ReverseSlimming", "reverse_modules"]
