"""The one reason for which a test may be skipped."""

import pytest
import torch

cuda = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="CUDA graphs need a GPU; the same steps run uncaptured in the tests beside this one",
)
