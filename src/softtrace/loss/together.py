"""The masked runs of processes that hold parts of one model: all of them run, or none does.

A unit of FSDP gathers its weights from all processes, in the forward and again in the
backward pass. So a process whose batch has nothing to look at runs too, on tokens that stand in for
its own and count nothing; and what is wrong on one is raised on all, once all have run.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from softtrace.anatomy.discovery import tiny_batch
from softtrace.loss.masked_term import masked_term
from softtrace.loss.options import DensityOptions
from softtrace.loss.term import DensityTerm
from softtrace.loss.windows import Windows
from softtrace.processes import agreed
from softtrace.tracing.instrument import Instrument

_LENGTH = 4


def together_term(
    instrument: Instrument, windows: Windows | None, options: DensityOptions, strength: float
) -> DensityTerm:
    """The term without exits, of this process.

    Args:
        instrument: of a model that is sharded.
        windows: that this process looks at; None where it has none.
        options: of the term.
        strength: at this step.

    Raises:
        NonFiniteError: on all processes, where logits of any are not finite.
    """
    looked_at = _stand_in(instrument, options) if windows is None else windows
    found = masked_term(instrument, looked_at, options, together=True)
    assert found is not None
    with agreed(together=True):
        found.check()
    if windows is None:
        nothing = DensityTerm.of_no_run(found.term.device, strength, "no token has a target")
        return replace(nothing, loss=0 * found.term)
    return found.at(strength)


def _stand_in(instrument: Instrument, options: DensityOptions) -> Windows:
    """Windows of other tokens, for a process that has none of its own."""
    batch, layers = tiny_batch(instrument.model, _LENGTH), len(instrument.anatomy.layers)
    thresholds = torch.full(batch.valid.shape[:1], options.thresholds[0], device=batch.valid.device)
    return Windows(batch, thresholds, torch.full_like(batch.input_ids, layers))
