"""Models and tokenizers: what is refused, in one line that names the directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softtrace.errors import ModelDirectoryError
from softtrace.load import load_model, load_tokenizer
from tests.corpus import write_model


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
