"""Run examples/run_image_classification.py with accelerate's FSDP or DeepSpeed on CPUs, for tests/test_scale_out.py.

Accelerate turns both off where it finds no accelerator. Here it takes the CPU for one; all else is accelerate's own.
"""

import os

from accelerate.state import DistributedType, PartialState


os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]

if __name__ == "__main__":
    from hf_tokenreduce.training.run import main

    main()
