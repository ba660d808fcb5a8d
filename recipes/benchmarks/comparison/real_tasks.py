"""Three tasks of the public kind, made of held-out text: what fine-tuning must not unlearn.

- ``cloze``: words of five letters or more that stood in the passage before, as in LAMBADA
  (Paperno et al. 2016, arXiv 1606.06031).
- ``completion``: the second half of a line of source code, as in CodeXGLUE's line completion
  (Lu et al. 2021, arXiv 2102.04664).
- ``chat``: that an answer ends as its format has it, with its fence closed and the turn ended.

An answer counts if greedy decoding would give it token by token. That is so where every token of
the true answer is the most likely one after the true text before it: one forward says it of all.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.evaluation.token_text import TokenText

_LETTERS = 5  # of the shortest word that is asked for
#: task -> the text it is made of
TASKS = {"cloze": "prose", "completion": "python", "chat": "chat"}
_FENCE = "```"


def cloze_spans(texts: list[str]) -> list[tuple[int, int]]:
    """Where the second half of a passage repeats a word of the first tokens: first and end.

    Args:
        texts: of the passage's tokens.
    """
    words, start = [], 0
    for place in range(1, len(texts) + 1):
        if place == len(texts) or not texts[place][:1].isalpha():
            words.append((start, place, "".join(texts[start:place])))
            start = place
    seen: set[str] = set()
    found = []
    for first, end, text in words:
        word = text.strip()
        asked = text[:1] == " " and word.isalpha() and len(word) >= _LETTERS
        # The last word may continue in the next block.
        if asked and word in seen and first >= len(texts) // 2 and end < len(texts):
            found.append((first, end))
        seen.add(word)
    return found


def line_spans(texts: list[str]) -> list[tuple[int, int]]:
    """The second halves of whole lines of code, of two tokens or more: first and end."""
    ends = [place + 1 for place, text in enumerate(texts) if "\n" in text]
    found = []
    for begin, end in pairwise(ends):
        first = begin + (end - begin) // 2
        if begin >= len(texts) // 2 and end - 1 - first >= 2:
            found.append((first, end - 1))
    return found


def turn_spans(texts: list[str], end_of_turn: str) -> list[tuple[int, int]]:
    """The fence and the end of turn that end an answer: first and end."""
    found = []
    for place, text in enumerate(texts):
        first = place - 1
        while first > 0 and not texts[first].strip():
            first -= 1
        if text == end_of_turn and first > 0 and texts[first].strip() == _FENCE:
            found.append((first, place + 1))
    return found


def make_tasks(tokenizer: Any, held_out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks and spans of every task that there is text for.

    Args:
        tokenizer: of the blocks.
        held_out: ``[N, T]`` token ids of ``prose``, ``python`` and, if the tokenizer has a chat
            template, ``chat``.

    Returns:
        By task ``"<task> blocks"``, ``[N, T]`` int32, and ``"<task> spans"``, ``[M, 3]`` int32:
        row, first place and the place after the last.
    """
    said = TokenText(tokenizer)
    tasks: dict[str, Tensor] = {}
    for task, text in TASKS.items():
        if text not in held_out:
            continue
        spans = []
        for row, block in enumerate(held_out[text].tolist()):
            texts = said.of_text(block)
            if task == "cloze":
                found = cloze_spans(texts)
            elif task == "completion":
                found = line_spans(texts)
            else:
                found = turn_spans(texts, tokenizer.eos_token)
            spans += [(row, *span) for span in found]
        tasks[f"{task} blocks"] = held_out[text].to(torch.int32)
        tasks[f"{task} spans"] = torch.tensor(spans, dtype=torch.int32).reshape(-1, 3)
    return tasks


@torch.no_grad()
def tasks_right(model: nn.Module, tasks: dict[str, Tensor], batch_size: int) -> dict[str, float]:
    """Share of each task's answers that greedy decoding gives whole.

    Args:
        model: a causal language model.
        tasks: from :func:`make_tasks`.
        batch_size: blocks a forward.
    """
    device = next(model.parameters()).device
    shares = {}
    for task in sorted(name.removesuffix(" spans") for name in tasks if name.endswith(" spans")):
        blocks, spans = tasks[f"{task} blocks"].long(), tasks[f"{task} spans"].long()
        right = torch.cat(
            [
                model(input_ids=part.to(device)).logits[:, :-1].argmax(-1).cpu() == part[:, 1:]
                for part in blocks.split(batch_size)
            ]
        )  # of the token after each place
        wrong_before = nn.functional.pad((~right).long().cumsum(-1), (2, 0))
        row, first, end = spans.unbind(-1)
        shares[task] = float((wrong_before[row, end] == wrong_before[row, first]).float().mean())
    return shares
