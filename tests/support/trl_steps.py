"""What every training by TRL with the term has to pass, beside the same one without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.trl_training import OPTIONS, Case, Run, by_hand, fit


def check_a_step(case: Case, folder: Path) -> Run:
    """The term alone is added, scaled right and said in the log; at strength 0 nothing changes.

    Returns:
        The training with the term.
    """
    torch.manual_seed(0)
    plain = fit(case, folder, None)
    torch.manual_seed(0)
    silent = fit(case, folder, {**OPTIONS, "strength": 0.0})
    torch.manual_seed(0)
    run = fit(case, folder, OPTIONS)
    assert torch.equal(silent.weights, plain.weights)
    assert [entry["loss"] for entry in silent.logged] == [entry["loss"] for entry in plain.logged]

    term, gradients = by_hand(case, run, OPTIONS)
    first = run.logged[0]
    assert first["loss/density"] == pytest.approx(term, rel=1e-5)
    assert first["loss/task"] == pytest.approx(plain.logged[0]["loss"], rel=1e-5, abs=1e-6)
    assert first["loss"] == pytest.approx(plain.logged[0]["loss"] + term, rel=1e-5)
    assert term > 0.05
    assert gradients
    for name, wanted in gradients.items():
        found = run.gradients[0][name] - plain.gradients[0].get(name, torch.zeros_like(wanted))
        # A norm's backward pass rounds to float32, and takes both gradients together.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert max(float(each.abs().max()) for each in gradients.values()) > 1e-3
    assert (run.weights - plain.weights).abs().max() > 1e-4
    return run
