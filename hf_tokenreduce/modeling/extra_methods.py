# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Methods of others: a configuration and a reducer each. A folder whose model runs one has another file of this name,
which imports it from the file beside it."""

EXTRA_METHODS: tuple = ()
