"""The door for transformers' Trainer."""

from softtrace.hf.trainer import DensityMixin, DensityState, with_density

__all__ = ["DensityMixin", "DensityState", "with_density"]
