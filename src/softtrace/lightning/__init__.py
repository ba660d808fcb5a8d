"""The callbacks for Lightning, and what ``softtrace fit`` trains with."""

from softtrace.lightning.checkpoint_io import AtomicCheckpointIO
from softtrace.lightning.monitor import DensityMonitor
from softtrace.lightning.penalty import STATE_KEY, DensityPenalty

__all__ = ["STATE_KEY", "AtomicCheckpointIO", "DensityMonitor", "DensityPenalty"]
