"""The benchmark of compiled decoding: rows that can be stopped, that fail alone, that are kept."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recipes.benchmarks.speed import compiled_decoding, decoded_models, merge_decoding
from recipes.benchmarks.speed.decoded_models import DRAFTS, TO_UNSURE, WITHOUT_MAP
from recipes.benchmarks.speed.decoding_rows import LOOPS
from softtrace.model.exit_maps import ExitMaps, save_exit_maps, set_exit_maps
from softtrace.model.loading import load_model
from tests.support.corpus import write_model, write_tree

TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 300,
}  # fmt: skip
SHORT = [
    *("--backends", "none", "--exits", "0.25", "0.5", "--new-tokens", "8", "--prompt-tokens", "8"),
    *("--dtype", "float32", "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compiled_decoding, decoded_models):
        monkeypatch.setattr(module, "MODELS", {"tiny": ("Llama", TINY)})


def measured(file: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of the only record of the file."""
    compiled_decoding.main([*SHORT, "--out", str(file), *options])
    (record,) = json.loads(file.read_text())["measurements"]
    found: list[dict[str, Any]] = record["found"]
    return found


def test_the_curve_is_over_what_was_given(tmp_path: Path) -> None:
    found = measured(
        tmp_path / "found.json",
        *("--parts", "sizes", "--acceptance", "0", "0.5", "1", "--batches", "1", "2"),
        *("--given-prompts", "3", "--backends", "none", "no such"),
    )
    good = [each for each in found if "failed" not in each]
    assert [(each["batch"], each["exit_layer"], each["given_acceptance"]) for each in good] == [
        (batch, depth, share) for batch in (1, 2) for depth in (1, 2) for share in (0, 0.5, 1)
    ]
    for each in good:
        assert each["speedup"]["median"] > 0
        assert each["identical"] is None
        if each["given_acceptance"] != 0.5:
            assert each["tokens_a_check"] == (4 if each["given_acceptance"] else 1)
    # The same positions are right whatever drafts.
    by_chance = [each["tokens_a_check"] for each in good if each["given_acceptance"] == 0.5]
    assert by_chance[0] == by_chance[1]
    assert 1 < by_chance[0] < 4
    failed = [each for each in found if "failed" in each]
    assert [each["backend"] for each in failed] == ["no such"] * 4
    assert all("UnsupportedModelError" in each["failed"] for each in failed)


@pytest.mark.thorough
def test_each_way_to_draft_is_a_row_of_its_own(tmp_path: Path) -> None:
    for name in ("plain-seed-0", "fifth-seed-0", "fifth-seed-1"):
        write_model(tmp_path / "models" / name)
    mapped = tmp_path / "models" / "fifth-seed-0"
    model = load_model(mapped)
    set_exit_maps(model, ExitMaps([2], int(model.config.hidden_size)))  # type: ignore[arg-type]
    save_exit_maps(model, mapped)
    (mapped / "trained.json").write_text('{"loss": 1.5, "blocks": "abc"}')
    blocks = {"8": torch.arange(24 * 8, dtype=torch.int32).reshape(24, 8) % 50}
    save_file(blocks, tmp_path / "blocks.safetensors")
    common = (
        *("--trained", str(tmp_path / "models"), "--data", str(tmp_path / "blocks.safetensors")),
        *("--parts", "trained", "early", "--draft-tokens", "3", "--prompts", "12"),
        *("--drafts", *DRAFTS, "--agreements", "0.01", "1"),
    )
    found = measured(tmp_path / "0.json", *common, "--seeds", "0", "--names", "plain", "fifth")
    by_model: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        by_model.setdefault(each["model"], []).append(each)
    assert [*by_model] == ["fifth-seed-0", "plain-seed-0"]
    drafts = [each for each in by_model["fifth-seed-0"] if "draft" in each]
    assert [each["draft"] for each in drafts] == [*DRAFTS]
    assert {each["share"] for each in drafts} == {2 / 3}  # what its map says
    assert {each["held_out_loss"] for each in drafts if "failed" not in each} == {1.5}
    plain = [each for each in by_model["plain-seed-0"] if "draft" in each]
    assert WITHOUT_MAP not in {each["draft"] for each in plain}
    assert [each["share"] for each in plain if each["draft"] == "exit"] == [0.25, 0.5]
    for each in (*drafts, *plain):
        if "failed" not in each:
            assert 0 <= each["accepted"] <= each["reached"] <= each["drafted"]
            assert (each["confidence"] > 0) == (each["draft"] == TO_UNSURE)
    early = [each for each in by_model["fifth-seed-0"] if "agreement_asked" in each]
    assert [each["agreement_asked"] for each in early] == [0.01, 1.0]
    assert early[0]["left_out"] is None
    assert early[0]["agreement"] >= 0
    assert str(tmp_path) not in (tmp_path / "0.json").read_text()


def test_results_are_replaced_by_kind_and_never_pooled(tmp_path: Path) -> None:
    def record(hardware: str, *rows: tuple[str, Any]) -> dict[str, Any]:
        found = [{"model": model, "draft": "exit", "accepted": what} for model, what in rows]
        return {"hardware": hardware, "found": found}

    files = [tmp_path / f"{number}.json" for number in range(3)]
    for file, records in zip(
        files,
        [
            [
                record("GPU", ("a-b-prose-plain-seed-0", 1), ("a-b-python-plain-seed-0", 2)),
                record("CPU", ("a-b-prose-plain-seed-0", 3)),
                record("GPU", ("a-b-prose-other-seed-4", 4)),
            ],
            [record("GPU", ("a-b-prose-plain-seed-0", 5))],
            [record("GPU", ("a-b-prose-plain-seed-1", 6))],
        ],
        strict=True,
    ):
        file.write_text(json.dumps({"measurements": records}))
    merge_decoding.main([*map(str, files[1:]), "--into", str(files[0])])
    found = json.loads(files[0].read_text())["measurements"]
    assert [[row["accepted"] for row in each["found"]] for each in found] == [[2], [3], [5], [6]]
    with pytest.raises(SystemExit, match=r"measured twice: .*plain-seed-1"):
        merge_decoding.main([str(files[2])] * 2 + ["--into", str(files[0])])


@pytest.mark.thorough
def test_trained_models_are_those_of_a_folder(tmp_path: Path) -> None:
    names = ["term-seed-0", "plain-seed-1"]  # one seed after another
    for name in names:
        write_model(tmp_path / "models" / name)
    found = measured(
        tmp_path / "found.json",
        *("--parts", "trained", "stock", "--trained", str(tmp_path / "models"), "--prompts", "3"),
        *("--data", str(write_tree(tmp_path / "text")), "--stock-prompts", "2"),
        *("--drafts", "exit", "lookup", "both", "--draft-tokens", "2"),
        *("--exits", "0.5", "--new-tokens", "4", "--trained-batches", "1", "2"),
    )
    drafts = [each for each in found if "loop" not in each]
    assert [(each["batch"], each["model"], each["draft"]) for each in drafts] == [
        (batch, name, draft)
        for batch in (1, 2)
        for name in names
        for draft in ("exit", "lookup", "both")
    ]
    assert all(each["largest_tie"] is None for each in drafts)
    assert all(each["identical"] == 1 and each["tokens_a_check"] >= 1 for each in drafts)
    loops = [(each["model"], each["loop"]) for each in found if "loop" in each]
    assert loops == [(name, loop) for name in names for loop in LOOPS]
    assert not any("failed" in each for each in found)
    assert str(tmp_path) not in (tmp_path / "found.json").read_text()


def test_what_was_measured_is_kept_and_what_failed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--parts", "sizes", "--acceptance", "1", "--batches", "1", "--given-prompts", "3")
    own, asked = compiled_decoding.Bench.drafts, []

    def drafts(self: Any, row: dict[str, Any]) -> Any:
        asked.append(row["share"])
        if len(asked) == 2:
            raise TimeoutError("took more than 3 s")
        return own(self, row)

    monkeypatch.setattr(compiled_decoding.Bench, "drafts", drafts)
    first = measured(tmp_path / "found.json", *options)
    assert [each.get("failed") for each in first] == [None, "TimeoutError: took more than 3 s"]
    again = measured(tmp_path / "found.json", *options)
    assert asked == [0.25, 0.5, 0.5]
    assert again[0] == first[0]
    assert [each["share"] for each in again] == [0.25, 0.5]
    assert "failed" not in again[1]
    capsys.readouterr()
    other = tmp_path / "other.json"
    compiled_decoding.main([*SHORT, "--out", str(other), *options, "--minutes", "1e-9"])
    assert "2 rows are left for the same command" in capsys.readouterr().out
    assert not other.exists()


def test_what_takes_too_long_is_given_up() -> None:
    with (
        pytest.raises(TimeoutError, match="took more than 0 s"),
        compiled_decoding.limited(0.01),
    ):
        time.sleep(60)
    with compiled_decoding.limited(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
