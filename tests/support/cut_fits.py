"""``softtrace fit`` in two processes that share one model, cut and resumed, by engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.jobs import End, Jobs

OF_FSDP2 = (
    *("--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"),
    *("--trainer.strategy.data_parallel_size", 2, "--trainer.strategy.tensor_parallel_size", 1),
)
WHOLE = (*OF_FSDP2, "--trainer.strategy.save_distributed_checkpoint", "false")
OF_FSDP1 = (
    *("--trainer.strategy", "tests.support.ways_to_resume.FSDPStrategy"),
    *("--trainer.strategy.state_dict_type", "full"),
)


def of_zero(stage: int) -> tuple[object, ...]:
    """Options of a stage of ZeRO, on CPUs."""
    of_class = "tests.support.ways_to_resume.DeepSpeedStrategy"
    return ("--trainer.strategy", of_class, "--trainer.strategy.stage", stage)


#: engine -> options of ``softtrace fit``
PARTS: dict[str, tuple[object, ...]] = {
    "FSDP2": WHOLE, "FSDP1": OF_FSDP1, **{f"ZeRO {stage}": of_zero(stage) for stage in (1, 2, 3)},
}  # fmt: skip
#: what goes wrong, one after the other: fault, step, process, what is said of it
FAULTS = (
    ("raise", 2, 1, "planned failure of rank 1"),
    ("kill", 4, 1, ""),
    ("kill in save", 5, 0, ""),
)


def cut_and_resumed(
    jobs: Jobs,
    out: Path,
    parts: Sequence[object],
    faults: Sequence[tuple[str, int, int, str]] = FAULTS,
) -> End:
    """The end of a fit that each of the faults cut and the next run resumed.

    Args:
        jobs: with the model and the text.
        out: where it fits; nothing is there yet.
        parts: options of the engine and of how many processes.
        faults: as :data:`FAULTS`.
    """
    for fault, at, rank, said in faults:
        again = ("--resume", "true") if out.exists() else ()
        cut = jobs.run(out, fault, at, rank, *parts, *again)
        assert cut.code != 0, f"{fault} did not end it"  # of both processes: nobody waits
        assert said in cut.said
    end = jobs.run(out, "none", 0, 0, *parts, "--resume", "true")
    assert end.code == 0, end.said
    assert "holds no checkpoint yet" not in end.said
    return end
