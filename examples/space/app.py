"""Show the page of `tokenreduce serve` in a Space.

Set the variable MODEL_ID to the model, and REVISION to the commit of the model.
"""

import os

from hf_tokenreduce.serve import serve


if "MODEL_ID" not in os.environ:
    raise SystemExit("Set MODEL_ID in the Space's settings, such as your-name/your-reduced-vit.")
serve(os.environ["MODEL_ID"], revision=os.environ.get("REVISION"), host="0.0.0.0", port=7860)
