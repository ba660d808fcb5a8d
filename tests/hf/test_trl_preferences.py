"""TRL's trainers on preferences with the term: rows of answers without labels, and a mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from softtrace import InvalidInputError, TrainerSetupError
from softtrace.hf import with_density
from tests.support.trl_steps import check_a_step
from tests.support.trl_training import (
    ANSWERS,
    END,
    OPTIONS,
    QUESTIONS,
    WRONG,
    Case,
    answers,
    made,
    preferences,
    tiny,
    tokenizer,
)

pytestmark = pytest.mark.thorough


def reference() -> dict[str, Any]:
    """A reference model that is not the trained one, so that the task has a gradient."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.9)
    return {"ref_model": model}


def judged() -> Dataset:
    """Prompts and completions that are good or not."""
    labels = [number % 2 == 0 for number in range(len(QUESTIONS))]
    columns = {"prompt": QUESTIONS, "completion": ANSWERS, "label": labels}
    return Dataset.from_dict(columns)


def triples() -> Dataset:
    """Preferences, and an answer to learn by heart."""
    reference = [f" {answer}" for answer in ANSWERS]
    return preferences().add_column("reference", reference)


DPO = Case(DPOTrainer, DPOConfig, preferences, others=reference)
CHOSEN, REJECTED = ({text + END for text in texts} for texts in (ANSWERS, WRONG))
BOTH = [CHOSEN, CHOSEN, REJECTED, REJECTED]  # two pairs a batch

#: case -> (what is trained, for every row of its batch the texts that counted tokens may spell)
CASES: dict[str, tuple[Case, list[set[str]]]] = {
    "DPO": (DPO, BOTH),
    "DPO, accumulated": (
        replace(DPO, settings={"gradient_accumulation_steps": 2}), [*BOTH, *BOTH],
    ),
    "DPO, reference beforehand": (replace(DPO, settings={"precompute_ref_log_probs": True}), BOTH),
    # The reference is the trained model without its adapters: a second forward of it
    "DPO, adapters": (replace(DPO, others=dict, lora=True), BOTH),
    "DPO, experts": (replace(
        DPO, family="mixtral", dtype=torch.float32,
        others=lambda: {"ref_model": tiny("mixtral", torch.float32)},
    ), BOTH),
    "KTO": (Case(KTOTrainer, KTOConfig, judged, others=reference), [CHOSEN, CHOSEN]),
    "TPO": (
        Case(TPOTrainer, TPOConfig, triples), [*BOTH, *[{f" {text}" for text in CHOSEN}] * 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_answers_count_and_prompts_do_not(name: str, tmp_path: Path) -> None:
    case, allowed = CASES[name]
    found = answers(check_a_step(case, tmp_path))
    assert len(found) == len(allowed)
    assert all(text in texts for text, texts in zip(found, allowed, strict=True)), found


def test_a_reward_model_is_refused(tmp_path: Path) -> None:
    config = tiny().config
    config.num_labels = 1
    trainer = with_density(RewardTrainer)(
        model=transformers.LlamaForSequenceClassification(config),
        args=RewardConfig(tmp_path, max_steps=1, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=preferences(), processing_class=tokenizer(), density=OPTIONS,
    )  # fmt: skip
    with pytest.raises(TrainerSetupError, match=r"DensityRewardTrainer needs.*reward models do"):
        trainer.train()


def test_rows_that_are_kept_apart_are_refused_by_name(tmp_path: Path) -> None:
    settings = {"max_length": 64, "remove_unused_columns": False}
    trainer = made(Case(ORPOTrainer, ORPOConfig, preferences, settings), tmp_path, OPTIONS)
    with pytest.raises(InvalidInputError, match=r"found .*chosen_input_ids.*expected 'input_ids'"):
        trainer.train()
