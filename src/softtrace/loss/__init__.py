"""The term that training adds: DensityLoss and its options."""

from softtrace.loss.density_loss import DensityLoss, DensityTerm
from softtrace.loss.options import DensityOptions

__all__ = ["DensityLoss", "DensityOptions", "DensityTerm"]
