"""Models and tokenizers: what is refused, in one line that names the directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

import softtrace
from softtrace.cli import main
from softtrace.errors import ModelDirectoryError
from softtrace.model.loading import load_model, load_tokenizer
from tests.support.corpus import write_model


def test_weights_come_in_the_dtype_asked_for(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    assert load_model(directory).dtype == torch.float32
    assert load_model(directory, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelDirectoryError, match="dtype: found 'int8', allowed are float32, "):
        load_model(directory, dtype="int8")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["no-such-model", "runs/no-such-model"])
def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, load: object, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelDirectoryError) as caught:
        load(name)  # type: ignore[operator]
    message = str(caught.value)
    assert message.startswith(f"{name}: found neither a directory of this name nor, on the hub")
    assert "\n" not in message


def test_weights_that_were_cut_short(tmp_path: Path) -> None:
    weights = write_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelDirectoryError, match="its safetensors cannot be read"):
        load_model(tmp_path)


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    (write_model(tmp_path) / "config.json").write_text("{")
    with pytest.raises(ModelDirectoryError, match="not a valid JSON"):
        load_model(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    for file in write_model(tmp_path).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelDirectoryError, match="found no tokenizer files"):
        load_tokenizer(tmp_path)


THEIR_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
"""


def test_code_of_a_models_own_is_not_run_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even asked about; loaded by its owner it is a model like any other."""
    directory = write_model(tmp_path / "model")
    (directory / "theirs.py").write_text(THEIR_CODE, encoding="utf-8")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "theirs"
    config["auto_map"] = {
        "AutoConfig": "theirs.TheirConfig",
        "AutoModelForCausalLM": "theirs.TheirModel",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(ModelDirectoryError, match="it needs code of its own, which softtrace does"):
        load_model(directory)
    assert main(["inspect", str(directory)]) == 1
    assert "trust_remote_code=True" in capsys.readouterr().err
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    instrument = softtrace.attach(model)
    assert instrument.anatomy.pattern == "sequential pre-norm"


def test_an_adapter_alone_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelDirectoryError, match=r"holds a PEFT adapter.*merge_and_unload"):
        load_model(tmp_path)
