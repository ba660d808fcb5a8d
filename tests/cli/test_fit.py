"""``softtrace fit``: what it writes, what it refuses, and how it resumes after an interruption."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from softtrace.cli.evaluate import evaluate
from softtrace.cli.fit import FitCLI, fit
from softtrace.cli.main import main
from softtrace.data import TextSource, read_documents, split_by_file
from softtrace.decoding.exit_checks import exit_layer_of
from softtrace.errors import (
    DataError,
    InvalidInputError,
    ModelDirectoryError,
    OutputExistsError,
    TrainerSetupError,
)
from softtrace.files import claimed
from softtrace.lightning import DensityPenalty
from softtrace.loss.reference import read_losses
from tests.support.corpus import write_chat_model, write_model, write_parquet, write_tree
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model directory and a folder of text."""
    root = tmp_path_factory.mktemp("sources")
    return write_model(root / "model"), write_tree(root / "text")


def arguments(sources: tuple[Path, Path], out: Path, *more: object) -> list[str]:
    """A short fit whose model card has no measurements, which take as long again."""
    model, text = sources
    words = [
        *("--model.path", model, "--data.path", text, "--out", out, "--data.block_size", 16),
        *("--data.batch_size", 4, "--trainer.accelerator", "cpu", "--trainer.max_steps", 6),
        *("--model.learning_rate", 0.01, "--checkpoint_every", 2),
        *("--trainer.limit_val_batches", 0, "--trainer.enable_progress_bar", "false"),
        *("--penalty.warmup_steps", 3, "--card_blocks", 0, *more),
    ]
    return [str(word) for word in words]


def trained(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def test_writes_a_model_directory_that_transformers_reads(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("--trainer.log_every_n_steps", 1, "--card_blocks", 4)
    out = fit(arguments(sources, tmp_path / "out", *words))
    model = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(sources[0])
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert AutoTokenizer.from_pretrained(out).encode("a") == [64]
    assert 1 <= exit_layer_of(model) < model.config.num_hidden_layers
    metrics = (out / "logs" / "version_0" / "metrics.csv").read_text()
    assert "density/distortion" in metrics
    assert not list(out.glob(".*"))  # nothing half-written is left
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_are_fitted_and_measured_as_the_template_writes_them(
    tmp_path: Path, suffix: str
) -> None:
    model, text = write_chat_model(tmp_path / "model"), tmp_path / f"chat.{suffix}"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{number} and 1?"},
                {"role": "assistant", "content": f"It is {number + 1}."},
            ]
        }
        for number in range(40)
    ]
    if suffix == "jsonl":
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_parquet(text, rows)
    words = ("--data.answers_only", "true", "--trainer.log_every_n_steps", 1, "--data.seed", 3)
    words += ("--penalty.strength", 0.0, "--data.held_out_share", 0.2)
    cli = FitCLI(arguments((model, text), tmp_path / "out", *words))
    cli.fit()
    batch = next(iter(cli.datamodule.train_dataloader()))
    answers = AutoTokenizer.from_pretrained(model).decode(batch["labels"][batch["labels"] >= 0])
    assert "user" not in answers
    assert "<|im_start|>" not in answers
    assert "It is" in answers
    network = AutoModelForCausalLM.from_pretrained(model)
    logits = network(batch["input_ids"]).logits[:, :-1]
    by_hand = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    with (tmp_path / "out" / "logs" / "version_0" / "metrics.csv").open() as file:
        losses = [float(row["loss/train"]) for row in csv.DictReader(file) if row["loss/train"]]
    assert losses[0] == pytest.approx(by_hand.item(), rel=1e-5)
    density = evaluate(
        str(tmp_path / "out"), TextSource(str(text), 0.2), str(tmp_path / "density"),
        block_size=16, blocks=4, extra_blocks=0,
    )  # fmt: skip
    assert density["data"]["documents"] == len(split_by_file(read_documents(text), 0.2)[1])
    assert density["tokens"] == 4 * 7  # all of the second half, whoever speaks


def test_conversations_take_a_chat_template(sources: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "chat.jsonl"
    row = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    text.write_text(f"{row}\n" * 9)
    with pytest.raises(DataError, match=r"chat.jsonl:\d holds messages, and the tokenizer has no"):
        fit(arguments((sources[0], text), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_its_own_yaml_repeats_the_run(sources: tuple[Path, Path], tmp_path: Path) -> None:
    first = fit(arguments(sources, tmp_path / "first", "--penalty.thresholds", "[0.02, 0.4]"))
    options = yaml.safe_load((first / "fit.yaml").read_text())
    assert options["penalty"]["thresholds"] == [0.02, 0.4]
    assert options["penalty"]["strength"] == DensityPenalty().options.strength
    again = fit(["--config", str(first / "fit.yaml"), "--out", str(tmp_path / "again")])
    for name, weight in trained(first).items():
        assert torch.equal(weight, trained(again)[name]), name


class Stop(Callback):
    """As if the process had been killed in the middle of a step."""

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("killed")


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 has dropout
def test_an_interrupted_fit_resumes_to_the_same_weights(
    sources: tuple[Path, Path], tmp_path: Path, family: str
) -> None:
    sources = write_model(tmp_path / "model", family), sources[1]
    whole = fit(arguments(sources, tmp_path / "whole"))
    cut = tmp_path / "cut"
    interrupted = FitCLI(arguments(sources, cut))
    interrupted.trainer.callbacks.append(Stop())
    with pytest.raises(RuntimeError, match="killed"):
        interrupted.fit()
    assert not (cut / "model.safetensors").exists()
    fit(arguments(sources, cut, "--resume", "true"))
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(cut)[name]), name
    # the control: without the checkpoint's steps the end is another one
    short = trained(fit(arguments(sources, tmp_path / "short", "--trainer.max_steps", 2)))
    assert not any(torch.equal(weight, short[name]) for name, weight in trained(whole).items())


def test_a_fit_bounded_by_time_alone_keeps_its_learning_rate(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("--trainer.max_steps", -1, "--trainer.max_time", "00:00:00:01")
    words += ("--model.warmup_steps", 2)
    rates = []

    class Last(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    cli = FitCLI(arguments(sources, tmp_path / "out", *words))
    cli.trainer.callbacks.append(Last())  # type: ignore[attr-defined]
    cli.fit()
    assert cli.trainer.global_step > 2
    assert rates == [0.01]


@pytest.mark.thorough
def test_resuming_before_the_first_checkpoint_starts_anew(
    sources: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fit(arguments(sources, out, "--resume", "true"))
    assert "no checkpoint yet" in caplog.text
    whole = fit(arguments(sources, tmp_path / "whole"))
    assert torch.equal(trained(out)["lm_head.weight"], trained(whole)["lm_head.weight"])


@pytest.mark.thorough
def test_strength_zero_is_plain_fine_tuning(sources: tuple[Path, Path], tmp_path: Path) -> None:
    inert = fit(arguments(sources, tmp_path / "inert", "--penalty.strength", 0))
    without = FitCLI(arguments(sources, tmp_path / "without"))
    without.trainer.callbacks[:] = [
        callback
        for callback in without.trainer.callbacks
        if not isinstance(callback, DensityPenalty)
    ]
    without.fit()
    active = fit(arguments(sources, tmp_path / "active"))
    for name, weight in trained(inert).items():
        assert torch.equal(weight, trained(tmp_path / "without")[name]), name
    assert not torch.equal(trained(inert)["lm_head.weight"], trained(active)["lm_head.weight"])


@pytest.mark.thorough
def test_a_budget_is_counted_from_the_folder_of_a_plain_fit(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("--trainer.limit_val_batches", 1, "--trainer.val_check_interval", 1)
    words += ("--trainer.log_every_n_steps", 1)
    plain = fit(arguments(sources, tmp_path / "plain", *words, "--penalty.strength", 0))
    assert sorted(read_losses(plain)) == [1, 2, 3, 4, 5, 6]
    words += ("--penalty.budget", 0.01, "--penalty.reference", plain)
    held = fit(arguments(sources, tmp_path / "held", *words))
    with (held / "logs" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["density/strength"]]
    strengths = [float(row["density/strength"]) for row in rows]
    assert strengths[:4] == pytest.approx([0.35] * 4)  # the warm-up takes 3 steps
    assert strengths[4] != strengths[5]
    assert all(row["density/budget_spent"] not in ("", "nan") for row in rows[1:])
    again = fit(["--config", str(held / "fit.yaml"), "--out", str(tmp_path / "again")])
    assert torch.equal(trained(again)["lm_head.weight"], trained(held)["lm_head.weight"])


def test_goes_over_the_text_once_by_default(sources: tuple[Path, Path], tmp_path: Path) -> None:
    cli = FitCLI(arguments(sources, tmp_path / "a", "--trainer.max_steps", -1))
    assert (cli.trainer.max_epochs, cli.trainer.max_steps) == (1, -1)
    cli = FitCLI(arguments(sources, tmp_path / "b"))
    assert (cli.trainer.max_epochs, cli.trainer.max_steps) == (None, 6)


def test_an_existing_folder_is_refused_before_anything_is_loaded(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputExistsError, match="found 1 entry, expected a new or"):
        fit(arguments((tmp_path / "no model", sources[1]), tmp_path))
    with pytest.raises(OutputExistsError, match="another one, or pass --resume true to resume"):
        fit(arguments(sources, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_another_run_writes_to_is_refused(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for more in ((), ("--resume", "true")):
        with claimed(out), pytest.raises(OutputExistsError, match="another run"):
            fit(arguments((tmp_path / "no model", sources[1]), out, *more))  # before it is loaded
    late, first = FitCLI(arguments(sources, out)), FitCLI(arguments(sources, out))
    assert not out.exists()
    with claimed(out), pytest.raises(OutputExistsError, match="another run"):
        late.fit()
    first.fit()
    wrote = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(OutputExistsError, match="expected a new or empty folder"):
        late.fit()  # the other one began later, and has ended by now
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == wrote


def test_resuming_what_is_not_there_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"found no folder .* to resume from"):
        fit(arguments(sources, tmp_path / "nothing", "--resume", "true"))


def test_a_trained_model_is_not_trained_anew_where_nothing_is_left_to_resume_from(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = fit(arguments(sources, tmp_path / "out", "--checkpoint_every", 0))
    wrote = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(OutputExistsError, match="a trained model and no checkpoint to resume from"):
        fit(arguments(sources, out, "--resume", "true"))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == wrote
    (out / "model.safetensors").unlink()
    fit(arguments(sources, out, "--resume", "true"))


@pytest.mark.thorough
def test_unreadable_text_leaves_a_folder_that_can_be_used_again(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match="is binary"):
        fit(arguments((sources[0], tmp_path / "binary.txt"), out))
    assert not out.exists()
    fit(arguments(sources, out))


@pytest.mark.thorough
def test_what_is_said_to_be_written_is(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["fit", *arguments(sources, out, "--trainer.fast_dev_run", "true")]) == 0
    assert f"written to {out}/: fit.yaml\n" in capsys.readouterr().out
    assert sorted(each.name for each in out.iterdir()) == ["fit.yaml"]


def test_tokens_that_the_model_does_not_have_are_refused_before_anything_is_written(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """As after an end of text was added to a tokenizer alone."""
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    tiny_model("llama", vocab_size=256).save_pretrained(model)
    with pytest.raises(InvalidInputError, match=r"to 256, .* 0 to 255 .*resize_token_embeddings"):
        fit(arguments((model, sources[1]), out))
    assert not out.exists()


@pytest.mark.thorough
@pytest.mark.parametrize("strength", [0, 1])
def test_blocks_longer_than_the_learned_positions_are_refused(
    sources: tuple[Path, Path], tmp_path: Path, strength: float
) -> None:
    model = write_model(tmp_path / "model", "gpt2", max_position_embeddings=16)
    words = ("--penalty.strength", strength)
    with pytest.raises(InvalidInputError, match=r"data.block_size: found .* 17 .* at most 16"):
        fit(arguments((model, sources[1]), tmp_path / "a", *words, "--data.block_size", 17))
    assert not (tmp_path / "a").exists()
    fit(arguments((model, sources[1]), tmp_path / "a", *words, "--data.block_size", 16))


@pytest.mark.thorough
def test_no_checkpoints_if_the_trainer_shall_make_none(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = fit(arguments(sources, tmp_path / "a", "--trainer.enable_checkpointing", "false"))
    assert (out / "model.safetensors").is_file()
    assert not (out / "checkpoints").exists()


def test_pickle_weights_are_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((sources[0] / "config.json").read_text())
    with pytest.raises(ModelDirectoryError, match=r"found no \*\.safetensors weights"):
        fit(arguments((model, sources[1]), tmp_path / "a"))
    (model / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ModelDirectoryError, match="found only pickle weights"):
        fit(arguments((model, sources[1]), tmp_path / "b"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--penalty.strength", -1, "strength: found -1.0, allowed"),
        ("--penalty.easiness", "luck", "easiness: found 'luck', allowed are 'entropy'"),
        ("--model.learning_rate", 0, "learning_rate: found 0.0, allowed"),
        ("--model.warmup_steps", -1, "warmup_steps: found -1, allowed"),
        ("--checkpoint_every", -1, "checkpoint_every: found -1, allowed"),
        ("--seed_everything", -1, "seed_everything: found -1, allowed"),
        ("--monitor_every", -1, "monitor_every: found -1, allowed"),
        ("--card_blocks", -1, "card_blocks: found -1, allowed"),
        ("--data.batch_size", 0, "batch_size: found 0, allowed are integers from 1"),
    ],
)
def test_numbers_out_of_range_are_named(
    sources: tuple[Path, Path], tmp_path: Path, option: str, value: object, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        fit(arguments(sources, tmp_path / "out", option, value))
    assert not (tmp_path / "out").exists()


def test_options_are_checked_before_a_model_is_loaded(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    nowhere = (tmp_path / "no model", sources[1])
    with pytest.raises(InvalidInputError, match=r"share: found 2\.0"):
        fit(arguments(nowhere, tmp_path / "out", "--penalty.share", 2))
    with pytest.raises(InvalidInputError, match="block_size: found 1, allowed are integers from 2"):
        fit(arguments(nowhere, tmp_path / "out", "--data.block_size", 1))


def test_a_second_penalty_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    more = ("--trainer.callbacks+=softtrace.lightning.DensityPenalty",)
    with pytest.raises(TrainerSetupError, match="found 2 DensityPenalty callbacks"):
        fit(arguments(sources, tmp_path / "out", *more))


def test_any_option_can_come_from_yaml(sources: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(json.dumps({"penalty": {"depths": [0.25, 0.75], "family": "shallow"}}))
    cli = FitCLI(arguments(sources, tmp_path / "out", "--config", config))
    [penalty] = [c for c in cli.trainer.callbacks if isinstance(c, DensityPenalty)]
    assert penalty.options.depths == (0.25, 0.75)
    assert penalty.options.family == "shallow"


@pytest.mark.thorough
def test_the_monitor_logs_densities_and_changes_no_weight(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    validated = ("--trainer.limit_val_batches", "1.0", "--trainer.num_sanity_val_steps", 0)
    every = ("--trainer.log_every_n_steps", 1, *validated)
    plain = fit(arguments(sources, tmp_path / "plain", *every))
    out = fit(arguments(sources, tmp_path / "out", *every, "--monitor_every", 2))
    for name, weight in trained(plain).items():
        assert torch.equal(weight, trained(out)[name]), name
    with (out / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("density/area_easy")]
    assert [int(row["step"]) for row in rows] == [1, 3, 5]
    assert len({row["density/area_easy"] for row in rows}) == 3
    assert "density/area_easy" not in (plain / "logs" / "version_0" / "metrics.csv").read_text()


def test_a_monitor_without_held_out_text_is_refused(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("--monitor_every", 2, "--data.held_out_share", 0)
    with pytest.raises(InvalidInputError, match="monitor_every: found no held-out blocks"):
        fit(arguments(sources, tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()
