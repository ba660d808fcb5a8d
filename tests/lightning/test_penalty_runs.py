"""Whole runs with the penalty: resumed, from the command line, in two processes."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from softtrace import DensityLoss, DensityOptions
from softtrace.errors import TrainerSetupError
from softtrace.lightning import DensityPenalty
from softtrace.lightning.datamodule import PackedDataModule
from softtrace.lightning.penalty import STATE_KEY
from softtrace.model.exit_maps import exit_maps_of
from tests.support.corpus import byte_tokenizer, write_tree
from tests.support.fitting import Calls, Tuner, batches, fit, trainer, weights
from tests.support.lightning_runs import ByteTuner, data_module, fit_corpus, fit_in_processes
from tests.support.processes import as_rank
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.thorough

# --- resuming


class Validates(Tuner):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss/held_out", self.model(**batch).loss)


def test_without_a_fit_exits_are_read_through_the_maps_of_the_checkpoint(tmp_path: Path) -> None:
    def save(fitting: Any, *_: Any) -> None:
        fitting.save_checkpoint(tmp_path / f"{fitting.global_step}.ckpt")

    def maps_of(module: Any) -> list[Tensor]:
        return [each.clone() for each in exit_maps_of(module.model).parameters()]

    def validate(penalty: DensityPenalty, module: Any) -> list[Tensor]:
        validating = trainer(penalty, limit_val_batches=1)
        validating.validate(
            module, batches(1), tmp_path / "3.ckpt", verbose=False, weights_only=True
        )
        return maps_of(module)

    penalty, module = DensityPenalty(0.5), Validates()
    trainer(penalty, Calls(on_train_batch_end=save)).fit(module, batches(), batches(1))
    last = maps_of(module)
    early = validate(DensityPenalty(0.5, seed=7), Validates())  # draws nothing, any seed will do
    assert not torch.equal(early[0], last[0])
    for again in (penalty, DensityPenalty(0.5)):
        assert torch.equal(validate(again, module)[0], early[0])
    assert penalty._exit_maps is not None
    assert torch.equal(penalty._exit_maps.state()["after_layer_2"], early[0])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return write_tree(tmp_path / "tree")


@pytest.mark.parametrize(
    ("accumulate", "steps"),
    [(1, (1, 4, 6, 9)), (4, (1, 3))],  # in mid-epoch, after an epoch; before, in, after the rise
)
def test_resumed_fit_ends_as_the_straight_one_bit_by_bit(
    corpus: Path, accumulate: int, steps: tuple[int, ...]
) -> None:
    straight = fit_corpus(corpus, accumulate=accumulate)
    for step in steps:
        resumed = fit_corpus(corpus, corpus.parent / f"step={step}.ckpt", accumulate)
        assert torch.equal(resumed, straight), step
    # What the comparison would notice: another strength from there on.
    other = fit_corpus(corpus, corpus.parent / f"step={steps[1]}.ckpt", accumulate, warmup_steps=7)
    assert not torch.equal(other, straight)


def test_a_checkpoint_that_is_saved_after_the_end_has_the_maps_of_exits_too(tmp_path: Path) -> None:
    def fitted(epochs: int, resumed: Path | None = None) -> tuple[Any, Tensor]:
        torch.manual_seed(0)
        fitting, module = trainer(DensityPenalty(0.5), max_epochs=epochs), Tuner()
        fitting.fit(module, batches(), ckpt_path=resumed, weights_only=True)
        return fitting, weights(module)

    first, _ = fitted(1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    assert torch.equal(fitted(2, tmp_path / "first.ckpt")[1], fitted(2)[1])


LOGGED = ("loss/task", "loss/density", "density/soft_size", "density/distortion",
          "density/easy_share", "density/exit_distance")  # fmt: skip


MASKED_SELDOM = {"start_step": 1, "every": 3, "crop": 12, "exits": 0.3}


def fit_and_note(corpus: Path, ckpt_path: Path | None = None) -> dict[int, list[float]]:
    """What is logged at every step of two epochs, each of which leaves a checkpoint once."""
    noted = {}

    def note(fitting: Any, *_: Any) -> None:
        noted[fitting.global_step] = [float(fitting.callback_metrics[name]) for name in LOGGED]
        if ckpt_path is None:
            fitting.save_checkpoint(corpus.parent / f"step={fitting.global_step}.ckpt")

    torch.manual_seed(0)
    penalty = DensityPenalty(0.5, **MASKED_SELDOM)
    fitting = trainer(penalty, Calls(on_train_batch_end=note), max_epochs=2)
    fitting.fit(ByteTuner(), data_module(corpus), ckpt_path=ckpt_path, weights_only=True)
    return noted


def test_resumed_between_masked_runs_it_logs_what_the_straight_one_does(corpus: Path) -> None:
    straight = fit_and_note(corpus)
    assert list(straight) == list(range(1, 13))
    sizes = [values[2] for values in straight.values()]
    assert math.isnan(sizes[0])  # masked runs are at the second step, the fifth, ...
    assert len(set(sizes[1:])) == 4
    for step in range(1, 12):
        resumed = fit_and_note(corpus, corpus.parent / f"step={step}.ckpt")
        assert list(resumed) == list(range(step + 1, 13))
        for at, values in resumed.items():
            assert values == pytest.approx(straight[at], rel=0, abs=0, nan_ok=True), (step, at)


def test_what_another_fit_logged_is_not_gone_on_from(corpus: Path) -> None:
    fit_and_note(corpus)
    kept = torch.load(corpus.parent / "step=4.ckpt", weights_only=True)
    penalty, sizes = DensityPenalty(0.5, **MASKED_SELDOM), []
    penalty.on_load_checkpoint(trainer(), Tuner(), kept)
    note = Calls(
        on_train_batch_end=lambda t, *_: sizes.append(float(t.callback_metrics[LOGGED[2]]))
    )
    fit(Tuner(), penalty, note)
    assert math.isnan(sizes[0])


def test_state_is_plain_and_versioned(corpus: Path) -> None:
    straight = fit_corpus(corpus)
    checkpoint = torch.load(corpus.parent / "step=4.ckpt", weights_only=True)
    state = checkpoint[STATE_KEY]
    assert (state["version"], state["seed"], state["budget"]) == (3, 3, None)
    assert set(state["log"]["measured"]) == set(LOGGED[2:])
    for version in (4, "1", None):
        checkpoint[STATE_KEY] = {**state, "version": version}
        torch.save(checkpoint, corpus.parent / "other.ckpt")
        with pytest.raises(TrainerSetupError, match=f"version {version!r}, this run has 3"):
            fit_corpus(corpus, corpus.parent / "other.ckpt")
    # As it was before the log was kept, but for the maps.
    checkpoint[STATE_KEY] = {"version": 1, "seed": 3, "exit_maps": state["exit_maps"]}
    torch.save(checkpoint, corpus.parent / "older.ckpt")
    assert torch.equal(fit_corpus(corpus, corpus.parent / "older.ckpt"), straight)


def test_resuming_with_another_seed_is_refused(corpus: Path) -> None:
    fit_corpus(corpus)
    with pytest.raises(TrainerSetupError, match="found DensityPenalty seed 3, this run has 4"):
        fit_corpus(corpus, corpus.parent / "step=4.ckpt", seed=4)


def test_checkpoint_without_the_penalty_can_be_continued_with_it(tmp_path: Path) -> None:
    module = Tuner()
    fit(module).save_checkpoint(tmp_path / "plain.ckpt")
    before = weights(module).clone()
    continued = trainer(DensityPenalty(), max_epochs=2)
    continued.fit(module, batches(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert continued.global_step == 8
    assert continued.callback_metrics["loss/density"] > 0
    assert not torch.equal(weights(module), before)


# --- the command line

PENALTY = "softtrace.lightning.DensityPenalty"
QUIET = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
DATA = ("--data.path=nowhere",)


def command_line(monkeypatch: pytest.MonkeyPatch, *args: str, run: bool = False) -> Any:
    """A command line as users of LightningCLI write it; with ``run``, its ``fit``."""
    monkeypatch.setattr(sys, "argv", ["train"])  # it warns if there are arguments in both places
    quiet = [f"--trainer.{switch}=false" for switch in QUIET]
    return LightningCLI(
        ByteTuner,
        PackedDataModule,
        run=run,
        args=[*(["fit"] if run else []), *quiet, *args],
        save_config_callback=None,
        seed_everything_default=False,
    )


def penalty_of(cli: Any) -> DensityPenalty:
    (penalty,) = cli.trainer.callbacks
    assert isinstance(penalty, DensityPenalty)
    return penalty


def test_options_from_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"strength": "0.3", "thresholds": "[0.01,0.3]", "easiness": "margin", "crop": "7"}
    flags = [f"--trainer.callbacks.{name}={value}" for name, value in given.items()]
    cli = command_line(monkeypatch, *DATA, f"--trainer.callbacks+={PENALTY}", *flags)
    assert penalty_of(cli).options == DensityOptions(
        strength=0.3, thresholds=(0.01, 0.3), easiness="margin", crop=7
    )
    cli = command_line(monkeypatch, *DATA, f"--trainer.callbacks+={PENALTY}")
    assert penalty_of(cli).options == DensityOptions()


CONFIG = f"""
trainer:
  callbacks:
    - class_path: {PENALTY}
      init_args:
        strength: 0.4
        warmup_steps: 3
        masks: soft
        thresholds: [0.02, 0.2]
        depths: [0.25, 0.75]
        crop: 12
        on_nonfinite: skip
"""
CONFIGURED = DensityOptions(
    strength=0.4,
    warmup_steps=3,
    masks="soft",
    thresholds=(0.02, 0.2),
    depths=(0.25, 0.75),
    crop=12,
    on_nonfinite="skip",
)


def test_options_from_yaml_and_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given, saved = tmp_path / "given.yaml", tmp_path / "saved.yaml"
    given.write_text(CONFIG, encoding="utf-8")
    cli = command_line(monkeypatch, f"--config={given}", *DATA)
    assert penalty_of(cli).options == CONFIGURED
    # As Lightning saves it next to a run: defaults are spelled out, and it can be read again.
    cli.parser.save(cli.config, saved)
    text = saved.read_text(encoding="utf-8")
    # what the device or the preset decides is left to them
    named = [f.name for f in fields(DensityOptions) if f.default is not None]
    assert all(f"      {name}:" in text for name in named)
    cli = command_line(monkeypatch, f"--config={saved}")
    assert penalty_of(cli).options == CONFIGURED


def test_fit_from_yaml(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    config = corpus.parent / "config.yaml"
    data = {"path": corpus, "tokenizer": corpus.parent / "tokenizer", "block_size": 16}
    lines = "".join(f"  {name}: {value}\n" for name, value in data.items())
    config.write_text(f"{CONFIG}  fast_dev_run: 2\ndata:\n{lines}", encoding="utf-8")
    cli = command_line(monkeypatch, f"--config={config}", run=True)
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["loss/density"] > 0


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("strengt", "1", "strengt"),
        ("masks", "blue", "blue"),
        ("thresholds", "[0.1]", "thresholds"),
        ("crop", "many", "many"),
        ("seed", "1.5", "1.5"),
        ("share", "2", r"share: found 2.0, allowed \(0, 1\]"),
    ],
)
def test_wrong_options_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    part: str,
) -> None:
    flags = [f"--trainer.callbacks+={PENALTY}", f"--trainer.callbacks.{name}={value}"]
    with pytest.raises((SystemExit, ValueError)) as refusal:
        command_line(monkeypatch, *DATA, *flags)
    assert re.search(part, capsys.readouterr().err + str(refusal.value))


#: as jsonargparse writes unions that it reads from strings
UNIONS = {
    "Optional[float]": "float | null",
    "Optional[bool]": "bool | null",
    "Optional[Literal['straight', 'soft']]": "Literal['straight', 'soft'] | null",
    "Optional[tuple[float, float]]": "tuple[float, float] | null",
    "Union[str, dict[int, float], null]": "str | dict[int, float] | null",
}


def test_help_shows_every_option_with_its_meaning_type_and_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        command_line(monkeypatch, f"--trainer.callbacks.help={PENALTY}")
    text = capsys.readouterr().out.replace("\n", "  ")
    hints = get_type_hints(DensityOptions)
    for field in fields(DensityOptions):
        flag = rf"  --trainer\.callbacks\.{field.name} \S+"
        shown = re.search(rf"{flag} +(\S.*?) \(type: (.*?), default: (.*?)\)  ", text)
        assert shown, field.name
        assert len(shown[1]) > 10
        hint = hints[field.name]
        of_type = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
        if field.default is None and "None" not in of_type:
            of_type += " | None"  # the preset's, which is a number once it is made
        wanted = re.sub(r"typing\.|collections\.abc\.", "", of_type).replace("None", "null")
        assert UNIONS.get(shown[2], shown[2]) == wanted
        assert shown[3] == str(field.default).replace("None", "null")


# --- two processes


def fit_by_hand(strength: float, world: int) -> Tensor:
    """Every process's batches one after the other, gradients averaged; no Lightning, no DDP."""
    model = tiny_model("llama").train()
    density = DensityLoss(model, strength=strength)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    every = batches(4 * world).batches
    every[world + 1]["labels"].fill_(-100)
    for step in range(4):
        first = step % 2 * 2 * world
        for number, batch in enumerate(every[first : first + 2 * world]):
            with density.watching():
                task = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
            with as_rank(number % world):
                term = density(**batch, step=step, micro_step=number // world).loss
            ((task + term) / (2 * world)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_the_loop_by_hand(tmp_path: Path, world: int) -> None:
    ranks = fit_in_processes(tmp_path, 0.75, world)
    assert all(torch.equal(rank["weights"], ranks[0]["weights"]) for rank in ranks)
    assert all(rank["clean"] for rank in ranks)
    wanted, plain = (fit_by_hand(strength, world) for strength in (0.75, 0.0))
    torch.testing.assert_close(ranks[0]["weights"], wanted, atol=1e-4, rtol=0)
    assert (wanted - plain).abs().max() > 0.01
    for number, rank in enumerate(ranks):
        found = [noted["loss/density"] > 0 for noted in rank["noted"]]
        assert found == [True, number != 1, True, True] * 2


@pytest.mark.slow
def test_strength_0_is_inert_in_two_processes(tmp_path: Path) -> None:
    silent, plain = (fit_in_processes(tmp_path, strength, 2) for strength in (0.0, None))
    assert torch.equal(silent[0]["weights"], silent[1]["weights"])
    assert torch.equal(silent[0]["weights"], plain[0]["weights"])
    assert not any("loss/density" in noted for noted in silent[0]["noted"])
