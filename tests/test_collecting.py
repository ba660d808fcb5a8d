"""Nothing is collected inside, and afterwards it is as before."""

import gc
import weakref

import pytest

from softtrace.collecting import none_collected


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_what_is_in_a_cycle_is_let_go_before_and_not_inside() -> None:
    before = weakref.ref(Cycle())
    with none_collected():
        assert before() is None
        inside = weakref.ref(Cycle())
        assert not gc.isenabled()
        assert inside() is not None
    assert gc.isenabled()


def test_it_collects_again_after_an_error_and_stays_off_where_it_was_off() -> None:
    with pytest.raises(RuntimeError), none_collected():
        raise RuntimeError
    assert gc.isenabled()
    gc.disable()
    try:
        with none_collected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
