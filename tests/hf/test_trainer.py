"""The integration for transformers' Trainer: scaled as by hand, inert at 0, resumed to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from softtrace import DensityLoss, InvalidInputError, NonFiniteError, TrainerSetupError
from softtrace.hf import DensityMixin, with_density
from softtrace.loss.integration import TermLog
from softtrace.loss.options import DensityOptions
from softtrace.model.exit_maps import EXIT_MAPS_FILE, ExitMaps, set_exit_maps
from tests.support.fitting import weights
from tests.support.hf_training import (
    OPTIONS,
    DensityTrainer,
    Ordered,
    OrderedTrainer,
    arguments,
    by_hand,
    resumed,
    rows,
    train,
)
from tests.support.tiny import tiny_model, tiny_prompt


@pytest.mark.parametrize("counted", [True, False], ids=["num_items_in_batch", "batch means"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])  # 8 batches: the last group of 3 has two
def test_equals_the_loop_by_hand(tmp_path: Path, accumulate: int, counted: bool) -> None:
    options = {**OPTIONS, "warmup_steps": 2, "exits": 0.4, "every": 2}

    class Asked(DensityTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = counted

    model = tiny_model("llama", dtype=torch.float64).train()
    settings = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    Asked(model=model, args=settings, train_dataset=rows(), density=options).train()
    wanted = by_hand(accumulate, counted, options)
    torch.testing.assert_close(weights(model), weights(wanted), atol=1e-10, rtol=0)
    without = by_hand(accumulate, counted, {**options, "strength": 0.0})
    assert (weights(model) - weights(without)).abs().max() > 1e-3


@pytest.mark.thorough
def test_strength_0_is_inert(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):  # without and with dropout
        plain = train(tmp_path, None, family)
        silent = train(tmp_path, {"strength": 0.0}, family)
        loud = train(tmp_path, OPTIONS, family)
        assert torch.equal(weights(silent.model), weights(plain.model))
        assert not torch.equal(weights(loud.model), weights(plain.model))
        history = [{k for k in entry if "/" in k} for entry in silent.state.log_history]
        assert not any(history)


@pytest.mark.thorough
def test_what_is_logged_adds_up(tmp_path: Path) -> None:
    trainer = train(tmp_path, logging_steps=2, gradient_accumulation_steps=2)
    *entries, _ = trainer.state.log_history
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        assert entry["loss/task"] + entry["loss/density"] == pytest.approx(entry["loss"])
        assert entry["loss/density"] == pytest.approx(
            0.6 * (entry["density/distortion"] + 0.2 * entry["density/exit_distance"]), rel=1e-5
        )
        assert 0 < entry["density/soft_size"] < 1
        assert 0 < entry["density/easy_share"] < 1
    plain = train(tmp_path, None, logging_steps=2, gradient_accumulation_steps=2)
    assert plain.state.log_history[0]["loss"] == pytest.approx(entries[0]["loss/task"], rel=0.2)


@pytest.mark.thorough
def test_evaluation_has_no_term(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counting(DensityTrainer):
        def inputs_of(self, inputs: Any) -> dict[str, Any]:
            calls.append(self.state.global_step)
            return super().inputs_of(inputs)

    model = tiny_model("llama").train()
    settings = arguments(tmp_path, eval_strategy="steps", eval_steps=5, max_steps=8)
    trainer = Counting(
        model=model, args=settings, train_dataset=rows(), eval_dataset=rows()[:4], density=OPTIONS
    )
    trainer.train()
    assert calls == list(range(8))
    own = trainer.evaluate()["eval_loss"]
    plain = OrderedTrainer(model=model, args=settings, eval_dataset=rows()[:4]).evaluate()
    assert own == plain["eval_loss"]


def test_label_smoothing_takes_the_labels_after_us(tmp_path: Path) -> None:
    smoothed = train(tmp_path, label_smoothing_factor=0.1)
    assert smoothed.state.log_history[0]["loss/density"] > 0


@pytest.mark.thorough
def test_resumed_at_every_step_ends_with_the_same_weights(tmp_path: Path) -> None:
    options = {**OPTIONS, "warmup_steps": 5, "every": 2}
    whole = train(tmp_path, options, "gpt2", save_strategy="steps", save_steps=1)
    last = whole.state.global_step
    for step in range(1, last):
        again = resumed(tmp_path, step, options)
        assert torch.equal(weights(again.model), weights(whole.model)), step
    other = resumed(tmp_path, 1, {**options, "strength": 0.5})
    assert not torch.equal(weights(other.model), weights(whole.model))


def logged(trainer: Any, *beginnings: str) -> list[dict[str, float]]:
    """What a training logged of its loss, of those names."""
    return [
        {name: entry[name] for name in sorted(entry) if name.startswith(("step", *beginnings))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def same(one: list[dict[str, float]], other: list[dict[str, float]]) -> bool:
    return repr(one) == repr(other)  # NaN is NaN


MASKED_SELDOM: dict[str, Any] = {**OPTIONS, "start_step": 1, "every": 3, "share": 0.5}


@pytest.mark.thorough
@pytest.mark.parametrize("restore", [False, True])
def test_resumed_between_masked_runs_it_logs_what_the_straight_one_does(
    tmp_path: Path, restore: bool
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    whole = train(tmp_path, MASKED_SELDOM, "gpt2", **settings)
    sizes = [entry["density/soft_size"] for entry in logged(whole, "density")]
    assert math.isnan(sizes[0])  # the masked runs are at steps 1, 4 and 7
    assert len(set(sizes[1:])) == 3
    for step in range(1, whole.state.global_step):
        again = resumed(
            tmp_path, step, MASKED_SELDOM, restore_callback_states_from_checkpoint=restore
        )
        assert same(logged(again, "loss", "density"), logged(whole, "loss", "density")), step


def test_steps_before_the_first_masked_run_are_left_out_of_means(tmp_path: Path) -> None:
    each, together = (
        logged(train(tmp_path / str(steps), MASKED_SELDOM, "gpt2", logging_steps=steps), "density")
        for steps in (1, 4)
    )
    for name in ("density/soft_size", "density/distortion"):
        first, *others = (entry[name] for entry in each[:4])
        assert math.isnan(first)
        assert together[0][name] == pytest.approx(sum(others) / 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_was_not_there_logs_on_from_the_first(rank: int) -> None:
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(process_index=rank, device=torch.device("cpu")),
        _term_log=TermLog(DensityOptions()),
    )
    log = [{"measured": {"density/soft_size": 0.25}, "sums": {"density/soft_size": [1.0, 4.0]}}]
    DensityMixin._continue_log(trainer, log)
    assert trainer._sums["density/soft_size"].tolist() == [1, 4]
    assert trainer._term_log.measured["density/soft_size"] == 0.25


@pytest.mark.thorough
def test_resumed_between_two_logs_it_logs_the_same_means(tmp_path: Path) -> None:
    """But of the loss, of which the Trainer itself logs the mean since it was resumed."""
    whole = train(
        tmp_path, MASKED_SELDOM, "gpt2", save_strategy="steps", save_steps=1, logging_steps=4
    )
    for step in (1, 2, 3, 5, 6):
        again = resumed(tmp_path, step, MASKED_SELDOM, logging_steps=4)
        assert same(logged(again, "density"), logged(whole, "density")), step
        for entry in logged(again, "loss"):
            assert entry["loss/task"] + entry["loss/density"] == pytest.approx(entry["loss"])


@pytest.mark.thorough
def test_older_checkpoints_are_read_and_a_new_training_begins_anew(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    whole = train(tmp_path, MASKED_SELDOM, "gpt2", **settings)
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    kept = json.loads(state.read_text())
    attributes = kept["stateful_callbacks"]["DensityState"]["attributes"]
    assert attributes.keys() == {"version", "seed", "log", "budget"}
    kept["stateful_callbacks"]["DensityState"]["attributes"] = {"version": 1, "seed": 3}
    state.write_text(json.dumps(kept))
    older = resumed(tmp_path, 3, MASKED_SELDOM)
    assert torch.equal(weights(older.model), weights(whole.model))
    assert math.isnan(logged(older, "density")[3]["density/soft_size"])  # which is not known
    assert logged(older, "density")[4:] == logged(whole, "density")[4:]
    whole.train()  # once more, from the first step
    assert math.isnan(logged(whole, "density")[0]["density/soft_size"])


@pytest.mark.thorough
def test_a_subclass_that_leaves_the_term_out_is_told(tmp_path: Path) -> None:
    class Leaves(with_density(Trainer)):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(**inputs).loss

    class Drops(with_density(Trainer)):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            return super().compute_loss(model, inputs, *rest, **options).detach() + sum(
                parameter.sum() for parameter in model.parameters()
            )

    ids = tiny_prompt(8, batch=4)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    for kind, said in ((Leaves, "does not call super"), (Drops, "no gradient reached it")):
        args = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True)
        trained = kind(tiny_model("llama"), args, train_dataset=rows, density={"strength": 0.0})
        trained.train()  # inert
        with pytest.raises(TrainerSetupError, match=said):
            kind(tiny_model("llama"), args, train_dataset=rows, density={"strength": 0.7}).train()


@pytest.mark.thorough
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_without_a_checkpoint_the_trainer_says_so_itself(tmp_path: Path, strength: float) -> None:
    said = []
    for kind, options in ((Trainer, {}), (DensityTrainer, {"density": {"strength": strength}})):
        args = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True)
        with pytest.raises(ValueError, match="No valid checkpoint") as raised:
            kind(tiny_model("llama"), args, **options).train(resume_from_checkpoint=True)
        said.append(str(raised.value))
    assert said[0] == said[1]


@pytest.mark.thorough
def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    train(tmp_path, OPTIONS, "gpt2", save_strategy="steps", save_steps=4)
    with pytest.raises(TrainerSetupError, match=r"found a density seed of 3, this run has 4"):
        resumed(tmp_path, 4, {**OPTIONS, "seed": 4})
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    kept = json.loads(state.read_text())
    kept["stateful_callbacks"]["DensityState"]["attributes"]["version"] = 99
    state.write_text(json.dumps(kept))
    with pytest.raises(TrainerSetupError, match=r"found a density version of 99, this run has 3"):
        resumed(tmp_path, 4)


@pytest.mark.thorough
def test_a_checkpoint_without_the_term_is_fine(tmp_path: Path) -> None:
    train(tmp_path, None, "gpt2", save_strategy="steps", save_steps=4)
    trainer = resumed(tmp_path, 4)
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["DensityState"]["attributes"]["seed"] == 3
    assert trainer.state.global_step == 8


class LikeSFT(Ordered, Trainer):
    """What TRL's SFTTrainer does around the loss: its signature, a changed batch, metrics."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["use_cache"] = False
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self.seen = outputs.logits.shape
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "mean_token_accuracy": 0.5}, start_time)


@pytest.mark.thorough
def test_composes_with_a_trainer_that_has_a_loss_of_its_own(tmp_path: Path) -> None:
    class Mixed(DensityMixin, LikeSFT):
        pass

    found = []
    for kind in (Mixed, with_density(LikeSFT), DensityTrainer):
        torch.manual_seed(0)
        model = tiny_model("llama", dtype=torch.float64).train()
        trainer = kind(model=model, args=arguments(tmp_path), train_dataset=rows(), density=OPTIONS)
        trainer.train()
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_class_that_has_the_term_gets_no_second_one() -> None:
    once = with_density(Trainer)
    assert with_density(once) is once


@pytest.mark.parametrize("given", ["Trainer", object()])
def test_what_is_no_class_is_refused(given: Any) -> None:
    with pytest.raises(TrainerSetupError, match=r"found (str|object), expected a class: with_dens"):
        with_density(given)


def test_token_types_that_the_trainer_hands_to_the_model_are_refused(tmp_path: Path) -> None:
    data = [{**row, "token_type_ids": torch.zeros_like(row["input_ids"])} for row in rows()]
    model = tiny_model("gpt2").train()
    trainer = DensityTrainer(
        model=model, args=arguments(tmp_path), train_dataset=data, density=OPTIONS
    )
    with pytest.raises(InvalidInputError, match="found token_type_ids, which GPT2LMHeadModel"):
        trainer.train()


def test_batches_without_token_ids_are_refused(tmp_path: Path) -> None:
    class Renamed(DensityTrainer):
        def inputs_of(self, inputs: Any) -> dict[str, Any]:
            return super().inputs_of({"ids": inputs["input_ids"]})

    model = tiny_model("llama").train()
    trainer = Renamed(model=model, args=arguments(tmp_path), train_dataset=rows(), density=OPTIONS)
    with pytest.raises(InvalidInputError, match=r"found \['ids'\], expected 'input_ids'"):
        trainer.train()
    assert trainer._density is None
    with pytest.raises(InvalidInputError, match="strength: found -1"):
        DensityTrainer(model=model, args=arguments(tmp_path), density={"strength": -1.0})


class Broken(TrainerCallback):
    """Breaks a weight after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].model.layers[0].mlp.down_proj.weight[0, 0] = math.nan


@pytest.mark.thorough
def test_logits_that_are_not_finite_follow_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(DensityLoss, "finish", lambda density: ended.append(density))
    for mode in ("raise", "skip"):
        trainer = DensityTrainer(
            model=tiny_model("llama").train(), args=arguments(tmp_path, max_steps=2),
            train_dataset=rows(), density={**OPTIONS, "on_nonfinite": mode}, callbacks=[Broken],
        )  # fmt: skip
        if mode == "raise":
            with pytest.raises(NonFiniteError, match=r"step 1: .* NaN or inf"):
                trainer.train()
        else:
            trainer.train()
            assert trainer.state.log_history[1]["loss/density"] == 0
        assert len(ended) == (mode == "skip")  # a training that failed says why itself


def test_maps_of_other_weights_do_not_stay_beside_new_ones(tmp_path: Path) -> None:
    for preset, has_maps in (("balanced", True), ("sparse", False)):
        model = tiny_model("llama").train()
        options = {**OPTIONS, "preset": preset}
        trainer = DensityTrainer(
            model=model, args=arguments(tmp_path, max_steps=2), train_dataset=rows(),
            density=options,
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        assert (tmp_path / "saved" / EXIT_MAPS_FILE).exists() == has_maps
    set_exit_maps(model, ExitMaps([2], 32))  # what a model has is saved with it, as by fit
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / EXIT_MAPS_FILE).exists()


def test_prompt_tuning_is_saved_at_strength_0(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_model("llama").train(), config)
    settings = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    DensityTrainer(
        model=model, args=settings, train_dataset=rows(), density={"strength": 0}
    ).train()
    assert (tmp_path / "checkpoint-1" / "adapter_config.json").exists()


@pytest.mark.thorough
def test_maps_of_exits_lie_beside_the_weights_that_they_were_learned_with(tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    settings = arguments(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="distance", greater_is_better=False,
    )  # fmt: skip

    class SecondIsBest(DensityTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            found = {"eval_distance": abs(self.state.global_step - 2.0)}
            self.log(found)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found

    trainer = SecondIsBest(
        model=model,
        args=settings,
        train_dataset=rows(),
        eval_dataset=rows(),
        density=OPTIONS | {"exits": 0.3},
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved, second, third = (
        load_file(tmp_path / folder / EXIT_MAPS_FILE)["after_layer_2"]
        for folder in ("saved", "checkpoint-2", "checkpoint-3")
    )
    assert torch.equal(saved, second)
    assert not torch.equal(second, third)
