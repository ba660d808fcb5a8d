"""What happens to real training processes when something goes wrong: an end, a reason, no loss."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softtrace.cli.fit import fit
from softtrace.errors import CheckpointError
from softtrace.files import LOCK
from softtrace.lightning import AtomicCheckpointIO
from tests.support.jobs import ROOT, Jobs, saved
from tests.support.processes import script_environment
from tests.support.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.slow


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) == 0.0


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def straight(jobs: Jobs) -> dict[str, Tensor]:
    """The weights of a run that nothing happened to, in this process: none of the forked ones."""
    out = jobs.root / "straight"
    fit(jobs.options(out))
    return saved(out)


def resume(jobs: Jobs, out: Path) -> dict[str, Tensor]:
    end = jobs.run(out, "none", 0, 0, "--resume", "true")
    assert end.code == 0, end.said[-3000:]
    assert not (out / LOCK).exists()
    assert not [path for path in (out / "checkpoints").iterdir() if path.name != "last.ckpt"]
    return saved(out)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("kill", -signal.SIGKILL, ""),
        ("kill in save", -signal.SIGKILL, ""),
        ("kill in write", -signal.SIGKILL, ""),
        ("terminate", 143, "terminated; --resume true"),
        ("interrupt", 130, "interrupted"),
        ("disk full", 1, "last.ckpt: could not be written (OSError"),
    ],
)
def test_a_run_that_was_cut_resumes_to_the_same_weights(
    jobs: Jobs, straight: dict[str, Tensor], tmp_path: Path, fault: str, code: int, said: str
) -> None:
    out = tmp_path / "out"
    end = jobs.run(out, fault, 5)
    assert end.code == code, end.said[-3000:]
    assert said in end.said
    assert not (out / "model.safetensors").exists()
    assert (out / LOCK).exists() == (code == -signal.SIGKILL)
    torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)  # whole, whatever happened
    assert_same(resume(jobs, out), straight)


def test_killed_at_random_moments_it_always_resumes(
    jobs: Jobs, straight: dict[str, Tensor], tmp_path: Path
) -> None:
    draws, out = random.Random(0), tmp_path / "out"
    last = out / "checkpoints" / "last.ckpt"
    for _ in range(4):
        # It stays at the last step: whatever the moment, there is something to kill.
        process = jobs.start(out, "stay", 7, 0, *(("--resume", "true") if out.exists() else ()))
        # The imports are not what is of interest.
        wait_until(lambda p=process: p.poll() is not None or last.exists(), "a checkpoint")
        time.sleep(draws.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said[-3000:]
    assert_same(resume(jobs, out), straight)


def test_weights_that_are_not_finite_stop_the_run_by_name(jobs: Jobs, tmp_path: Path) -> None:
    end = jobs.run(tmp_path / "out", "nan", 4)
    assert end.code != 0
    assert "step 4: " in end.said
    assert "NaN or inf" in end.said


@pytest.mark.parametrize(
    ("fault", "rank", "code", "said"),
    [
        ("terminate", 0, 143, "terminated; --resume true"),
        ("terminate", 1, 143, "terminated; --resume true"),
        ("disk full", 0, 1, "last.ckpt: could not be written (OSError"),
    ],
)
def test_what_happens_to_one_process_ends_both(
    jobs: Jobs, tmp_path: Path, fault: str, rank: int, code: int, said: str
) -> None:
    two = ("--trainer.strategy", "ddp", "--trainer.devices", 2)
    end = jobs.run(tmp_path / "out", fault, 3, rank, *two)
    assert end.code == code, end.said[-3000:]
    assert said in end.said
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_the_others(jobs: Jobs, tmp_path: Path, rank: int) -> None:
    two = ("--trainer.strategy", "ddp", "--trainer.devices", 2)
    end = jobs.run(tmp_path / "out", "raise", 3, rank, *two)
    assert end.code != 0
    assert f"planned failure of rank {rank}" in end.said


@pytest.mark.parametrize(
    ("fault", "rank", "said"),
    [
        ("raise", 0, "planned failure of rank 0"),
        ("raise", 1, "planned failure of rank 1"),
        ("interrupt", 1, "softtrace fit: interrupted"),
        ("leave", 1, "process 1 ended itself (SystemExit: 0) before the fit was over"),
    ],
)
def test_a_rank_that_fails_ends_also_where_its_exit_would_wait_for_the_others(
    jobs: Jobs, tmp_path: Path, fault: str, rank: int, said: str
) -> None:
    """In interpreters of their own: a fork of the tests' server leaves out what runs at an exit."""
    code, found = in_interpreters(jobs, tmp_path / "out", f"{fault}, and wait", 3, rank)
    assert code != 0
    assert said in found


def test_a_rank_ends_when_the_one_that_started_it_is_gone(jobs: Jobs, tmp_path: Path) -> None:
    code, found = in_interpreters(jobs, tmp_path / "out", "kill the first", 3, 1)
    assert code == -signal.SIGKILL
    assert "which started this one, is gone" in found


def in_interpreters(jobs: Jobs, out: Path, fault: str, at: int, rank: int) -> tuple[int, str]:
    """The end of two processes, of which nothing is left: both hold what is read."""
    two = ("--trainer.strategy", "ddp", "--trainer.devices", 2)
    process = subprocess.Popen(
        jobs.command(out, fault, at, rank, *two), cwd=ROOT, env=script_environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0,
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def test_a_slow_rank_is_waited_for(jobs: Jobs, tmp_path: Path) -> None:
    two = ("--trainer.strategy", "ddp", "--trainer.devices", 2)
    found = []
    for fault in ("none", "slow"):
        end = jobs.run(tmp_path / fault, fault, 2, 1, *two)
        assert end.code == 0, end.said[-3000:]
        found.append(saved(tmp_path / fault))
    assert_same(*found)


@pytest.fixture(scope="module")
def cut(jobs: Jobs) -> Path:
    """The folder of a run that was killed."""
    out = jobs.root / "cut"
    assert jobs.run(out, "kill", 4).code == -signal.SIGKILL
    return out


def inside_a_tensor(checkpoint: Path) -> bytes:
    """The bytes of its largest tensor: elsewhere there may be padding that nobody reads."""
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        return archive.read(largest)


@pytest.mark.parametrize(
    "damage", ["cut short", "first bytes", "other things", "empty", "one byte"]
)
def test_a_damaged_checkpoint_is_refused_by_name(
    jobs: Jobs, cut: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(cut, tmp_path / "out")
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    assert AtomicCheckpointIO().load_checkpoint(last, weights_only=True)["global_step"] == 4
    if damage == "other things":
        torch.save({"state_dict": Path("/")}, last)  # an object that only its code can make
    else:
        kept = {"cut short": whole[: len(whole) // 2], "empty": b""}
        at = whole.index(inside_a_tensor(last)) + 8
        kept["one byte"] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        last.write_bytes(kept.get(damage, bytes(64) + whole[64:]))
    with pytest.raises(CheckpointError, match=r"last\.ckpt: cannot be read"):
        AtomicCheckpointIO().load_checkpoint(last, weights_only=True)
    if damage == "cut short":  # from the command line: one line, and nothing is taken away
        end = jobs.run(tmp_path / "out", "none", 0, 0, "--resume", "true")
        assert end.code == 1
        assert "last.ckpt: cannot be read" in end.said
        assert "Traceback" not in end.said
        assert last.exists()
