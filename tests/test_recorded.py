"""`record` refuses what cannot be recorded. What it records is compared on a GPU by `benchmarks/cuda_device.py`."""

import pytest
import torch
from helpers import tiny_images, tiny_model

from hf_tokenreduce import ATSConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.deploy import record
from hf_tokenreduce.evaluation import benchmark
from hf_tokenreduce.evaluation.oracle import SliceOracle
from hf_tokenreduce.tasks import ImageSide


class OnGpu(torch.Tensor):
    """Images that say that they are on a GPU."""

    device = torch.device("cuda")


def on_gpu(images):
    return images.as_subclass(OnGpu)


def test_images_must_be_on_a_gpu():
    with pytest.raises(ValueError, match="Only what runs on a CUDA GPU can be recorded, but pixel_values are on cpu"):
        record(tiny_model().eval(), tiny_images(1))
    with pytest.raises(ValueError, match="recorded needs a CUDA GPU, but the device is cpu"):
        benchmark({"dense": tiny_model()}, tiny_images(1), runtimes=["recorded"])


def test_shapes_must_not_depend_on_the_image():
    with pytest.raises(ValueError, match="ATS keeps a number of tokens that depends on the image"):
        record(reduce_tokens(tiny_model(), ATSConfig(layers=(1, 2))).eval(), on_gpu(tiny_images(1)))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode. Call model.eval\(\) first"):
        record(reduce_tokens(tiny_model(), ToMeConfig(r=7)).train(), on_gpu(tiny_images(1)))


@pytest.mark.parametrize("wrapped", [lambda model: SliceOracle(model, "after_attention", [17] * 4), ImageSide])
def test_what_wraps_a_model_has_its_mode(wrapped):
    """`benchmark` records slice oracles and the image sides of models."""
    assert not wrapped(tiny_model().eval()).training
    assert wrapped(tiny_model().train()).training
