"""softtrace: fine-tune language models so that easy inputs need a sparse, early subgraph."""

from softtrace.attach import attach, edge_importance
from softtrace.curve import DensityCurve, density_curve
from softtrace.errors import (
    CheckpointError,
    DataError,
    InvalidInputError,
    ModelDirectoryError,
    NonFiniteError,
    OutputExistsError,
    SofttraceError,
    TrainerSetupError,
    UnsupportedModelError,
)
from softtrace.graph import Edge, EdgeImportance, LayerEdges
from softtrace.instrument import Instrument
from softtrace.loss import DensityLoss, DensityTerm
from softtrace.options import DensityOptions
from softtrace.trace import Trace, extract_trace

__all__ = [
    "CheckpointError",
    "DataError",
    "DensityCurve",
    "DensityLoss",
    "DensityOptions",
    "DensityTerm",
    "Edge",
    "EdgeImportance",
    "Instrument",
    "InvalidInputError",
    "LayerEdges",
    "ModelDirectoryError",
    "NonFiniteError",
    "OutputExistsError",
    "SofttraceError",
    "Trace",
    "TrainerSetupError",
    "UnsupportedModelError",
    "attach",
    "density_curve",
    "edge_importance",
    "extract_trace",
]
