"""The integration into transformers' Trainer."""

from softtrace.hf.density_state import DensityState
from softtrace.hf.trainer import DensityMixin, with_density

__all__ = ["DensityMixin", "DensityState", "with_density"]
