"""What a process says of its failure is what the others can raise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from softtrace.errors import CheckpointError, DataError, SofttraceError
from softtrace.processes import Told, of_another, raise_everywhere, told


class Cut(DataError):
    """Not one of softtrace's own classes, and cannot be made from its words."""

    def __init__(self, line: Callable[[], int]) -> None:
        super().__init__(f"cut off at line {line()}")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (CheckpointError("too short"), ("CheckpointError", "too short")),
        (Cut(lambda: 3), ("DataError", "cut off at line 3")),
        (KeyError("name"), ("SofttraceError", "KeyError: 'name'")),
    ],
    ids=lambda each: type(each).__name__,
)
def test_the_others_raise_the_class_and_the_words(failure: Exception, words: Told) -> None:
    assert told(failure) == words
    other = of_another(1, 4, words)
    assert type(other).__name__ == words[0]
    assert isinstance(other, SofttraceError)
    assert str(other) == f"process 1 (of 0 to 3) failed: {words[1]}"


def test_one_process_raises_its_own() -> None:
    assert told(None) is None
    raise_everywhere(None)
    own = KeyError("name")
    with pytest.raises(KeyError) as caught:
        raise_everywhere(own)
    assert caught.value is own
