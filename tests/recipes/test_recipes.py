"""The recipes run to their end on the shipped model; configs of real models parse."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from softtrace import DensityOptions, load_exit_maps
from softtrace.cli.fit import FitCLI
from softtrace.lightning import DensityPenalty
from softtrace.lightning.lora import LoRA
from softtrace.model.loading import load_model
from tests.support import warm
from tests.support.fitting import weights
from tests.support.tiny import tiny_model
from tests.support.waiting import PATIENCE, held_port, port_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OURS = "pystdlib-4m"


def run(*words: object) -> str:
    """A command of the repository's environment, to its end; what it printed."""
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = warm.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, timeout=PATIENCE,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little real source."""
    import jinja2

    folder = tmp_path_factory.mktemp("text")
    for path in Path(jinja2.__file__).parent.glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def moved(folder: Path) -> float:
    """How far the saved weights are from the shipped ones, at most."""
    shipped, found = load_model(ROOT / "recipes" / "models" / OURS), load_model(folder)
    return (weights(found) - weights(shipped)).abs().max().item()


def test_every_config_names_a_line_to_run_it_by() -> None:
    models = {"qwen3-0.6b", "llama-3.2-1b", "smollm3-3b", "gemma-3-1b", OURS}
    names = {path.stem for path in CONFIGS}
    sharded = {f"{name}-{gpus}gpus" for name in ("llama-3.1-8b", "qwen3-8b") for gpus in (2, 8)}
    assert names == models | {f"{name}-lora" for name in models} | sharded
    for path in CONFIGS:
        first = path.read_text().partition("\n")[0]
        where = f"configs/{path.stem}.yaml --data.path TEXT --out runs/{path.stem}"
        assert first == f"# softtrace fit --config {where}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_parse_and_fit(
    path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real command line, up to a model that cannot be downloaded here."""
    monkeypatch.chdir(ROOT)
    made: list[str] = []

    def from_pretrained(name: str, *args: Any, **kwargs: Any) -> Any:
        made.append(name)
        model = tiny_model("llama", num_hidden_layers=2).to(kwargs["dtype"])
        return model, {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    cli = FitCLI([
        "--config", str(path), "--data.path", str(text), "--out", str(tmp_path / "out"),
        "--trainer.accelerator", "cpu", "--trainer.logger", "false",
    ])  # fmt: skip
    wanted = yaml.safe_load(path.read_text())
    assert made == [wanted["model"]["path"]]
    assert cli.trainer.max_steps == wanted["trainer"]["max_steps"]
    penalty = next(c for c in cli.trainer.callbacks if isinstance(c, DensityPenalty))
    assert penalty.options == DensityOptions(preset="balanced")
    parts = wanted["trainer"].get("strategy", {}).get("init_args", {}).get("data_parallel_size", 1)
    assert parts == cli.trainer.num_devices == wanted["trainer"].get("devices", 1)
    trained = [name for name, p in cli.model.named_parameters() if p.requires_grad]
    assert ("lora" in wanted["model"]) == isinstance(cli.model.model, PeftModel)
    assert all("lora" in name for name in trained) == path.stem.endswith("-lora")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_configs_of_the_shipped_model_run(text: Path, tmp_path: Path, lora: bool) -> None:
    name, out = f"{OURS}-lora" if lora else OURS, tmp_path / "out"
    run(
        "-m", "softtrace.cli", "fit", "--config", f"configs/{name}.yaml", "--data.path", text,
        "--out", out, "--trainer.max_steps", 3, "--card_blocks", 2, "--trainer.accelerator", "cpu",
        "--data.block_size", 24, "--data.batch_size", 4,
    )  # fmt: skip
    assert 1e-4 < moved(out) < 0.2
    assert AutoConfig.from_pretrained(out).softtrace_exit_layer in range(1, 8)
    model = load_model(out)
    assert not any("lora" in name for name, _ in model.named_parameters())  # added into the weights


@pytest.mark.slow
def test_the_recipe_for_the_trainer_of_transformers_runs_and_resumes(
    text: Path, tmp_path: Path
) -> None:
    sizes = ("--block-size", 32, "--batch-size", 4, "--accumulate", 2)
    words = ("recipes/hf_trainer.py", "--data", text, *sizes)
    said = run(*words, "--steps", 6, "--out", tmp_path / "whole")
    assert "loss/density" in said
    assert 1e-4 < moved(tmp_path / "whole") < 0.2
    whole = weights(load_model(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    (tmp_path / "whole" / "model.safetensors").unlink()
    run(*words, "--steps", 6, "--out", tmp_path / "whole", "--resume")
    assert torch.equal(weights(load_model(tmp_path / "whole")), whole)


@pytest.mark.slow
def test_the_recipe_for_accelerate_runs_on_two_processes(text: Path, tmp_path: Path) -> None:
    with held_port() as held:
        said = run(
            "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1,
            "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", port_of(held),
            "recipes/accelerate_loop.py", "--data", text, "--steps", 4, "--accumulate", 2,
            "--block-size", 32, "--batch-size", 4, "--out", tmp_path / "out",
        )  # fmt: skip
    assert said.count("step 0  task") == 1  # one process speaks
    assert load_exit_maps(load_model(tmp_path / "out"), tmp_path / "out")
    assert 1e-4 < moved(tmp_path / "out") < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank: found 0, allowed are integers from 1"),
        ({"alpha": 0.0}, r"lora.alpha: found 0.0, allowed \(0, inf\)"),
        ({"dropout": 1.0}, r"lora.dropout: found 1.0, allowed \[0, 1\)"),
        ({"targets": ["nowhere"]}, "lora.targets: .*nowhere"),
    ],
)
def test_lora_options_are_checked(options: dict[str, Any], message: str) -> None:
    from softtrace import InvalidInputError

    with pytest.raises(InvalidInputError, match=message):
        LoRA(**options).wrap(tiny_model("llama"))
