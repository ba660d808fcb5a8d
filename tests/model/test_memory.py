"""Out of memory: work is halved and continues; other errors are none of it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from softtrace.model.memory import Portions, attempt, half_that_fits


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage takes longer than the rest of such a test."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def fitting(most: int, tried: list[int]) -> Callable[[int, int], list[int]]:
    """Work on so many things at a time; more of them are out of memory, as torch says it."""

    def work(first: int, end: int) -> list[int]:
        tried.append(end - first)
        if end - first > most:
            raise out_of_memory()
        return list(range(first, end))

    return work


def test_portions_are_halved_until_they_fit_and_stay_small(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[int] = []
    portions = Portions(8, "row(s)")
    found = list(portions.each(0, 8, fitting(3, tried)))
    assert found == [(2, [0, 1]), (2, [2, 3]), (2, [4, 5]), (2, [6, 7])]
    assert list(portions.each(3, 6, fitting(3, tried))) == [(2, [3, 4]), (1, [5])]
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]
    said = [record.message for record in caplog.records]
    assert said == [
        "memory ran out at 8 row(s); continuing with 4 at a time",
        "memory ran out at 4 row(s); continuing with 2 at a time",
    ]


def test_one_that_does_not_fit_by_itself_is_done_otherwise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[int] = []
    portions = Portions(2, "row(s)", "parts of one")
    found = list(portions.each(0, 3, fitting(0, tried), lambda one: [-one]))
    assert found == [(1, [0]), (1, [-1]), (1, [-2])]
    assert "memory ran out at 1 row(s); continuing with parts of one" in caplog.text
    assert tried == [2, 1]  # later ones are not tried again


def test_without_another_way_the_error_comes_through(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(Portions(2, "row(s)").each(0, 2, fitting(0, [])))
    said = [record.message for record in caplog.records]
    assert said == ["memory ran out at 2 row(s); continuing with 1 at a time"]


@pytest.mark.parametrize(
    "error",
    [
        out_of_memory(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "windows", "driver", "cublas", "python"],
)
def test_memory_runs_out_in_many_words(error: Exception) -> None:
    def work(size: int) -> int:
        if size > 1:
            raise error
        return size

    assert half_that_fits(8, 1, work) == 1


def test_other_errors_are_not_taken_for_it() -> None:
    def broken() -> int:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        attempt(broken)


def test_the_largest_half_that_fits_is_found() -> None:
    def work(size: int) -> list[int]:
        return fitting(5, [])(0, size)

    assert half_that_fits(16, 1, work) == 4
    assert half_that_fits(16, 5, work) == 0
