"""TRL's own SFTTrainer with the term: which tokens count, and one step of it by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig
from trl import SFTConfig, SFTTrainer

from softtrace import InvalidInputError, UnsupportedModelError
from tests.support.trl_steps import check_a_step
from tests.support.trl_training import (
    ANSWERS,
    END,
    OPTIONS,
    QUESTIONS,
    Case,
    answers,
    chats,
    completions,
    fit,
    made,
    texts,
)

pytestmark = pytest.mark.thorough


def sft(data: Callable[[], Any] = completions, **settings: Any) -> Case:
    return Case(SFTTrainer, SFTConfig, data, settings)


COMPLETED = {answer + END for answer in ANSWERS}
#: of a text all tokens but the first are predicted
WRITTEN = {
    (question + answer + END)[1:] for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
}
SAID = {f"{answer}{END} yes{END}" for answer in ANSWERS}
PACKED = {"packing": True, "max_length": 64}

#: case -> (what is trained, the texts that a document's counted tokens may spell)
CASES: dict[str, tuple[Case, set[str]]] = {
    "completions": (sft(), COMPLETED),
    "completions, padded further": (sft(pad_to_multiple_of=32), COMPLETED),
    "completions, accumulated": (sft(gradient_accumulation_steps=2), COMPLETED),
    "prompts too": (sft(completion_only_loss=False), WRITTEN),
    "texts": (sft(texts), WRITTEN),
    "what the assistant says": (sft(chats, assistant_only_loss=True), SAID),
    "packed": (sft(**PACKED), COMPLETED),
    "packed texts": (sft(texts, **PACKED), WRITTEN),
    "packed chats": (sft(chats, assistant_only_loss=True, **PACKED), SAID),
    "without padding": (sft(padding_free=True, max_length=None), COMPLETED),
    "flattened, then padded": (
        sft(padding_free=True, max_length=None, pad_to_multiple_of=32), {*COMPLETED, ""},
    ),
    "adapters": (replace(sft(), lora=True), COMPLETED),
    "adapters, packed": (replace(sft(**PACKED), lora=True), COMPLETED),
    "no checkpointing": (sft(gradient_checkpointing=False), COMPLETED),
    "selective checkpointing": (
        sft(gradient_checkpointing_kwargs={"selective": True}), COMPLETED,
    ),
    "dynamic fine-tuning": (sft(loss_type="dft"), COMPLETED),
    "Gemma 3": (replace(sft(), family="gemma3_text"), COMPLETED),
    # TRL asks them for their routers' logits
    "Mixtral": (replace(sft(), family="mixtral", dtype=torch.float32), COMPLETED),
    "Qwen3, experts": (replace(sft(), family="qwen3_moe", dtype=torch.float32), COMPLETED),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_tasks_and_that_of_the_tokens_it_trains_on(name: str, tmp_path: Path) -> None:
    case, allowed = CASES[name]
    run = check_a_step(case, tmp_path)
    found = answers(run)
    assert len(found) >= 2
    assert set(found) <= allowed
    assert len(set(found) - {""}) >= 2
    if case.family in ("mixtral", "qwen3_moe"):
        assert run.trainer.model.config.output_router_logits


def test_wrapped_rows_count_what_their_labels_say(tmp_path: Path) -> None:
    """To TRL too such a row is one text: documents are cut anywhere, and see one another."""
    case = sft(packing=True, packing_strategy="wrapped", max_length=32)
    found = answers(fit(case, tmp_path, OPTIONS))
    stream = [
        (token, counts)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        for text, counts in (([*question], False), ([*answer, END], True))
        for token in text
    ]
    rows = [stream[start + 1 : start + 32] for start in range(0, len(stream), 32)]
    wanted = {"".join(token for token, counts in row if counts) for row in rows}
    assert len(found) == 2
    assert set(found) <= wanted


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
def test_smoothed_labels_take_two_forwards_of_which_one_is_watched(tmp_path: Path) -> None:
    check_a_step(sft(label_smoothing_factor=0.1), tmp_path)


def test_what_the_term_cannot_do_is_refused(tmp_path: Path) -> None:
    reentrant = sft(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InvalidInputError, match="found activation checkpointing with use_reent"):
        fit(reentrant, tmp_path, OPTIONS)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned = replace(sft(gradient_checkpointing=False), others=lambda: {"peft_config": prefix})
    with pytest.raises(UnsupportedModelError, match="adds virtual tokens"):
        fit(tuned, tmp_path, OPTIONS)


@pytest.mark.filterwarnings("ignore:.use_liger_kernel=True. is deprecated:FutureWarning")
def test_a_kernel_that_is_not_installed_is_refused_by_the_trainer_itself(tmp_path: Path) -> None:
    for density in (None, OPTIONS):
        with pytest.raises(ImportError, match="liger-kernel"):
            fit(sft(use_liger_kernel=True), tmp_path, density)


def test_a_training_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path) -> None:
    case = replace(sft(save_strategy="steps", save_steps=1, max_steps=3), family="gpt2")  # dropout
    options = {**OPTIONS, "every": 2}
    whole = fit(case, tmp_path, options)
    again = made(case, tmp_path, options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, wanted in whole.trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], wanted), name
    last = again.state.log_history[-2]
    names = ("loss", "loss/task", "loss/density", "density/exit_distance")
    assert {name: last[name] for name in names} == {name: whole.logged[-1][name] for name in names}
