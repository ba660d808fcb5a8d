"""Lightning's ModelParallelStrategy and FSDPStrategy: a fit in parts, checkpoints, and ``fit``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from softtrace.cli.fit import fit
from softtrace.errors import InvalidInputError, TrainerSetupError
from softtrace.lightning import DensityMonitor, module
from softtrace.lightning.module import CausalLM
from softtrace.lightning.sharded import check_sharding, say_batch_size, shard
from tests.support import warm
from tests.support.cut_fits import OF_FSDP1, OF_FSDP2, WHOLE, cut_and_resumed
from tests.support.fitting import Batches, trainer
from tests.support.jobs import End, Jobs, saved
from tests.support.processes import script_environment
from tests.support.tiny import tiny_model
from tests.support.ways_to_resume import (
    BATCHES,
    BLOCKS,
    KEPT,
    OfBlocks,
    Ranked,
    by_hand,
    fit_in_parts,
    validation,
)
from tests.support.ways_to_shard import whole_weights


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["FSDP2", "FSDP1"])
def test_two_processes_fit_as_one_and_one_goes_on(tmp_path: Path, way: str) -> None:
    after, whole = fit_in_parts(tmp_path, 2, way=way), by_hand(2)
    torch.testing.assert_close(after, whole_weights(whole), atol=1e-10, rtol=0)
    check_measured(tmp_path, whole)
    assert (tmp_path / "parts.ckpt").is_dir()  # of each process its part
    loaded = fit_in_parts(tmp_path, 1, tmp_path / "parts.ckpt", way=way)
    assert loaded.keys() == after.keys()
    assert all(torch.equal(loaded[name], after[name]) for name in after)


def check_measured(
    folder: Path, whole: nn.Module, steps: int = BATCHES, allowed: float = 1e-9
) -> None:
    """Every process has the numbers of one that measures the whole model on the whole set."""
    seen = [validation(rank) for rank in range(2)]
    kept = {name: torch.cat([each[name][:KEPT] for each in seen]) for name in seen[0]}
    ranked = Ranked(1)
    ranked.model = whole
    monitors = (OfBlocks(BLOCKS, batch_size=1), DensityMonitor(max_rows=2 * KEPT))
    trainer(*monitors, limit_val_batches=1.0).validate(ranked, Batches(kept), verbose=False)
    wanted = [monitor.history[-1] for monitor in monitors]
    for rank in range(2):
        for found, each in zip(torch.load(folder / f"measured-{rank}.pt"), wanted, strict=True):
            assert found["step"] == steps
            assert {**found, "step": 0} == pytest.approx(each, abs=allowed)


def command(jobs: Jobs, out: Path, *more: object) -> list[str]:
    words = [
        *("--model.path", jobs.model, "--data.path", jobs.text, "--out", out),
        *("--data.block_size", 16, "--data.batch_size", 4, "--trainer.max_steps", 3),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.limit_val_batches", 0, "--model.recompute", "true", "--card_blocks", 0),
        *("--trainer.devices", 2, *more),
    ]
    return [str(word) for word in words]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("way", "lora"), [(WHOLE, ()), (WHOLE, ("--model.lora.rank", 2)), (OF_FSDP1, ())]
)
def test_softtrace_fit_saves_a_whole_model(
    tmp_path: Path, way: tuple[object, ...], lora: tuple[object, ...]
) -> None:
    jobs, out = Jobs(tmp_path), tmp_path / "out"
    options = *way, "--checkpoint_every", 2, *lora
    words = [sys.executable, "-m", "softtrace.cli", "fit", *command(jobs, out, *options)]
    done = warm.run(words, env=script_environment(), capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    saved, before = (
        load_file(out / "model.safetensors"),
        load_file(jobs.model / "model.safetensors"),
    )
    assert {name: each.shape for name, each in saved.items()} == {
        name: each.shape for name, each in before.items()
    }
    same = {name for name in saved if torch.equal(saved[name], before[name])}
    if lora:  # matrices of layers alone are others
        matrices = {name for name in saved if ".h." in name and saved[name].dim() == 2}
        assert same == saved.keys() - matrices
    else:
        assert "transformer.wte.weight" not in same
    AutoModelForCausalLM.from_pretrained(out)
    assert (out / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "faults"),
    [
        (WHOLE, [("kill", 5, 1, "")]),  # one of each; all of FAULTS by exactness.py
        (OF_FSDP1, [("raise", 2, 1, "planned failure of rank 1")]),
    ],
)
def test_a_fit_in_parts_that_was_cut_resumes_to_the_same_weights(
    tmp_path: Path, way: tuple[object, ...], faults: list[tuple[str, int, int, str]]
) -> None:
    jobs, parts = Jobs(tmp_path), (*way, "--trainer.devices", 2, "--trainer.max_steps", 6)
    assert jobs.run(tmp_path / "straight", "none", 0, 0, *parts).code == 0
    cut_and_resumed(jobs, tmp_path / "cut", parts, faults)
    straight, resumed = saved(tmp_path / "straight"), saved(tmp_path / "cut")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_no_process_ends_before_its_part_of_the_model_is_gathered(tmp_path: Path) -> None:
    options = *WHOLE, "--trainer.devices", 2, "--checkpoint_every", 0
    end = Jobs(tmp_path).run(tmp_path / "out", "gather late", 1, 0, *options)
    assert end.code == 0, end.said[-3000:]


@pytest.mark.slow
def test_a_fit_in_parts_resumes_at_another_number_of_processes(tmp_path: Path) -> None:
    jobs, out = Jobs(tmp_path), tmp_path / "out"

    def run(processes: int, epochs: int) -> End:
        number = "--trainer.strategy.data_parallel_size", processes, "--trainer.devices", processes
        length = "--trainer.max_steps", -1, "--trainer.max_epochs", epochs, "--data.batch_size", 64
        again = ("--resume", "true") if out.exists() else ()
        return jobs.run(out, "none", 0, 0, *WHOLE, *number, *length, *again)

    assert run(2, 1).code == 0
    before = saved(out)
    assert run(3, 1).code == 0  # which has nothing left to do
    assert all(torch.equal(each, before[name]) for name, each in saved(out).items())
    end = run(3, 2)
    assert end.code == 0, end.said
    assert not torch.equal(saved(out)["transformer.wte.weight"], before["transformer.wte.weight"])


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (OF_FSDP2, "save_distributed_checkpoint: found true"),
        ((*OF_FSDP1, "--trainer.strategy.state_dict_type", "sharded"), "state_dict_type: found sh"),
    ],
)
def test_checkpoints_that_a_kill_would_spoil_are_refused(
    tmp_path: Path, way: tuple[object, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        fit(command(Jobs(tmp_path), tmp_path / "out", *way))


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (("--trainer.strategy.tensor_parallel_size", 2), "2"),
        (("--trainer.strategy.tensor_parallel_size", "auto"), r"auto \(Lightning's own, which is"),
        ((), r"auto \(Lightning's own"),
    ],
)
def test_tensor_parallelism_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...], found: str
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(module, "load_model", lambda *args, **options: loaded.append(args))
    strategy = "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"
    message = rf"tensor_parallel_size: found {found}.*allowed is 1, .*inside of a matrix"
    with pytest.raises(InvalidInputError, match=message):
        fit(command(Jobs(tmp_path), tmp_path / "out", *strategy, *more))
    assert loaded == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "installed", "message"),
    [
        ("deepspeed_stage_2", {}, False, "DeepSpeed is not installed .* pip install deepspeed"),
        ("deepspeed_stage_3_offload", {}, True, "which offloads.* deepspeed_stage_1, deepspeed_st"),
        ("a.DeepSpeedStrategy", {"load_full_weights": True}, True, "allowed is false: it resumes"),
        ("a.DeepSpeedStrategy", {"offload_optimizer": True}, True, "offload_optimizer: found True"),
        ("deepspeed_stage_4", {}, True, "found deepspeed_stage_4, invalid .* deepspeed_stage_3,"),
        (
            "a.DeepSpeedStrategy",
            {"config": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            True,
            "config.zero_optimization: found offload_param, allowed is none",
        ),
        ("fsdp_cpu_offload", {}, True, "found fsdp_cpu_offload with offloading"),
        ("a.FSDPStrategy", {"cpu_offload": True}, True, "FSDPStrategy with offloading"),
        ("a.FSDPStrategy", {"use_orig_params": False}, True, "use_orig_params: found false"),
        ("ddp_spawn", {}, True, "found ddp_spawn, whose processes start by spawn"),
        ("a.DDPStrategy", {"start_method": "fork"}, True, "DDPStrategy, .* allowed is ddp"),
    ],
)
def test_strategies_that_cannot_be_had_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, options: Any, installed: bool, message: str
) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda _: SimpleNamespace() if installed else None
    )
    given = SimpleNamespace(class_path=name, init_args=options) if options else name
    with pytest.raises(InvalidInputError, match=message):
        check_sharding(given)


@pytest.fixture
def zero_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a configuration of DeepSpeed may be written, which seems to be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace())
    return tmp_path / "zero.json"


def by_deepspeed(**options: object) -> SimpleNamespace:
    """A strategy as the command line gives it."""
    return SimpleNamespace(class_path="a.DeepSpeedStrategy", init_args=options)


def test_a_file_of_deepspeed_that_offloads_is_refused_and_adapters_under_fsdp1(
    zero_file: Path,
) -> None:
    for device, refused in (("none", False), ("nvme", True)):
        zero = {"zero_optimization": {"offload_optimizer": {"device": device}}}
        zero_file.write_text(json.dumps(zero), encoding="utf-8")
        given = by_deepspeed(config=str(zero_file))
        if refused:
            with pytest.raises(InvalidInputError, match="found offload_optimizer"):
                check_sharding(given)
        else:
            check_sharding(given)
    check_sharding("fsdp")
    with pytest.raises(InvalidInputError, match=r"found fsdp with lora: .* ModelParallelStrategy"):
        check_sharding("fsdp", lora=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "No such file"),
        (b"{", "Expecting property name"),
        (b"\xff{}", "can't decode byte"),
        (b"[]", "a list"),
    ],
)
def test_a_file_of_deepspeed_that_cannot_be_read_is_refused_clearly(
    zero_file: Path, text: bytes | None, found: str
) -> None:
    if text is not None:
        zero_file.write_bytes(text)
    given = by_deepspeed(config=str(zero_file))
    message = rf"config: found .*zero\.json, .*{found}.*; allowed is .* JSON object; correct the"
    with pytest.raises(InvalidInputError, match=message):
        check_sharding(given)


def test_a_configuration_that_the_environment_names_is_read_too(
    zero_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(zero_file))
    # an old way to say stage 1
    zero_file.write_text('{"zero_optimization": true}', encoding="utf-8")
    check_sharding("deepspeed_stage_2")
    zero_file.write_text(
        '{"zero_optimization": {"offload_param": {"device": "cpu"}}}', encoding="utf-8"
    )
    with pytest.raises(InvalidInputError, match="found offload_param, allowed is none"):
        check_sharding("deepspeed_stage_2")


def test_deepspeed_hears_how_many_rows_a_process_has() -> None:
    strategy: Any = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # there may be no DeepSpeed
    strategy.config = {}
    say_batch_size(strategy, 4)
    say_batch_size(strategy, 5)  # what is given stays
    assert strategy.config == {"train_micro_batch_size_per_gpu": 4}
    say_batch_size(FSDPStrategy(), 4)


@pytest.mark.parametrize("stage", ["", "_stage_1", "_stage_2", "_stage_3"])
@pytest.mark.usefixtures("zero_file")
def test_stages_of_zero_are_let_through(stage: str) -> None:
    check_sharding(f"deepspeed{stage}")
    check_sharding(by_deepspeed(stage=3))


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        (tiny_model("llama"), 2, "tensor_parallel_size 2; allowed is 1"),
        (nn.Linear(2, 2), 1, "Linear does not say what its layers are"),
    ],
)
def test_what_cannot_be_sharded_is_refused(model: Any, parts: int, message: str) -> None:
    strategy: Any = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: parts)}
    with pytest.raises(TrainerSetupError, match=message):
        shard(model, strategy, "32-true")


def test_adapters_that_fsdp1_would_flatten_are_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    with pytest.raises(TrainerSetupError, match="allowed with LoRA is ModelParallelStrategy"):
        shard(model, FSDPStrategy(), "32-true")


def test_weights_decay_by_the_shapes_that_they_had_before_they_were_flattened(
    tmp_path: Path,
) -> None:
    model = CausalLM(str(Jobs(tmp_path).model), warmup_steps=0)
    model._trainer = SimpleNamespace(estimated_stepping_batches=3, strategy=None)  # type: ignore[assignment]
    shapes = [weight.dim() for weight in model.parameters()]
    for weight in model.parameters():
        weight.data = weight.data.flatten()
    decayed, others = model.configure_optimizers()["optimizer"].param_groups
    assert len(decayed["params"]) == sum(each >= 2 for each in shapes) > 0 == others["weight_decay"]
    assert len(others["params"]) == sum(each < 2 for each in shapes) > 0
