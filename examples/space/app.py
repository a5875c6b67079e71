"""The page of `tokenreduce serve` as a Space: set MODEL_ID, and REVISION to the commit it should show."""

import os

from hf_tokenreduce.serve import serve


if "MODEL_ID" not in os.environ:
    raise SystemExit("Set MODEL_ID in the Space's settings, such as your-name/your-reduced-vit.")
serve(os.environ["MODEL_ID"], revision=os.environ.get("REVISION"), host="0.0.0.0", port=7860)
