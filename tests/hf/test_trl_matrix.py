"""Options of TRL's SFTTrainer, one after the other, on models of several families.

What ``test_trl_sft.py`` tries with gradients by hand is not tried again here. TRL's own tests are
not in its source distribution (1.16), and load their models from the hub. These are the options
that they try, in our own words, so that TRL's next version is tried too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from tests.support.trl_training import (
    ANSWERS,
    QUESTIONS,
    Case,
    chats,
    completions,
    fit,
    texts,
    tokenizer,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:.*will be removed in v2\.0\.0:FutureWarning"),
    # PEFT, of GPT-2's projections and of Mixtral's experts
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

FAMILIES = ("gemma3_text", "gpt2", "mixtral")  # and llama, on which all is tried


def conversations() -> Dataset:
    """Chats in an older layout, which TRL converts."""
    turns = [
        [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return Dataset.from_dict({"conversations": turns})


def chat_completions() -> Dataset:
    """Chats whose last turn is the completion."""
    said = {
        "prompt": [[{"role": "user", "content": each}] for each in QUESTIONS],
        "completion": [[{"role": "assistant", "content": each}] for each in ANSWERS],
    }
    return Dataset.from_dict(said)


def tokenised() -> Dataset:
    """Rows of ids, with labels on the second half."""
    ids = [tokenizer()(text)["input_ids"] for text in texts()["text"]]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def streamed() -> Any:
    return texts().to_iterable_dataset()


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return losses / num_items_in_batch


def formatted() -> dict[str, Any]:
    return {"formatting_func": lambda row: f"{row['prompt']}: {row['completion']}"}


def adapters(**changes: Any) -> Callable[[], dict[str, Any]]:
    usual: dict[str, Any] = {"r": 2, "target_modules": "all-linear"}
    return lambda: {"peft_config": LoraConfig(**{**usual, **changes})}


def case(data: Callable[[], Any] = completions, others: Any = dict, **settings: Any) -> Case:
    return Case(SFTTrainer, SFTConfig, data, settings, others, dtype=torch.float32)


#: tried on every family: positions of documents, its own modules, its numbers; rows are all alike
EVERYWHERE: dict[str, Case] = {
    "packed": case(packing=True, max_length=48),
    "adapters": case(others=adapters()),
    "bfloat16": case(bf16=True, gradient_accumulation_steps=2),
}
#: tried on one
ONCE: dict[str, Case] = {
    "wrapped": case(packing=True, max_length=48, packing_strategy="wrapped"),
    "bfloat16": EVERYWHERE["bfloat16"],
    "chats": case(chats),
    "chat completions": case(chat_completions),
    "conversations": case(conversations),
    "tokenised": case(tokenised),
    "tokenised, as it is": case(tokenised, dataset_kwargs={"skip_prepare_dataset": True}),
    "formatted": case(others=formatted, completion_only_loss=False),
    "streamed": case(streamed),
    "packed and split": case(packing=True, max_length=12, packing_strategy="bfd_split"),
    "cut off": case(texts, max_length=10),
    "shuffled": case(shuffle_dataset=True),
    "old name of the loss": case(loss_type="chunked_nll"),
    "a loss of one's own": case(others=lambda: {"compute_loss_func": own_loss}),
    "noise": case(neftune_noise_alpha=5.0),
    "DoRA": case(others=adapters(use_dora=True, lora_dropout=0.1)),
    "some tokens": case(others=adapters(trainable_token_indices={"embed_tokens": [3, 4]})),
    "whole head": case(others=adapters(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "clipped": case(max_grad_norm=0.1, gradient_accumulation_steps=2),
    "evaluated": case(
        others=lambda: {"eval_dataset": {"one": completions(), "two": completions()}},
        eval_strategy="steps", eval_steps=1,
    ),
    "evaluated, packed": case(
        others=lambda: {"eval_dataset": completions()}, packing=True, max_length=48,
        eval_packing=False, eval_strategy="steps", eval_steps=1,
    ),
}  # fmt: skip
#: tried on the family with experts
OF_EXPERTS: dict[str, Case] = {
    "routers' loss": case(router_aux_loss_coef=0.1),
    "no routers' loss": case(router_aux_loss_coef=0.0),
}
TABLE = [
    *((family, name, each) for family in FAMILIES for name, each in EVERYWHERE.items()),
    *(("llama", name, each) for name, each in ONCE.items()),
    *(("mixtral", name, each) for name, each in OF_EXPERTS.items()),
]


@pytest.mark.parametrize(
    ("family", "chosen"), [pytest.param(f, each, id=f"{f}-{name}") for f, name, each in TABLE]
)
def test_an_option_of_sft(family: str, chosen: Case, tmp_path: Path) -> None:
    chosen = Case(**{**vars(chosen), "family": family})
    plain = fit(chosen, tmp_path, None, max_steps=2)
    silent = fit(chosen, tmp_path, {"strength": 0.0}, max_steps=2)
    assert torch.equal(silent.weights, plain.weights)
    assert [entry["loss"] for entry in silent.logged] == [entry["loss"] for entry in plain.logged]

    run = fit(chosen, tmp_path, {"strength": 0.05, "share": 1.0}, max_steps=2)
    assert len(run.logged) == 2
    for entry in run.logged:
        assert math.isfinite(entry["loss"])
        assert entry["loss/density"] > 0
        assert entry["density/exit_distance"] > 0
    assert run.logged[0]["loss/task"] == pytest.approx(plain.logged[0]["loss"], rel=1e-4)
    assert not torch.equal(run.weights, plain.weights)
