"""What a reduction costs and what it saves."""

from .compute import encoder_multiply_adds


__all__ = ["encoder_multiply_adds"]
