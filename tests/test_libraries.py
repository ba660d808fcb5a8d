"""What a library refuses is told from what is a bug, by where and how it was raised."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softtrace import libraries
from softtrace.errors import InvalidInputError, ModelDirectoryError
from softtrace.libraries import missing, refusals

LIBRARY = """
def on_purpose(kind):
    if kind is not None:
        raise kind(
            "no such\\n  kernel"
        )

def by_itself():
    return {}["key"]

def counted():
    return int("many")

def calls(function):
    return function()

def needs(name):
    __import__(name)
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package beside the others that are installed."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "their_library.py").write_text(LIBRARY, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("their_library")
    monkeypatch.delitem(libraries.sys.modules, "their_library")


def own(source: str, **known: Any) -> Callable[[], None]:
    """A function of softtrace's own: where it is written, this test has no part in it."""
    module = types.ModuleType("softtrace.made_up")
    vars(module).update(known, refusals=refusals, InvalidInputError=InvalidInputError)
    exec(compile(source, "softtrace/made_up.py", "exec"), vars(module))
    return vars(module)["run"]  # type: ignore[no-any-return]


ASKING = """
def run():
    with refusals(InvalidInputError, "trainer", " (choose another)"):
        {}
"""


@pytest.mark.parametrize("kind", [ValueError, KeyError, ImportError, AssertionError, TypeError])
def test_what_a_library_raises_on_purpose_is_one_line(library: Any, kind: type[Exception]) -> None:
    run = own(ASKING.format("library.on_purpose(kind)"), library=library, kind=kind)
    with pytest.raises(InvalidInputError) as caught:
        run()
    line = str(caught.value)
    assert line.startswith("trainer: ")
    assert line.endswith(" (choose another)")
    assert "no such" in line
    assert "\n" not in line
    assert isinstance(caught.value.__cause__, kind)


def test_what_compiled_code_raises_is_one_line_too(library: Any) -> None:
    with pytest.raises(InvalidInputError, match="trainer: invalid literal for int"):
        own(ASKING.format("library.counted()"), library=library)()


def users_function() -> None:
    raise ValueError("a bug of the user's")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("library.by_itself()", KeyError),  # nobody raised it
        ("library.calls(user)", ValueError),  # in a user's class
        (
            "library.calls(lambda: library.on_purpose(ValueError))",
            ValueError,
        ),  # called by us
        ("raise ValueError('ours')", ValueError),
        ("library.calls(lambda: {}['ours'])", KeyError),
        ("library.calls(refused)", ModelDirectoryError),
    ],
)
def test_bugs_pass_as_they_are(library: Any, call: str, kind: type[Exception]) -> None:
    def refused() -> None:
        raise ModelDirectoryError("said already")

    run = own(ASKING.format(call), library=library, user=users_function, refused=refused)
    with pytest.raises(kind) as caught:
        run()
    assert not isinstance(caught.value, InvalidInputError)


def failure(source: str, **known: Any) -> Any:
    """The error of a function of softtrace's own, with a traceback that begins in it."""
    try:
        own(source, **known)()
    except Exception as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        return error
    raise AssertionError


def test_a_package_that_is_missing_is_named_whoever_wants_it(library: Any) -> None:
    for wanted in ("library.needs('no_such_package')", "import no_such_package"):
        said = missing(failure(f"def run():\n    {wanted}", library=library))
        assert said == "No module named 'no_such_package'; install what is missing"
    users = failure("def run():\n    user()", user=lambda: library.needs("no_such_package"))
    assert missing(users) is None
    assert missing(failure("def run():\n    import softtrace.no_such_module")) is None


def test_what_a_library_has_not_got_is_named(library: Any) -> None:
    error = failure("def run():\n    library.on_purpose(NotImplementedError)", library=library)
    assert missing(error) == (
        "no such kernel (choose another attention kernel, device or number format)"
    )
    assert missing(failure("def run():\n    raise NotImplementedError('later')")) is None
