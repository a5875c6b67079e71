"""Show the page of `tokenreduce serve` in a Space.

The environment variable MODEL_ID names the model, and REVISION its commit. README.md describes them.
"""

import os

from hf_tokenreduce.serve import serve


model_id = os.environ.get("MODEL_ID")
if not model_id:
    raise SystemExit("MODEL_ID is not set. Set it in the Space's settings, such as your-name/your-reduced-vit.")
serve(model_id, revision=os.environ.get("REVISION") or None, host="0.0.0.0", port=7860)
