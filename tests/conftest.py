"""What holds for every test: the order, and that nothing is left to luck."""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

#: of the tests' folders, those about taking models apart and proving them
PROOFS = {"anatomy", "model", "tracing"}

# The same examples every time and everywhere, with no deadline: what fails was broken by a change.
# `--hypothesis-profile search` looks for examples that nobody has seen yet.
hypothesis.settings.load_profile("ci")
hypothesis.settings.register_profile(
    "search", hypothesis.settings.get_profile("ci"), derandomize=False
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, with thorough ones next, as each is run by one process of two.

    So what is left in the end is soon done, and neither waits for the other.
    """
    marks: defaultdict[Path, set[str]] = defaultdict(set)
    for item in items:
        marks[item.path].update({"slow", "thorough"} & set(item.keywords))
    items.sort(key=lambda item: [mark not in marks[item.path] for mark in ("slow", "thorough")])


def pytest_collection_finish() -> None:
    """Modules stay, so the collector need not go through them: half a second for each trainer.

    What tests make is collected as ever.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Plots are empty files: drawing them takes longer than measuring a tiny model.

    Plots are tested in ``tests/report``; commands draw theirs in ``tests/docs/test_readme.py``,
    ``tests/cli/test_main.py`` and ``test_study.py``.
    """

    def save(figure: Any, path: Path) -> Path:
        path.touch()
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softtrace.report.drawing.save", save)
        yield


@pytest.fixture(scope="module", autouse=True)
def _proven_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models equal to one that was proven are not proven again: see ``tests/support/proofs.py``.

    But where proofs are tested.
    """
    from softtrace.tracing import attach  # not where tests are only handed out
    from tests.support.proofs import once

    with pytest.MonkeyPatch.context() as patch:
        if request.path.relative_to(Path(__file__).parent).parts[0] not in PROOFS:
            patch.setattr(attach, "prove", once(attach.prove))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """What a fixture draws does not depend on what ran before, nor on whom it is made for."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Nor what a test draws."""
    _seed()


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the state that all share is what this is about
