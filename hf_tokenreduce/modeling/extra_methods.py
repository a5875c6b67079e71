# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Methods from outside the package: a configuration and a reducer each. A folder whose model runs such a method has
its own version of this file, which imports the method from the file beside it."""

EXTRA_METHODS: tuple = ()
