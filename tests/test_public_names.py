"""Names that other programs import from a wing stay where they are, whatever moves inside it."""

from __future__ import annotations

import importlib
import runpy
import sys

import pytest

#: wing to the names that it hands on
NAMES = {
    "softtrace": (
        "CheckpointError DataError DensityCurve DensityLoss DensityOptions DensityTerm Edge "
        "EdgeImportance Instrument InvalidInputError LayerEdges ModelDirectoryError NonFiniteError "
        "OutputExistsError OutputNotWritableError SofttraceError Trace TrainerSetupError "
        "UnsupportedModelError attach density_curve edge_importance extract_trace"
    ),
    "softtrace.lightning": "STATE_KEY AtomicCheckpointIO DensityMonitor DensityPenalty",
    "softtrace.hf": "DensityMixin DensityState with_density",
    "softtrace.metrics": (
        "METRICS ComputationDensity DensityUncertaintyCorrelation EarlyExitAgreement "
        "NucleusRecovery TraceComposition readings"
    ),
    "softtrace.metrics.functional": "computation_density density_uncertainty_correlation",
    "softtrace.decoding": (
        "EXIT_FIELD Generation ProvenExit check_cache check_early_exit exit_layer_of generate "
        "greedy recommend_exit speculate"
    ),
    "softtrace.data": (
        "DEFAULT_EXCLUDE DEFAULT_SUFFIXES Document Tokens encode evenly pack pack_with_labels "
        "read_documents split_by_file stream_documents stream_held_out"
    ),
    "softtrace.loss": "DensityLoss DensityOptions DensityTerm",
    "softtrace.cli": "main",
    "softtrace.errors": "SofttraceError UnsupportedModelError",
}


@pytest.mark.parametrize("module", NAMES)
def test_a_wing_hands_on_its_public_names(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert not missing
    declared = getattr(found, "__all__", None)
    if declared is not None:
        assert set(NAMES[module].split()) <= set(declared)


def test_the_command_line_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["softtrace", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("softtrace.cli", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("softtrace ")
