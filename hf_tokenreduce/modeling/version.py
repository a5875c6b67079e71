# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The version of this code. It stands here because it travels to the Hub with the code."""

__version__ = "0.2.0"
