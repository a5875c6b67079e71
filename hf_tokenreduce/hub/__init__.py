"""Publish a reduced model: write its card, check that it loads anywhere, upload it to the Hub."""

from .card import model_card, write_card, write_cards
from .check import CheckReport, check_folder
from .publish import PublishError, PublishResult, publish


__all__ = [
    "CheckReport",
    "PublishError",
    "PublishResult",
    "check_folder",
    "model_card",
    "publish",
    "write_card",
    "write_cards",
]
