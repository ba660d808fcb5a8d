"""Tasks of held-out text: which answers are asked for, and what counts as right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from recipes.benchmarks.comparison.real_tasks import (
    cloze_spans,
    line_spans,
    tasks_right,
    turn_spans,
)


def test_words_that_came_before_are_asked_for_in_the_second_half() -> None:
    texts = [
        " every",
        " driver",
        " re",
        "sets",
        ".",
        " A",
        " driver",
        " re",
        "sets",
        " every",
        " bus",
    ]
    # " every" ends the second half's words; " bus" was not there before and may continue.
    assert cloze_spans(texts) == [(6, 7), (7, 9), (9, 10)]
    assert cloze_spans(texts[:6]) == []


def test_second_halves_of_whole_lines_are_asked_for() -> None:
    first = ["a", " =", " b", "\n", "c", " =", " d", "\n"]
    second = ["x", " =", " f", "(y", ")", "\n", "z", "\n", "cut", " off"]
    # Five tokens of a line begin at 8; "z" is too short, and the last line has no end.
    assert line_spans(first + second) == []  # that line begins in the first half
    assert line_spans(first[:4] + second) == []
    assert line_spans(first + second[:6]) == [(11, 13)]


def test_the_end_of_an_answer_is_its_fence_and_the_end_of_turn() -> None:
    texts = ["```", "python", "\n", "x", "\n", "```", "<end>", "\n", "no", "<end>"]
    assert turn_spans(texts, "<end>") == [(5, 7)]
    assert turn_spans(["```", "\n", "<end>"], "<end>") == []  # nothing stood before the fence


class Counting(nn.Module):
    """Says that every token is followed by the next number, but for what is given."""

    def __init__(self, wrong: set[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.wrong = wrong

    def forward(self, input_ids: Tensor) -> Any:
        following = input_ids + 1
        for token in self.wrong:
            following = torch.where(input_ids == token, 0, following)
        return SimpleNamespace(logits=nn.functional.one_hot(following, 40).float())


def test_an_answer_is_right_if_all_of_it_would_be_written() -> None:
    blocks = torch.arange(20).repeat(3, 1)
    spans = torch.tensor([[0, 1, 4], [1, 4, 7], [2, 7, 9], [2, 19, 20]])
    tasks = {"cloze blocks": blocks, "cloze spans": spans}
    assert tasks_right(Counting(set()), tasks, 2) == {"cloze": 1.0}
    # Token 5 follows 4: the answer at 4 to 6 has it, nobody else; token 19 follows 18.
    assert tasks_right(Counting({4}), tasks, 2) == {"cloze": 0.75}
    assert tasks_right(Counting({18}), tasks, 3) == {"cloze": 0.75}
    assert tasks_right(Counting({0, 3, 6, 18}), tasks, 3) == {"cloze": 0.0}
