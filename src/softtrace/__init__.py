"""softtrace: fine-tune language models so that easy inputs need a sparse, early subgraph."""

from softtrace.density.curve import DensityCurve
from softtrace.density.sweep import density_curve
from softtrace.errors import (
    CheckpointError,
    DataError,
    InvalidInputError,
    ModelDirectoryError,
    NonFiniteError,
    OutputExistsError,
    OutputNotWritableError,
    SofttraceError,
    TrainerSetupError,
    UnsupportedModelError,
)
from softtrace.graph.edges import Edge, EdgeImportance, LayerEdges
from softtrace.graph.trace import Trace, extract_trace
from softtrace.loss.density_loss import DensityLoss
from softtrace.loss.options import DensityOptions
from softtrace.loss.term import DensityTerm
from softtrace.model.exit_maps import load_exit_maps, save_exit_maps
from softtrace.tracing.attach import attach, edge_importance
from softtrace.tracing.instrument import Instrument

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
    "OutputNotWritableError",
    "SofttraceError",
    "Trace",
    "TrainerSetupError",
    "UnsupportedModelError",
    "attach",
    "density_curve",
    "edge_importance",
    "extract_trace",
    "load_exit_maps",
    "save_exit_maps",
]
