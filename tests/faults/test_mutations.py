"""The guards that are mutated are still where the mutations look for them."""

from __future__ import annotations

import re

import pytest

from tests.support.mutations import MUTATIONS, ROOT, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_guard_and_its_test_are_there(mutation: Mutation) -> None:
    source = (ROOT / "src" / "softtrace" / mutation.file).read_text("utf-8")
    changed = mutated(source, mutation)
    compile(changed, mutation.file, "exec")
    assert changed != source
    path, _, name = mutation.test.partition("[")[0].partition("::")
    tests = (ROOT / path).read_text("utf-8")
    assert re.search(rf"^def {name or 'test_'}", tests, re.MULTILINE)


def test_a_guard_that_is_not_there_is_noticed() -> None:
    with pytest.raises(ValueError, match="found 0 times"):
        mutated("nothing", MUTATIONS[0])
