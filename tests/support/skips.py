"""All reasons for which a test may be skipped; each says where else its promise is kept."""

import importlib.util

import pytest
import torch

cuda = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="CUDA graphs need a GPU; the same steps run uncaptured in the tests beside this one",
)
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="two real devices need two GPUs; the same is asked of two devices that compute on the "
    "CPU in the test beside this one, and of two processes on CPUs, of which one fails, in "
    "tests/faults and tests/lightning/test_sharded.py",
)
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed, which compiles C++ and is no dependency, is not installed; what it gave is "
    "in results/exactness.json (ZeRO 1, 2 and 3), and pip install deepspeed runs this test",
)
