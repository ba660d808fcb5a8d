"""What a machine or an installation lacks ends a command in one line; bugs keep tracebacks."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from softtrace.cli import main
from tests.support.corpus import write_model, write_tree
from tests.support.warm import run


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model directory and a folder of text."""
    root = tmp_path_factory.mktemp("sources")
    return write_model(root / "model"), write_tree(root / "text")


def fit_words(sources: tuple[Path, Path], out: Path, *more: object) -> list[str]:
    model, text = sources
    words = [
        *("fit", "--model.path", model, "--data.path", text, "--out", out),
        *("--data.block_size", 16, "--trainer.accelerator", "cpu", "--trainer.max_steps", 1),
        *("--trainer.limit_val_batches", 0, "--trainer.enable_progress_bar", "false"),
        *("--card_blocks", 0, "--checkpoint_every", 0, *more),
    ]
    return [str(word) for word in words]


#: what is wrong with DeepSpeed here
ENGINE = (
    "is not installed here; run pip install deepspeed"
    if importlib.util.find_spec("deepspeed") is None
    else "only supported on CUDA GPUs"
)
LACKING = {
    "attention kernel": (
        ("--model.attn_implementation", "flash_attention_2"),
        "cannot be loaded with attn_implementation='flash_attention_2' by this installation",
    ),
    "attention kernel that nobody knows": (
        ("--model.attn_implementation", "flash2"), "The only possible arguments are",
    ),
    "accelerator": (
        ("--trainer.accelerator", "tpu"),
        "(asked for by --trainer.accelerator; change one of these, or install what it needs)",
    ),
    "accelerator that nobody knows": (("--trainer.accelerator", "gpuu"), "Available names are"),
    "sharding": (("--trainer.strategy", "fsdp"), "requires a GPU"),
    "engine": (("--trainer.strategy", "deepspeed_stage_2"), ENGINE),
    "strategy that nobody knows": (("--trainer.strategy", "ddpp"), "invalid strategy name"),
    "devices": (("--trainer.devices", 0), "asked for by --trainer.accelerator, --trainer.devices"),
    "list of devices": (("--trainer.devices", "[0, 1]"), "should be an int > 0"),
    "logger": (("--trainer.logger", "WandbLogger"), "Requirement 'wandb"),
    "one of several loggers": (("--trainer.logger+=MLFlowLogger",), "Requirement 'mlflow"),
    "precision": (("--trainer.precision", "transformer-engine"), "Requirement 'transformer_engine"),
    "profiler": (("--trainer.profiler", "nobody"), "it can only be one of"),
    "callback that has to log": (
        ("--trainer.callbacks", "LearningRateMonitor", "--trainer.logger", "false"),
        "Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger",
    ),
    "a callback of ours": (
        ("--trainer.callbacks", "softtrace.lightning.DensityMonitor",
         "--trainer.callbacks.every", 0),
        "every: found 0, allowed are integers from 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LACKING)
def test_a_fit_names_what_it_cannot_have(
    name: str, sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, said = LACKING[name]
    assert main(fit_words(sources, tmp_path / "out", *options)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("softtrace fit: ")
    assert said in last


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # torch warns of itself where it is not compiled
def test_a_kernel_without_a_gradient_is_named(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = ("--model.attn_implementation", "flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling takes long, and changes nothing
        assert main(fit_words(sources, tmp_path / "out", *kernel)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("softtrace fit: FlexAttention does not support backward on CPU")
    assert last.endswith("(choose another attention kernel, device or number format)")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--trainer.precision", "fp8"),
        ("--trainer.logger", "NoSuchLogger"),
        ("--trainer.logger", "no_such_package.Logger"),
        ("--trainer.callbacks", "lightning.pytorch.callbacks.NoSuchCallback"),
    ],
)
def test_a_name_that_nobody_knows_does_not_parse(
    option: str,
    value: str,
    sources: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(fit_words(sources, tmp_path / "out", option, value))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f'Parser key "{option.removeprefix("--")}"' in said
    assert value in said
    assert not (tmp_path / "out").exists()


def test_adapters_without_peft(
    sources: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(fit_words(sources, tmp_path / "out", "--model.lora.rank", 4)) == 1
    assert "install it with pip install peft" in capsys.readouterr().err


def test_a_package_that_softtrace_itself_needs(
    sources: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "softtrace.cli.inspect", raising=False)
    monkeypatch.setitem(sys.modules, "softtrace.tracing.attach", None)
    with pytest.raises(ImportError):  # which is no package that one could install
        main(["inspect", str(sources[0])])
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "softtrace.model.devices")
    monkeypatch.delitem(sys.modules, "softtrace.cli.inspect", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate.hooks", None)
    assert main(["inspect", str(sources[0])]) == 1
    said = capsys.readouterr().err
    assert said.startswith("softtrace inspect: import of accelerate.hooks halted")
    assert said.endswith("install what is missing\n")


class Bug(Callback):
    def __init__(self) -> None:
        raise ValueError("a bug when it is made")


class LateBug(Callback):
    def setup(self, trainer: Trainer, *_: object, **__: object) -> None:
        raise RuntimeError("a bug when it is set up")


class BugInAStep(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        raise RuntimeError("a bug in a step")


class Lacking(Callback):
    def setup(self, trainer: Trainer, *_: object, **__: object) -> None:
        import no_such_package  # type: ignore[import-not-found] # noqa: F401


class Logger(CSVLogger):
    def __init__(self) -> None:
        raise ValueError("a bug of a logger")


@pytest.mark.parametrize(
    ("option", "kind", "said"),
    [
        ("callbacks", Bug, "a bug when it is made"),
        ("callbacks", LateBug, "a bug when it is set up"),
        ("callbacks", BugInAStep, "a bug in a step"),
        ("callbacks", Lacking, "no_such_package"),
        ("logger", Logger, "a bug of a logger"),
    ],
)
def test_bugs_of_users_classes_are_raised_as_they_are(
    option: str, kind: type, said: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    name = f"{__name__}.{kind.__name__}"
    with pytest.raises((ValueError, RuntimeError, ImportError), match=said) as caught:
        main(fit_words(sources, tmp_path / "out", f"--trainer.{option}", name))
    assert type(caught.value).__module__ == "builtins"  # not one of softtrace's, nor jsonargparse's
    assert caught.traceback[-1].path == Path(__file__)


@pytest.mark.parametrize("command", ["evaluate", "study", "decode-bench"])
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--device", "tpuu", "device: found 'tpuu', which this machine cannot use"),
        ("--device", "vulkan:3", "device: found 'vulkan:3', which this machine cannot use"),
        ("--dtype", "float7", "dtype: found 'float7', allowed are float32, bfloat16, float16"),
    ],
)
def test_measuring_names_what_it_cannot_have(
    command: str,
    option: str,
    value: str,
    said: str,
    sources: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, text = map(str, sources)
    named = [model] if command == "study" else ["--model", model]
    if command == "decode-bench":
        named += ["--prompt_tokens", "8"]
    words = [command, *named, "--data", text, "--out", str(tmp_path / "out")]
    if command == "study":
        words += ["--held_out_share", "0.5", "--block_size", "32"]
        words += ["--lengths", "[8]"]
    assert main([*words, option, value]) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_memory_that_is_no_number(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device_map", "auto", "--max_memory", '{"cpu": "many"}']
    assert main([*evaluate_words(sources, tmp_path / "out"), *words]) == 1
    assert "`size` many is not in a valid format" in capsys.readouterr().err.splitlines()[-1]


def evaluate_words(sources: tuple[Path, Path], out: Path) -> list[str]:
    model, text = map(str, sources)
    words = ["evaluate", "--model", model, "--data", text, "--out", str(out)]
    return [*words, "--block_size", "16", "--device", "cpu"]


@pytest.mark.thorough
def test_processes_that_cannot_meet(sources: tuple[Path, Path], tmp_path: Path) -> None:
    words = evaluate_words(sources, tmp_path / "out")
    done = run(
        [sys.executable, "-m", "softtrace.cli", *words],
        env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "WORLD_SIZE: found 2 in the environment: " in last
    assert "MASTER_ADDR" in last
