"""Short trainings by TRL's own trainers, what the term read in them, and one step of it by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from softtrace import DensityLoss
from softtrace.graph.batch import Batch, documents_of
from softtrace.hf import with_density
from tests.support import zoo
from tests.support.corpus import byte_tokenizer
from tests.support.tiny import tiny_model

huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer that is made
datasets.disable_progress_bars()

OPTIONS: dict[str, Any] = {"strength": 0.6, "share": 1.0, "seed": 3, "exits": 0.4}
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
CHAT = (
    "{% for each in messages %}{{ '<' + each['role'] + '>' }}"
    "{% if each['role'] == 'assistant' %}"
    "{% generation %}{{ each['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ each['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
QUESTIONS = [f"{number} and {number}?" for number in range(8)]
ANSWERS = [f" make {2 * number}" for number in range(8)]
WRONG = [" no" + "o" * (number % 3) for number in range(8)]
END = "<end>"


def tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, ``<end>``, and a chat template that says what an assistant wrote."""
    made = byte_tokenizer()
    made.chat_template = CHAT
    return made


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model that reads what :func:`tokenizer` writes; of another type by the zoo's table."""
    words: dict[str, Any] = {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256}
    if family in zoo.VERIFIED:
        kind, changes = zoo.VERIFIED[family]
        return zoo.tiny(kind, dtype, **{**changes, **words, "max_position_embeddings": 128}).train()
    return tiny_model(family, dtype=dtype, **words, max_position_embeddings=128).train()


def completions() -> Any:
    """Prompts and completions."""
    return datasets.Dataset.from_dict({"prompt": QUESTIONS, "completion": ANSWERS})


def texts() -> Any:
    """The same as one text each."""
    both = [question + answer for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    return datasets.Dataset.from_dict({"text": both})


def chats() -> Any:
    """Two turns of an assistant each, one of them the same everywhere."""
    turns = [
        [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": " yes"},
        ]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return datasets.Dataset.from_dict({"messages": turns})


def preferences() -> Any:
    """Prompts with an answer that is preferred and one that is not."""
    return datasets.Dataset.from_dict({"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": WRONG})


@dataclass(frozen=True)
class Case:
    """A training to be tried: TRL's trainer and its config, data, and what differs from the usual.

    Attributes:
        trainer, config: TRL's classes.
        data: makes the rows.
        settings: of the config.
        others: of the trainer, made anew for each training.
        family, dtype: of the model.
        lora: whether adapters are trained in its place.
    """

    trainer: Any
    config: Any
    data: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    others: Callable[[], dict[str, Any]] = dict
    family: str = "llama"
    dtype: torch.dtype = torch.float64
    lora: bool = False


@dataclass
class Run:
    """A training that ended.

    Attributes:
        trainer: what it was done by.
        start: the weights that it began with, by name.
        read: what the term read of each batch, and the step and the batch's place in it.
        gradients: of each step, by name of the weight, before the optimizer took them.
    """

    trainer: Any
    start: dict[str, Tensor]
    read: list[tuple[int, int, dict[str, Any]]]
    gradients: list[dict[str, Tensor]]

    @property
    def logged(self) -> list[dict[str, float]]:
        """What was logged of each step."""
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def weights(self) -> Tensor:
        """All of them, as one row."""
        return torch.cat([each.detach().flatten() for each in self.trainer.model.parameters()])


class _Gradients(TrainerCallback):
    def __init__(self, seen: list[dict[str, Tensor]]) -> None:
        self.seen = seen

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(_gradients_of(kwargs["model"]))


def _gradients_of(model: Any) -> dict[str, Tensor]:
    return {
        name: each.grad.detach().clone()
        for name, each in model.named_parameters()
        if each.grad is not None
    }


def made(case: Case, folder: Path, density: dict[str, Any] | None, **changes: Any) -> Any:
    """The trainer of a case, with the term unless ``density`` is None."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **case.settings,
        **changes,
    }
    kind, own = (case.trainer, {}) if density is None else (with_density(case.trainer), density)
    others = case.others()
    if case.lora:
        others["peft_config"] = LORA
    if density is not None:
        others["density"] = own
    return kind(
        model=tiny(case.family, case.dtype), args=case.config(**settings),
        train_dataset=case.data(), processing_class=tokenizer(), **others,
    )  # fmt: skip


def fit(case: Case, folder: Path, density: dict[str, Any] | None, **changes: Any) -> Run:
    """Train a case from its fixed start."""
    trainer = made(case, folder, density, **changes)
    start = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    run = Run(trainer, start, [], [])
    trainer.add_callback(_Gradients(run.gradients))
    if density is not None:
        reading = trainer.inputs_of

        def read(inputs: Any) -> dict[str, Any]:
            found: dict[str, Any] = reading(inputs)
            step, later = trainer._place
            kept = {name: each.clone() for name, each in found.items() if each is not None}
            run.read.append((step, later - 1, kept))
            return found

        trainer.inputs_of = read
    trainer.train()
    return run


def answers(run: Run) -> list[str]:
    """What the tokens that counted in the first step had to predict, a text for each document."""
    found = []
    for step, _, read in run.read:
        batch = Batch.of(**read)
        positions = batch.positions if batch.packed else None
        documents = (
            torch.zeros_like(batch.targets) if positions is None else documents_of(positions)
        )
        if step == 0:
            for row in range(len(batch.targets)):
                for document in documents[row].unique():
                    chosen = batch.counted[row] & (documents[row] == document)
                    found.append(tokenizer().decode(batch.targets[row][chosen]))
    return found


def by_hand(
    case: Case, run: Run, options: dict[str, Any], around: AbstractContextManager[Any] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """The term of the first step and its gradients, by :class:`DensityLoss` alone.

    The model is made anew: the one that was trained has TRL's forward in place of its own.
    """
    model = tiny(case.family, case.dtype)
    if case.lora:
        model = get_peft_model(model, LORA)
    model.load_state_dict(run.start)
    density = DensityLoss(model.train(), **options)
    first = [(place, read) for step, place, read in run.read if step == 0]
    total = 0.0
    for place, read in first:
        inputs = {name: value for name, value in read.items() if name != "labels"}
        with around or nullcontext(), density.watching():
            model(**inputs, use_cache=False)
        term = density(**read, step=0, micro_step=place).loss / len(first)
        term.backward()
        total += term.item()
    return total, _gradients_of(model)
