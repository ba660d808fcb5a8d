"""Loading and comparing runs: ratios, refusals, files that are whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softtrace.cli.compare import compare
from softtrace.errors import DataError, InvalidInputError, OutputExistsError
from softtrace.evaluation.density_file import load_density
from tests.support.densities import synthetic_density, write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """The plain model and one with traces of half the size."""
    return [
        write_run(tmp_path / name, synthetic_density(name, factor))
        for name, factor in (("plain", 1.0), ("soft", 0.5))
    ]


def test_load_takes_the_file_and_its_folder(runs: list[Path]) -> None:
    assert load_density(runs[0]) == load_density(str(runs[0].parent)) == synthetic_density()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b'{"version": 1, "tok', "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[1]", 'no "version", expected a density.json as written by softtrace evaluate'),
        (
            b'{"tokens": 1}',
            'no "version", expected a density.json as written by softtrace evaluate',
        ),
        (b'{"version": 2}', "found version 2, this softtrace reads version 1"),
        (b'{"version": 1}', "found no 'model'"),
    ],
)
def test_load_says_what_is_wrong_with_a_file(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "density.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_density(tmp_path)
    assert str(path) in str(caught.value)


def _without_agreement(density: dict[str, Any]) -> None:
    del density["early_exit"]["agreement"]["easy"]


def _text_as_area(density: dict[str, Any]) -> None:
    density["area"]["all"] = "0.3"


def _empty_curve(density: dict[str, Any]) -> None:
    density["curve"]["sizes"] = []


def _list_for_model(density: dict[str, Any]) -> None:
    density["model"] = []


def _half_baselines(density: dict[str, Any]) -> None:
    del density["curve"]["baselines"]["inverse"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_agreement, "found no 'early_exit/agreement/easy'"),
        (_text_as_area, "found '0.3' for 'area/all'"),
        (_empty_curve, "'curve/sizes', expected a list that is not empty"),
        (_list_for_model, "found list for 'model', expected an object"),
        (_half_baselines, "found no 'curve/baselines/inverse'"),
    ],
)
def test_load_names_the_missing_or_wrong_value(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    density = synthetic_density()
    spoil(density)
    with pytest.raises(DataError, match=message):
        load_density(write_run(tmp_path, density))


def test_load_accepts_switched_off_parts(tmp_path: Path) -> None:
    density = synthetic_density()
    density["curve"]["baselines"] = None
    density["topology"] = None
    assert load_density(write_run(tmp_path, density))["topology"] is None


@pytest.mark.parametrize("bounds", [None, {}, {"area_all": [0.1, 0.2], "loss_all": [None, None]}])
def test_load_accepts_intervals(tmp_path: Path, bounds: dict[str, Any] | None) -> None:
    density = {**synthetic_density(), "intervals": bounds}
    assert load_density(write_run(tmp_path, density))["intervals"] == bounds


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 2], "found list for 'intervals', expected an object"),
        ({"area_all": 0.1}, "found float for 'intervals/area_all', expected a list"),
        ({"area_all": ["a", "b"]}, "found 'a' for 'intervals/area_all'"),
        ({"area_all": [0.1]}, "found 1 numbers for 'intervals/area_all', expected 2"),
    ],
)
def test_load_names_damaged_intervals(tmp_path: Path, bounds: object, message: str) -> None:
    density = {**synthetic_density(), "intervals": bounds}
    with pytest.raises(DataError, match=message):
        load_density(write_run(tmp_path, density))


def test_compare_writes_values_and_ratios_to_the_first_run(
    runs: list[Path], tmp_path: Path
) -> None:
    table = compare([str(path) for path in runs], str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert written["version"] == 1
    assert written["first"] == "plain"
    assert [run["label"] for run in written["runs"]] == ["plain", "soft"]
    measures = written["measures"]
    for key in ("size_at_tv_0.2_easy", "size_at_tv_0.2_hard", "area_easy", "area_all"):
        assert measures[key]["runs"]["plain"]["ratio"] == 1
        assert measures[key]["runs"]["soft"]["ratio"] == pytest.approx(0.5)
        assert measures[key]["better"] == "lower"
    assert measures["size_at_tv_0.2_easy"]["runs"]["soft"]["value"] == pytest.approx(0.004)
    assert measures["loss_all"]["runs"]["soft"] == {"value": 3.0, "ratio": 1.0}
    # Half of 4 layers: the exit after the second.
    assert measures["early_exit_half_easy"]["runs"]["plain"] == {"value": 0.8, "ratio": 1.0}
    assert measures["early_exit_half_easy"]["better"] == "higher"
    assert "-50.0 %" in table
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.json",
        "compare.txt",
        "report.html",
        "tv_over_size.png",
        "size_against_entropy.png",
        "edges_over_size.png",
        "early_exit_agreement.png",
    }


def test_a_ratio_to_zero_or_to_nothing_is_null(tmp_path: Path) -> None:
    plain, soft = synthetic_density("plain"), synthetic_density("soft")
    plain["size_at_tv_0.2"]["easy"] = 0.0
    plain["area"]["easy"] = None
    paths = [write_run(tmp_path / "a", plain), write_run(tmp_path / "b", soft)]
    assert "n/a" in compare(paths, tmp_path / "out")
    measures = json.loads((tmp_path / "out" / "compare.json").read_text())["measures"]
    assert measures["size_at_tv_0.2_easy"]["runs"]["soft"] == {"value": 0.008, "ratio": None}
    assert measures["area_easy"]["runs"]["plain"] == {"value": None, "ratio": None}


@pytest.mark.parametrize("count", [0, 1, 9])
def test_compare_refuses_too_few_and_too_many_runs(
    runs: list[Path], tmp_path: Path, count: int
) -> None:
    with pytest.raises(InvalidInputError, match=f"found {count}, allowed are 2 to 8"):
        compare([runs[0]] * count, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("data", "sha256"), "f" * 64, "data sha256.* differs, 0123456789ab… in .* and ffffff"),
        (("data", "block_size"), 128, "block_size differs, 64 in .*plain.* and 128 in .*soft"),
        (("min_context",), 16, "min_context differs, 32 in .* and 16 in .* --positions"),
        (("tokens",), 5, "number of explained tokens differs, 992 in .* and 5 in"),
        (
            ("dtype",),
            "bfloat16",
            "number format of the weights differs, float32 in .* and bfloat16",
        ),
    ],
)
def test_compare_refuses_runs_on_other_tokens(
    tmp_path: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    other = synthetic_density("soft")
    place = other
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    paths = [
        write_run(tmp_path / "plain", synthetic_density()),
        write_run(tmp_path / "soft", other),
    ]
    with pytest.raises(InvalidInputError, match=f"cannot be compared: .*{message}"):
        compare(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compare_takes_files_that_do_not_say_their_number_format(tmp_path: Path) -> None:
    before, after, other = (synthetic_density(name) for name in ("before", "after", "other"))
    del before["dtype"]
    runs = {"before": before, "after": after, "other": other}
    paths = [write_run(tmp_path / name, each) for name, each in runs.items()]
    compare([*map(str, paths)], str(tmp_path / "out"))
    other["dtype"] = "bfloat16"
    write_run(tmp_path / "other", other)
    with pytest.raises(
        InvalidInputError, match=r"differs, float32 in .*after.* and bfloat16 in .*o"
    ):
        compare([*map(str, paths)], str(tmp_path / "again"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": {"block_size": 128}, "min_context": 64, "tokens": 2016}, "block_size differs"),
        ({"min_context": 55, "tokens": 256}, "min_context differs"),
        ({"data": {"blocks": 16}, "tokens": 496}, "number of explained tokens differs"),
    ],
)
def test_compare_names_the_option_that_made_tokens_others(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    """Blocks of another length or number are other tokens: their hash alone says nothing of it."""
    plain, other = synthetic_density(), synthetic_density("soft")
    other.update({**changed, "data": {**other["data"], **changed.get("data", {})}})
    other["data"]["sha256"] = "f" * 64
    paths = [write_run(tmp_path / "plain", plain), write_run(tmp_path / "soft", other)]
    with pytest.raises(InvalidInputError, match=f"cannot be compared: .*{message}"):
        compare(paths, tmp_path / "out")


@pytest.mark.thorough
def test_models_of_one_name_are_told_apart_by_folder_then_by_number(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, synthetic_density("last")) for name in ("seed0", "seed1")]
    assert "seed1" in compare(paths, tmp_path / "out")
    compare([paths[0], paths[0]], tmp_path / "twice")
    written = json.loads((tmp_path / "twice" / "compare.json").read_text())
    assert [run["label"] for run in written["runs"]] == ["seed0 (1)", "seed0 (2)"]


@pytest.mark.thorough
def test_compare_keeps_what_a_folder_holds_unless_told(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"found 1 entry, expected a new or empty folder"):
        compare(runs, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    compare(runs, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "compare.json").exists()
