"""The door for transformers' Trainer."""

from softtrace.hf.trainer import DensityMixin, with_density

__all__ = ["DensityMixin", "with_density"]
