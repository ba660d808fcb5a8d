"""Models and tokenizers: what is refused, in one line that names the directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, dynamic_module_utils

import softtrace
from softtrace.cli import main
from softtrace.errors import ModelDirectoryError
from softtrace.lightning.module import CausalLM
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


POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "{file} is empty (0 bytes); copy or download it again"),
        (POINTER, "{file} is a pointer of git-lfs and not the file itself; run git lfs pull"),
    ],
)
@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("model.safetensors", load_model),
        ("pytorch_model.bin", load_model),
        ("config.json", load_model),
        ("model.safetensors.index.json", load_model),
        ("tokenizer.json", load_tokenizer),
        ("tokenizer_config.json", load_tokenizer),
    ],
)
def test_a_file_without_its_content(
    file: str, load: Callable[[Path], object], content: bytes, said: str, tmp_path: Path
) -> None:
    write_model(tmp_path)
    if file == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(content)
    assert said.format(file=file) in refusal(load, tmp_path)


def refusal(load: Callable[[Path], object], directory: Path) -> str:
    """The line that names a directory and what is wrong with it."""
    with pytest.raises(ModelDirectoryError) as caught:
        load(directory)
    said = str(caught.value)
    assert said.startswith(f"{directory}: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "config.json holds a JSON list, expected an object"),
        ("null", "config.json holds a JSON NoneType, expected an object"),
        ("{}", "config.json names no model_type"),
        ('{"model_type": "of_tomorrow"}', "model type `of_tomorrow`"),
        ('{"model_type": "t5"}', "transformers has no causal language model for its T5Config"),
        ('{"model_type": "vit"}', "transformers has no causal language model for its ViTConfig"),
        ('{"model_type": "llama", "hidden_act": "of_tomorrow"}', "KeyError: 'of_tomorrow'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "expected int, got str"),
    ],
)
def test_a_config_that_is_none_of_a_causal_language_model(
    content: str, said: str, tmp_path: Path
) -> None:
    (write_model(tmp_path) / "config.json").write_text(content)
    assert said in refusal(load_model, tmp_path)


@pytest.mark.parametrize(
    ("quantised", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit.is_bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq.is_optimum"),
    ],
)
def test_weights_that_need_a_package_which_is_missing(
    quantised: dict[str, object], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"transformers.quantizers.quantizer_{package}_available", lambda: False)
    change_config(write_model(tmp_path), quantization_config=quantised)
    assert "`pip install" in refusal(load_model, tmp_path)


def change_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("kept", [0, 3])
def test_weights_that_are_not_all_there_are_not_drawn_at_random(kept: int, tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    weights = load_file(path)
    save_file(dict(list(weights.items())[:kept]), path, {"format": "pt"})
    lacking = len(weights) - kept
    said = refusal(load_model, tmp_path)
    assert f"its safetensors lack {lacking} of the {len(weights)} weights of the Llama" in said


def test_weights_of_another_shape_than_the_config_says(tmp_path: Path) -> None:
    change_config(write_model(tmp_path), vocab_size=300)
    said = refusal(load_model, tmp_path)
    assert "has the shape [257, 32] in its safetensors, and [300, 32] by config.json" in said


def test_an_encoder_lacks_the_head_that_would_predict(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        vocab_size=20,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    assert "weights of the BertLMHeadModel that config.json describes" in refusal(
        load_model, tmp_path
    )


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    write_model(tmp_path)
    model = load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert load_model(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    assert f"1 of {len(shards)} files of weights" in refusal(load_model, tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    said = refusal(load_model, tmp_path)
    assert f"the first is {shards[0].name}; copy or download them" in said
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(load_model, tmp_path)


def test_weights_of_other_formats_and_a_tokenizer_alone(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.gguf")
    assert "found no *.safetensors weights in it but model.gguf" in refusal(load_model, tmp_path)
    (tmp_path / "config.json").unlink()
    assert "the directory of a tokenizer alone" in refusal(load_model, tmp_path)


def test_an_empty_path_and_a_folder_of_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="model: found an empty path"):
        load_model("")
    write_model(tmp_path / "run" / "checkpoint-10")
    assert f"such as {tmp_path / 'run' / 'checkpoint-10'}" in refusal(load_model, tmp_path / "run")


def test_checkpoints_in_parts(tmp_path: Path) -> None:
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").touch()
    said = refusal(load_model, tmp_path)
    assert f"accelerate merge-weights {tmp_path / 'pytorch_model_fsdp_0'} OUT" in said
    zero = tmp_path / "zero"
    zero.mkdir()
    (zero / "zero_to_fp32.py").touch()
    assert "python zero_to_fp32.py . OUT --safe_serialization" in refusal(load_model, zero)
    write_model(tmp_path)  # whole, beside the optimiser's parts
    load_model(tmp_path)


def test_a_tokenizer_of_another_format(tmp_path: Path) -> None:
    (write_model(tmp_path) / "tokenizer.json").write_text("{}")
    assert "it cannot be loaded by this installation of transformers" in refusal(
        load_tokenizer, tmp_path
    )


def test_a_bug_on_the_way_to_transformers_is_no_fault_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", bug)
    with pytest.raises(KeyError, match="ours"):
        load_model(write_model(tmp_path))


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


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize("maps", [False, True])
def test_an_adapter_alone_is_told_from_a_model(tmp_path: Path, maps: bool, config: bool) -> None:
    """Some save the config of the base model beside it; maps of exits would be left behind."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    if config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if maps:
        (tmp_path / "exit_maps.safetensors").touch()
    with pytest.raises(ModelDirectoryError, match=r"holds a PEFT adapter.*merge_and_unload") as one:
        load_model(tmp_path)
    assert ("copy exit_maps.safetensors into it" in str(one.value)) == maps


def test_an_adapter_with_a_name_of_its_own_is_found_in_its_folder(tmp_path: Path) -> None:
    """PEFT saves any but the first adapter to a folder of its name, a trainer each checkpoint."""
    for name in ("older", "newer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    os.utime(tmp_path / "older" / "adapter_config.json", (0, 0))
    with pytest.raises(ModelDirectoryError, match=r"newer holds a PEFT adapter.*merge_and_unload"):
        load_model(tmp_path)


def test_an_adapter_beside_its_model_is_measured_but_not_trained(tmp_path: Path) -> None:
    """transformers loads both: the weights are frozen, and only the adapter would be saved."""
    directory = write_model(tmp_path)
    plain = load_model(directory)
    config = LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config).eval()
    adapted.save_pretrained(directory)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted, found = adapted(input_ids=ids).logits, load_model(directory)(input_ids=ids).logits
        assert not torch.allclose(plain(input_ids=ids).logits, wanted, atol=1e-3)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ModelDirectoryError, match=r"a PEFT adapter beside its model; .* Merge it"):
        CausalLM(str(directory))
