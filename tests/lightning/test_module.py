"""The module that ``softtrace fit`` trains: parameter groups, schedule, losses in nats."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from softtrace.errors import ModelDirectoryError
from softtrace.lightning.module import CausalLM
from softtrace.model.exit_maps import ExitMaps, exit_maps_of, set_exit_maps
from tests.support.corpus import write_model
from tests.support.fitting import Batches, Calls, batches, trainer

# none of these fits has held-out text
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_training_loss_is_the_models_own(directory: Path) -> None:
    module = CausalLM(str(directory))
    reference = AutoModelForCausalLM.from_pretrained(directory)
    batch = next(iter(batches(1)))
    fitting = trainer(max_steps=1)
    fitting.fit(module, batches(1))
    expected = reference(**batch).loss.detach()
    assert float(fitting.logged_metrics["loss/train"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_model_that_is_made_whole_keeps_its_exit_maps(directory: Path) -> None:
    module = CausalLM(str(directory))
    weights = {name: each.clone() for name, each in module.model.state_dict().items()}
    assert exit_maps_of(module.again(weights)) is None
    maps = ExitMaps([1], 4)
    set_exit_maps(module.model, maps)
    assert exit_maps_of(module.again(weights)) is maps


def test_held_out_loss_weighs_batches_by_their_rows(directory: Path) -> None:
    module = CausalLM(str(directory))
    small, large = next(iter(batches(1, rows=1))), next(iter(batches(1, rows=3)))
    del small["attention_mask"], large["attention_mask"]
    small["labels"], large["labels"] = small["input_ids"], large["input_ids"]
    fitting = trainer(limit_val_batches=1.0)
    fitting.validate(module, Batches(small, large), verbose=False)
    with torch.no_grad():
        one, three = (float(module.model(**batch).loss) for batch in (small, large))
    found = float(fitting.callback_metrics["loss/held_out"])
    assert found == pytest.approx((one + 3 * three) / 4, rel=1e-5)
    assert one != pytest.approx(three, rel=1e-3)


def test_held_out_loss_weighs_batches_by_the_tokens_that_count(directory: Path) -> None:
    module = CausalLM(str(directory))
    few, many = next(iter(batches(1, rows=2))), next(iter(batches(2, rows=2)))
    for batch, last in ((few, 3), (many, 9)):
        del batch["attention_mask"]
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, last:] = -100
    fitting = trainer(limit_val_batches=1.0)
    fitting.validate(module, Batches(few, many), verbose=False)
    with torch.no_grad():
        total = torch.zeros(())
        for batch in (few, many):
            logits = module.model(input_ids=batch["input_ids"]).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )
    found = float(fitting.callback_metrics["loss/held_out"])
    assert found == pytest.approx(float(total) / (2 * 2 + 2 * 8), rel=1e-5)


def test_vectors_do_not_decay_and_every_weight_is_in_one_group(directory: Path) -> None:
    module = CausalLM(str(directory), weight_decay=0.3)
    trainer(max_steps=1).fit(module, batches(1))
    groups = module.optimizers().param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(weight.dim() >= 2 for weight in groups[0]["params"])
    assert all(weight.dim() < 2 for weight in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_learning_rate_warms_up_and_falls_to_zero(directory: Path) -> None:
    module = CausalLM(str(directory), learning_rate=0.5, warmup_steps=2)
    rates: list[float] = []

    def note(_trainer: object, module: CausalLM, *_: object) -> None:
        rates.append(module.optimizers().param_groups[0]["lr"])

    trainer(Calls(on_train_batch_start=note), max_steps=6).fit(module, batches(6))
    expected = [0.0, 0.25] + [0.25 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx(expected)


def test_dtype_and_attention_are_passed_on(directory: Path) -> None:
    module = CausalLM(str(directory), dtype="bfloat16", attn_implementation="eager")
    assert module.model.dtype == torch.bfloat16
    assert module.model.config._attn_implementation == "eager"
    assert module.model.training
    with pytest.raises(ModelDirectoryError, match="dtype: found 'int8', allowed are float32"):
        CausalLM(str(directory), dtype="int8")
