"""Metrics of torchmetrics for what the measure gives; usable without Lightning.

``metric.update(**readings(model, input_ids, attention_mask))``, alone or in a
``torchmetrics.MetricCollection``; sums, counts and ranks merge exactly over processes. Pure
functions of the same: :mod:`softtrace.metrics.functional`.
"""

from softtrace.metrics.over_sizes import NucleusRecovery, TraceComposition
from softtrace.metrics.per_token import (
    ComputationDensity,
    DensityUncertaintyCorrelation,
    EarlyExitAgreement,
)
from softtrace.metrics.readings import readings

METRICS = (
    ComputationDensity,
    DensityUncertaintyCorrelation,
    EarlyExitAgreement,
    NucleusRecovery,
    TraceComposition,
)
"""All of them, each made without arguments."""

__all__ = [
    "METRICS",
    "ComputationDensity",
    "DensityUncertaintyCorrelation",
    "EarlyExitAgreement",
    "NucleusRecovery",
    "TraceComposition",
    "readings",
]
