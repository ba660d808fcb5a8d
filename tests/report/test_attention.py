"""Figures name their kind of attention."""

from __future__ import annotations

from typing import get_args

import pytest

from softtrace.report.attention import MEANINGS, attention_meaning, attention_name, unmasked_note
from softtrace.tracing.masking import AttentionKind


@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_every_kind_is_named_and_explained(kind: str) -> None:
    found = [{"attention": kind}] * 2
    assert attention_name(found) == f"attention {kind}"
    assert unmasked_note(found).startswith(f"attention {kind}, which does not matter")
    assert attention_meaning(found) == MEANINGS[kind]


def test_what_was_measured_before_there_was_a_choice_is_recorded() -> None:
    assert attention_name([{}]) == "attention recorded"
    assert attention_meaning([{}]) == MEANINGS["recorded"]


def test_several_kinds_are_all_named() -> None:
    found = [{"attention": "recomputed"}, {"attention": "kept"}]
    assert attention_name(found) == "attention kept and recomputed"
