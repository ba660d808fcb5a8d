"""The term that training adds: DensityLoss and its options."""

from softtrace.loss.density_loss import DensityLoss
from softtrace.loss.options import DensityOptions
from softtrace.loss.term import DensityTerm

__all__ = ["DensityLoss", "DensityOptions", "DensityTerm"]
