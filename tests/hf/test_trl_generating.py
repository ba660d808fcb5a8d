"""TRL's trainers that write their own completions: what they wrote counts, prompts do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.a2po import A2POConfig, A2POTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from softtrace import TrainerSetupError
from tests.support.trl_steps import check_a_step
from tests.support.trl_training import (
    ANSWERS,
    OPTIONS,
    QUESTIONS,
    Case,
    chats,
    fit,
    tiny,
    tokenizer,
)

pytestmark = pytest.mark.thorough

WRITTEN = 6


def prompts() -> Dataset:
    """Of two lengths, so that there is padding before some."""
    return Dataset.from_dict({"prompt": [text + "?" * (n % 2) for n, text in enumerate(QUESTIONS)]})


def advised() -> Dataset:
    """Prompts, with what a teacher knows besides."""
    return prompts().add_column("privileged_context", ANSWERS)


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def one(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def judge() -> dict[str, Any]:
    return {"reward_funcs": rewards}


def teacher() -> dict[str, Any]:
    model = tiny()
    model.lm_head.weight.data.mul_(0.5)
    return {"teacher_model": model}


SHORT = {"max_completion_length": WRITTEN}
PAIRS = {**SHORT, "num_generations": 2, "beta": 0.0}
CASES = {
    "GRPO": Case(GRPOTrainer, GRPOConfig, prompts, PAIRS, judge),
    "GRPO, accumulated": Case(
        GRPOTrainer, GRPOConfig, prompts, {**PAIRS, "gradient_accumulation_steps": 2}, judge
    ),
    "RLOO": Case(RLOOTrainer, RLOOConfig, prompts, PAIRS, judge),
    "distillation": Case(DistillationTrainer, DistillationConfig, prompts, SHORT, teacher),
    "self-distillation": Case(
        SDFTTrainer, SDFTConfig, advised,
        {**SHORT, "num_generations": 2, "teacher_model_kind": "live"},
    ),
    "GKD, of its own": Case(
        GKDTrainer, GKDConfig, chats, {"max_new_tokens": WRITTEN, "lmbda": 1.0}, teacher
    ),
    "GKD, of the data": Case(GKDTrainer, GKDConfig, chats, {"lmbda": 0.0}, teacher),
    "A2PO": Case(
        A2POTrainer, A2POConfig, prompts, {**SHORT, "num_value_samples": 2},
        lambda: {"reward_funcs": one},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_counts(name: str, tmp_path: Path) -> None:
    run = check_a_step(CASES[name], tmp_path)
    known = [question + "?" * (n % 2) for n, question in enumerate(QUESTIONS)]
    for _, _, read in run.read:
        rows = zip(read["input_ids"], read["labels"], read["attention_mask"].bool(), strict=True)
        for ids, labels, real in rows:
            written = labels != -100
            assert (ids == labels)[written].all()
            before = tokenizer().decode(ids[real & ~written])
            if CASES[name].data is chats:
                assert before.startswith("<user>")
                assert before.endswith("<assistant>")
            else:
                assert before in known
            assert written.sum() >= 1
            if name != "GKD, of the data":
                assert written.sum() <= WRITTEN


def test_a_loss_of_its_own_in_training_step_is_refused(tmp_path: Path) -> None:
    case = Case(OnlineDPOTrainer, OnlineDPOConfig, prompts, {"max_new_tokens": WRITTEN}, judge)
    with pytest.raises(TrainerSetupError, match=r"OnlineDPOTrainer\.training_step computes its"):
        fit(case, tmp_path, OPTIONS)
