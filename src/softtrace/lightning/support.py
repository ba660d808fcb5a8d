"""What works with Lightning: a table that the tests walk, row by row.

A strategy that is not in it, or that could not be tested on the machines that run the tests, is
refused by name; ``DensityPenalty(allow_untested=True)`` goes past that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softtrace.errors import TrainerSetupError
from softtrace.model.engines import engine

Kind = Literal["strategy", "precision", "trainer", "callback", "module"]


@dataclass(frozen=True)
class Support:
    """One row.

    Attributes:
        kind: of the thing.
        name: as Lightning calls it.
        refused: why it is; None where it is supported.
        note: what is different there.
    """

    kind: Kind
    name: str
    refused: str | None = None
    note: str | None = None


_FULLY_SHARD = (
    "FSDP2: the module's configure_model calls fully_shard on layers, then on the model; "
    "tensor_parallel_size=1"
)

_TRIALS = "its trials run without callbacks, so without the term: leave memory for it"

_ENDS = "its processes end with the fit, and with them the maps of exits; in a script take 'ddp'"

LIGHTNING: tuple[Support, ...] = (
    Support("strategy", "SingleDeviceStrategy"),
    Support("strategy", "DDPStrategy"),
    Support("strategy", "DDPStrategy(start_method='fork')", _ENDS),  # in notebooks too
    Support("strategy", "DDPStrategy(start_method='spawn')", _ENDS),
    Support("strategy", "ModelParallelStrategy", note=_FULLY_SHARD),
    Support("strategy", "FSDPStrategy", note="FSDP1; auto_wrap_policy wraps layers alone"),
    Support(
        "strategy",
        "FSDPStrategy(use_orig_params=False)",
        engine("FSDP1 without use_orig_params").refused,
    ),
    Support("strategy", "DeepSpeedStrategy", note="stages 1 and 2; in softtrace fit too"),
    Support("strategy", "DeepSpeedStrategy(stage=3)", note="no leaf modules; in softtrace fit too"),
    Support("precision", "32-true"),
    Support("precision", "64-true"),
    Support("precision", "bf16-true"),
    Support("precision", "bf16-mixed"),
    Support("precision", "16-mixed"),  # with its GradScaler
    Support("trainer", "accumulate_grad_batches"),
    Support("trainer", "gradient_clip_val"),
    Support("trainer", "gradient_clip_algorithm"),
    Support("trainer", "validation"),
    Support("trainer", "fast_dev_run"),
    Support("trainer", "fit twice"),
    Support("callback", "StochasticWeightAveraging"),
    Support("callback", "EMAWeightAveraging"),
    Support("callback", "LearningRateFinder", note=_TRIALS),
    Support("callback", "BatchSizeFinder", note=_TRIALS),
    Support("callback", "GradientAccumulationScheduler"),
    Support("module", "activation checkpointing, not reentrant"),
    Support(
        "module",
        "torch.compile in place",
        note="a whole model that was compiled before the fit is compiled once more, for its exits",
    ),
    Support("module", "configure_model"),
    Support("module", "closures that run repeatedly (LBFGS)"),
    Support("module", "training_step returns a dict"),
    Support("module", "training_step returns None"),
    Support("module", "training_step(batch)"),
    Support("module", "training_step(dataloader_iter)", "the batch never passes the callback"),
    Support(
        "module",
        "manual optimisation",
        "its training_step calls backward itself; several optimisers need it",
    ),
    Support("module", "activation checkpointing, reentrant", "its layers run without a graph"),
)


def name_of(strategy: object) -> str:
    """A strategy as the table has it: its class, and the setting that has a row of its own."""
    name, options = type(strategy).__name__, getattr(strategy, "kwargs", {})
    if name == "FSDPStrategy" and not options.get("use_orig_params", True):
        return f"{name}(use_orig_params=False)"
    if getattr(strategy, "zero_stage_3", False):
        return f"{name}(stage=3)"
    if (start := getattr(strategy, "_start_method", "popen")) != "popen":
        return f"{name}(start_method={start!r})"
    return name


def check_strategy(name: str, allow_untested: bool = False, who: str = "DensityPenalty") -> None:
    """Refuse a strategy that is not supported.

    Args:
        name: that :func:`name_of` gives.
        allow_untested: let it pass.
        who: asks, for the error.

    Raises:
        TrainerSetupError: which it is, which are supported, and the way past.
    """
    rows = {row.name: row for row in LIGHTNING if row.kind == "strategy"}
    row = rows.get(name, Support("strategy", name, "it was never tested"))
    if row.refused is None or allow_untested:
        return
    allowed = ", ".join(each.name for each in rows.values() if each.refused is None)
    raise TrainerSetupError(
        f"strategy: found {name} ({row.refused}), supported are {allowed}. "
        f"{who}(allow_untested=True) runs it all the same"
    )
