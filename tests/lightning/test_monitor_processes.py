"""The callback that measures, in two processes: one set of numbers, and nobody left waiting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from softtrace.lightning import DensityMonitor
from tests.lightning.test_monitor import BLOCKS, Validated, run
from tests.support import warm
from tests.support.processes import script_environment

PROCESSES = """
import json, sys, warnings
from pathlib import Path
import torch
from softtrace.lightning import DensityMonitor
from tests.support.fitting import Batches, batches, trainer
from tests.lightning.test_monitor import BLOCKS, Validated

class Breaks(DensityMonitor):
    def _read(self, model, inputs, device):
        if torch.distributed.get_rank() == 1:
            raise ArithmeticError("broken here")
        return super()._read(model, inputs, device)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    out, world, *ways = sys.argv[1], *map(str, sys.argv[2:])
    kinds = {"given": lambda: DensityMonitor(BLOCKS), "kept": lambda: DensityMonitor(max_rows=6),
             "one row": lambda: DensityMonitor(BLOCKS[:1]), "breaks": lambda: Breaks(BLOCKS)}
    found = {}
    for way in ways:
        monitor = kinds[way]()
        fitting = trainer(
            monitor, devices=int(world), strategy="ddp", limit_val_batches=1.0,
            val_check_interval=2, use_distributed_sampler=False,
        )
        try:
            fitting.fit(Validated(), batches(), Batches(*batches(6).batches[4:]))
        except Exception as error:
            print(f"rank {fitting.global_rank}: {type(error).__name__}: {error}", file=sys.stderr)
            sys.stderr.flush()
            torch.distributed.barrier()  # both have said it before one ends
            sys.exit(3)
        logged = float(fitting.callback_metrics["density/area_easy"])
        found[way] = [monitor.history, logged]
        Path(f"{out}.{fitting.global_rank}").write_text(json.dumps(found))
    # Only the end of the first process is waited for: by then both files have to be whole.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def in_processes(folder: Path, *ways: str, world: int = 2) -> CompletedProcess[str]:
    script, out = folder / "job.py", folder / "out"
    script.write_text(PROCESSES, encoding="utf-8")
    return warm.run(
        [sys.executable, script, out, world, *ways],
        env=script_environment(), capture_output=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    done = in_processes(tmp_path, "given", "kept", "one row")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    # both see all batches here, so that the weights are those of one process, and each keeps the
    # same three rows
    for way, alone in (
        ("given", DensityMonitor(BLOCKS)),
        ("kept", DensityMonitor(max_rows=3)),
        ("one row", DensityMonitor(BLOCKS[:1])),
    ):
        run(Validated(), alone)
        history, logged = first[way]
        assert logged == pytest.approx(history[-1]["area_easy"])
        for found, wanted in zip(history, alone.history, strict=True):
            if way == "kept":  # twice the tokens; ties are counted on other sides of a quantile
                names = ("step", "area_all", "size_all", "exit_agreement_all")
                assert found["tokens"] == 2 * wanted["tokens"]
                wanted = {name: wanted[name] for name in names}
            for name, value in wanted.items():
                assert found[name] == pytest.approx(value, abs=1e-5), (way, name)


@pytest.mark.slow
def test_a_measurement_that_fails_in_one_process_ends_both(tmp_path: Path) -> None:
    done = in_processes(tmp_path, "breaks")
    assert done.returncode != 0
    assert "rank 1: ArithmeticError: broken here" in done.stderr
    assert (
        "rank 0: SofttraceError: process 1 (of 0 to 1) failed: ArithmeticError: broken here"
        in done.stderr
    )
