"""``softtrace study``: intervals of one model, paired differences of two, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from softtrace.cli import main
from softtrace.cli.evaluate import evaluate
from softtrace.cli.study import StudySource, study
from softtrace.data import pack, read_documents, split_by_file
from softtrace.data.text_source import TextSource
from softtrace.density.curve import fine_thresholds
from softtrace.errors import (
    DataError,
    InvalidInputError,
    ModelDirectoryError,
    OutputExistsError,
    SofttraceError,
)
from softtrace.evaluation.run_options import RunOptions
from softtrace.evaluation.study.answers import ANSWERS
from softtrace.model.loading import load_model, load_tokenizer
from tests.support.calls import CPU, changed
from tests.support.corpus import END, byte_tokenizer, write_model, write_tree
from tests.support.tiny import tiny_model
from tests.support.tokenizers import byte_level

pytestmark = pytest.mark.thorough

OPTIONS: dict[str, Any] = {
    "block_size": 16,
    "blocks": 5,
    "batch_size": 4,
    "lengths": (3, 6),
    "targets": 2,
    "resamples": 60,
    "run": CPU,
}


def half(text: str | Path) -> StudySource:
    """A text of which half is measured."""
    return StudySource(str(text), held_out_share=0.5)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models of one tokenizer, and a text."""
    root = tmp_path_factory.mktemp("sources")
    before, after = root / "before", root / "after"
    write_model(before)
    model = load_model(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(after)
    load_tokenizer(before).save_pretrained(after)
    text = write_tree(root / "text")
    return {"before": str(before), "after": str(after), "text": str(text)}


@pytest.fixture(scope="module")
def alone(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone")
    study([sources["before"]], half(sources["text"]), str(out), **OPTIONS)
    assert sorted(path.name for path in out.iterdir()) == ["study.json", "study.png", "study.txt"]
    found: dict[str, Any] = json.loads((out / "study.json").read_text())
    return found


@pytest.fixture(scope="module")
def undrawn(alone: dict[str, Any]) -> Iterator[None]:
    """Drawing takes longer than measuring a tiny model; once, before, it is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softtrace.cli.questions.draw_study", lambda study: Figure())
        yield


@pytest.fixture(scope="module")
def both(
    undrawn: None,
    sources: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("both")
    models = [sources["before"], sources["after"]]
    study(models, half(sources["text"]), str(out), **OPTIONS)
    found: dict[str, Any] = json.loads((out / "study.json").read_text())
    return found


def array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=float)


def test_every_answer_has_the_shape_of_its_axes_and_holds_its_value(alone: dict[str, Any]) -> None:
    assert set(alone["results"]) == {answer.key for answer in ANSWERS}
    for key, result in alone["results"].items():
        shape = tuple(len(alone["axes"][axis]) for axis in result["axes"])
        assert len(result["models"]) == 1
        assert result["difference"] is None
        value, low, high = (array(result["models"][0][end]) for end in ("value", "low", "high"))
        assert value.shape == low.shape == high.shape == shape, key
        assert (low <= high)[~np.isnan(low)].all(), key
    tv = alone["results"]["phases/tv"]["models"][0]
    assert tv["value"][-1] == tv["low"][-1] == tv["high"][-1] == 0.0
    edges = array(alone["results"]["phases/edges"]["models"][0]["value"])
    np.testing.assert_allclose(edges.sum((1, 2)), 1.0)
    for axis, key in ((1, "phases/kinds"), (2, "phases/depths")):
        values = array(alone["results"][key]["models"][0]["value"])
        np.testing.assert_allclose(edges.sum(axis), values)


def test_agrees_with_evaluate_on_the_same_tokens(
    alone: dict[str, Any], sources: dict[str, str], tmp_path: Path
) -> None:
    options = {name: OPTIONS[name] for name in ("block_size", "blocks", "batch_size", "run")}
    source, out = TextSource(sources["text"], held_out_share=0.5), str(tmp_path / "out")
    density = evaluate(sources["before"], source, out, extra_blocks=0, **options)
    assert alone["data"]["sha256"] == density["data"]["sha256"]
    assert alone["tokens"] == density["tokens"]
    value = {key: result["models"][0]["value"] for key, result in alone["results"].items()}
    assert value["overall/loss"] == pytest.approx(density["loss_nats"]["all"], rel=1e-4)
    assert value["overall/area"] == pytest.approx(density["area"]["all"], rel=1e-4)
    assert value["overall/size"] == pytest.approx(density["size_at_tv_0.2"]["all"], rel=1e-3)
    for what, name in (("area", "area"), ("size", "size_at_tv_0.2")):
        expected = density["entropy_spearman"][name]
        assert value[f"uncertainty/{what}_entropy"] == pytest.approx(expected, abs=2e-3)


def test_unigrams_are_those_of_the_training_side(
    alone: dict[str, Any], sources: dict[str, str]
) -> None:
    training, held_out = split_by_file(read_documents(sources["text"]), 0.5)
    expected = sum(len(document.text) + 1 for document in training)  # a token a byte, and an end
    assert alone["unigrams"]["tokens"] == expected
    assert alone["unigrams"]["documents"] == len(training)
    assert alone["data"]["documents"] == len(held_out)


@pytest.mark.usefixtures("alone", "undrawn")
def test_a_model_less_itself_is_exactly_zero(sources: dict[str, str], tmp_path: Path) -> None:
    models = [sources["before"], sources["before"]]
    found = study(models, half(sources["text"]), str(tmp_path / "out"), **OPTIONS)
    assert [model["label"] for model in found["models"]] == ["before (before)", "before (after)"]
    for key, result in found["results"].items():
        for values in result["difference"].values():
            defined = array(values)
            assert (defined[~np.isnan(defined)] == 0.0).all(), key
    assert found["results"]["overall/area"]["difference"] == {"value": 0, "low": 0, "high": 0}


def test_differences_are_after_less_before_and_paired(
    both: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert [model["label"] for model in both["models"]] == ["before", "after"]
    for key, result in both["results"].items():
        first, second = result["models"]
        # the same seed, and another model beside it: the same numbers to the last bit
        assert first == alone["results"][key]["models"][0], key
        change = array(second["value"]) - array(first["value"])
        np.testing.assert_allclose(array(result["difference"]["value"]), change, atol=1e-12)
    loss = both["results"]["overall/loss"]
    assert loss["difference"]["value"] != 0
    spans = [part["high"] - part["low"] for part in (*loss["models"], loss["difference"])]
    assert spans[2] < min(spans[:2])  # the same sequences are hard for both


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("mode", [{}, {"generation": True}, {"paper": True}])
def test_a_model_that_is_spread_out_has_the_same_answers(
    sources: dict[str, str],
    undrawn: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: dict[str, bool],
) -> None:
    for name in ("paper.draw_paper", "generation.draw_generation"):
        monkeypatch.setattr(f"softtrace.cli.{name}", lambda found: Figure())
    options = {**OPTIONS, "block_size": 17, "lengths": (4, 8), "blocks": 2, **mode}
    spread = {"device_map": "auto", "max_memory": {"cpu": "1KB"}}  # the rest is on disk
    found, wanted = (
        study([sources["before"]], half(sources["text"]), str(tmp_path / name), **options, **more)
        for name, more in (("spread", spread), ("whole", {}))
    )
    for key, result in wanted["results"].items():
        for one, other in zip(found["results"][key]["models"], result["models"], strict=True):
            np.testing.assert_allclose(array(one["value"]), array(other["value"]), atol=1e-6)


def test_another_seed_moves_intervals_alone(
    alone: dict[str, Any], sources: dict[str, str], tmp_path: Path
) -> None:
    where = [sources["before"]], half(sources["text"]), str(tmp_path / "out")
    other = study(*where, **{**OPTIONS, "seed": 1})
    before, after = (run["results"]["overall/loss"]["models"][0] for run in (alone, other))
    assert before["value"] == after["value"]
    assert (before["low"], before["high"]) != (after["low"], after["high"])


def test_chosen_positions_are_the_last_ones(sources: dict[str, str], tmp_path: Path) -> None:
    where = [sources["before"]], half(sources["text"]), str(tmp_path / "out")
    found = study(*where, positions=3, **OPTIONS)
    assert found["settings"]["min_context"] == 12
    assert found["axes"]["positions"] == [12, 14]


def test_the_file_says_how_it_was_made(alone: dict[str, Any]) -> None:
    assert alone["version"] == 1
    assert {"created", "command", "versions", "hardware", "seconds"} <= set(alone)
    assert alone["settings"]["resamples"] == 60
    assert alone["settings"]["confidence"] == 0.95
    assert alone["axes"]["positions"] == [8, 14]
    assert alone["axes"]["contexts"] == [3, 6, "all before"]
    assert alone["models"][0]["vocabulary"] == 257
    assert alone["models"][0]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": []}, InvalidInputError, "models: found none, expected at least one"),
        (
            {"models": ["a", "b", "c"], "sensitivity": True},
            InvalidInputError,
            "models: found 3, allowed with sensitivity are 1, or 2",
        ),
        (
            {"sensitivity": True, "paper": True},
            InvalidInputError,
            "found more than one, allowed is one",
        ),
        ({"models": ["./none"]}, ModelDirectoryError, "no such directory"),
        (
            {"held_out_share": 0.0},
            InvalidInputError,
            r"held_out_share: found 0.0, allowed \(0, 1\)",
        ),
        ({"held_out_share": 1e-9}, DataError, "no file on the held-out side"),
        ({"held_out_share": 1 - 1e-9}, DataError, "no file on the training side"),
        ({"blocks": 1}, InvalidInputError, "blocks: found 1, allowed are integers from 2"),
        ({"block_size": 4000}, DataError, "less than one block|needs at least 2"),
        ({"lengths": ()}, InvalidInputError, "lengths: found .*, expected at least one"),
        ({"lengths": (4, 4)}, InvalidInputError, "lengths: found .*, each of them once"),
        ({"lengths": (1,)}, InvalidInputError, "lengths: found 1, allowed are integers from 2"),
        ({"lengths": (16,)}, InvalidInputError, "lengths: found 16, allowed are at most 15"),
        ({"targets": 0}, InvalidInputError, "targets: found 0"),
        ({"resamples": 0}, InvalidInputError, "resamples: found 0"),
        ({"positions": 16}, InvalidInputError, "positions: found 16"),
        ({"positions": 3, "paper": True}, InvalidInputError, "positions: found with paper"),
        ({"smoothing": 0.0}, InvalidInputError, "smoothing: found 0.0"),
        ({"out": "{root}"}, OutputExistsError, "expected a new or empty folder"),
    ],
)
def test_refusals(
    sources: dict[str, str],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[SofttraceError],
    message: str,
) -> None:
    (tmp_path / "file").write_text("x")
    change = {
        key: value.format(root=tmp_path) if isinstance(value, str) else value
        for key, value in change.items()
    }
    where: dict[str, Any] = {"models": [sources["before"]], "source": half(sources["text"])}
    where["out"] = str(tmp_path / "out")
    with pytest.raises(error, match=message):
        study(**changed({**where, **OPTIONS}, change))
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    where: dict[str, Any] = {"models": [sources["before"]], "source": half(sources["text"])}
    with pytest.raises(InvalidInputError, match=r"found 2 processes.*--device_map auto"):
        study(**where, out=str(tmp_path / "out"), **OPTIONS)


def test_one_block_is_no_sample(sources: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 8)
    with pytest.raises(DataError, match=r"found 1 block of 16 tokens .* at least 2"):
        study([sources["before"]], half(tmp_path / "a.txt"), str(tmp_path / "out"), **OPTIONS)


def other_tokenizer(kind: str) -> Any:
    tokenizer = byte_tokenizer()
    if kind == "larger":
        tokenizer.add_tokens(["value"])
    else:
        tokenizer.backend_tokenizer.normalizer = _lowercase()
    return tokenizer


def _lowercase() -> Any:
    from tokenizers.normalizers import Replace

    return Replace("value", "other")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("larger", r"other vocabularies \(257 and 258"), ("other text", "text into other tokens")],
)
def test_two_models_have_to_read_alike(
    sources: dict[str, str], tmp_path: Path, kind: str, message: str
) -> None:
    load_model(sources["after"]).save_pretrained(tmp_path / "model")
    other_tokenizer(kind).save_pretrained(tmp_path / "model")
    models = [sources["before"], str(tmp_path / "model")]
    with pytest.raises(InvalidInputError, match=message):
        study(models, half(sources["text"]), str(tmp_path / "out"), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_two_models_have_to_predict_the_same_tokens(
    sources: dict[str, str], tmp_path: Path
) -> None:
    model = load_model(sources["after"])
    model.resize_token_embeddings(264, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(sources["after"]).save_pretrained(tmp_path / "model")
    models = [sources["before"], str(tmp_path / "model")]
    with pytest.raises(
        InvalidInputError, match=r"predicts 257 tokens and .* 264; expected the same"
    ):
        study(models, half(sources["text"]), str(tmp_path / "out"), **OPTIONS)


def test_auto_takes_the_format_of_the_weights_and_compares_no_two(
    sources: dict[str, str], tmp_path: Path
) -> None:
    rounded = str(tmp_path / "model")
    load_model(sources["after"], dtype="bfloat16").save_pretrained(rounded)
    load_tokenizer(sources["after"]).save_pretrained(rounded)
    text, out, auto = half(sources["text"]), str(tmp_path / "out"), RunOptions("cpu", "auto")
    found = study([rounded], text, out, **{**OPTIONS, "run": auto})
    assert found["models"][0]["dtype"] == "bfloat16"
    with pytest.raises(InvalidInputError, match=r"auto took float32 for .*bfloat16 for .*model;"):
        study([sources["before"], rounded], text, str(tmp_path / "two"), **{**OPTIONS, "run": auto})


def test_on_the_command_line(
    sources: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", sources["before"], sources["after"], "--data", sources["text"]]
    words += ["--out", str(tmp_path / "out"), "--held_out_share", "0.5", "--block_size", "16"]
    words += ["--blocks", "3", "--lengths", "[4,8]", "--resamples", "20", "--device", "cpu"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert (tmp_path / "out" / "study.txt").read_text().strip() in output
    assert "before" in output
    assert "change" in output
    assert main(words) == 1
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_blocks_are_those_of_pack(alone: dict[str, Any], sources: dict[str, str]) -> None:
    held_out = split_by_file(read_documents(sources["text"]), 0.5)[1]
    tokenizer = load_tokenizer(sources["before"])
    assert tokenizer.eos_token == END
    assert len(pack(held_out, tokenizer, 16)) > alone["data"]["blocks"] == 5


@pytest.mark.thorough
def test_sensitivity_measures_every_way(
    sources: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Over a ninth of the fine grid, which evaluation/study/test_sensitivity.py has whole."""
    grid = fine_thresholds()[::9]
    monkeypatch.setattr("softtrace.evaluation.study.sensitivity.fine_thresholds", lambda: grid)
    models = [sources["before"], sources["after"]]
    options = {**OPTIONS, "blocks": 2, "resamples": 20}
    out = tmp_path / "out"
    found = study(models, half(sources["text"]), str(out), sensitivity=True, **options)
    assert sorted(path.name for path in out.iterdir()) == ["sensitivity.json", "sensitivity.txt"]
    assert json.loads((out / "sensitivity.json").read_text()) == found
    ways = {tuple(row[key] for key in ("attention", "norm", "stand_in", "thresholds"))
            for row in found["definitions"]}  # fmt: skip
    assert len(ways) == len(found["definitions"]) == 3 * 3 * 2 * 3
    assert set(found["definitions"][0]["holds"]) == {"two_phases", "entropy", "order"}
    table = (out / "sensitivity.txt").read_text()
    assert table in capsys.readouterr().out
    assert f"of {len(ways)} ways" in table


@pytest.fixture(scope="module")
def third(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another state of the same model."""
    path = tmp_path_factory.mktemp("third") / "before"
    model = load_model(sources["before"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    model.save_pretrained(path)
    load_tokenizer(sources["before"]).save_pretrained(path)
    return str(path)


def test_of_any_number_of_models_each_two_are_correlated(
    sources: dict[str, str],
    third: str,
    alone: dict[str, Any],
    both: dict[str, Any],
    undrawn: None,
    tmp_path: Path,
) -> None:
    models = [sources["before"], sources["after"], third]
    found = study(models, half(sources["text"]), str(tmp_path / "out"), **OPTIONS)
    assert [model["label"] for model in found["models"]] == ["before (1)", "after", "before (3)"]
    assert [pair["models"] for pair in found["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    assert found["pairs"][0] == both["pairs"][0]  # the same two models, the same tokens
    assert alone["pairs"] == []
    for key, result in found["results"].items():
        assert result["models"][0] == alone["results"][key]["models"][0], key
        assert result["difference"] is None
    table = (tmp_path / "out" / "study.txt").read_text()
    assert "before (1) and before (3)" in table
    assert "change" not in table


def test_the_papers_figures_are_written_for_all_models(
    sources: dict[str, str], third: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {**OPTIONS, "block_size": 9, "blocks": 3, "lengths": (64,)}  # windows are not used
    models = [sources["before"], sources["after"], third]
    study(models, half(sources["text"]), str(out), paper=True, **options)
    assert sorted(path.name for path in out.iterdir()) == ["paper.json", "paper.png", "paper.txt"]
    found = json.loads((out / "paper.json").read_text())
    assert found["settings"]["attention"] == "recomputed"
    assert (found["inputs"], found["context"]) == (3, 8)
    assert [len(found[name]) for name in ("models", "components", "pairs")] == [3, 3, 3]
    for key, result in found["results"].items():
        shape = tuple(len(found["axes"][axis]) for axis in result["axes"])
        assert [array(each["value"]).shape for each in result["models"]] == [shape] * 3, key
    table = (out / "paper.txt").read_text().replace("\n", " ")
    assert "attention of masked runs recomputed" in table
    assert "Rank correlation of AUC on the same tokens" in table
    assert table.count("Most frequent at 0.1 %") == 3


def test_the_papers_figures_of_two_models_have_a_paired_change(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softtrace.cli.paper.draw_paper", lambda paper: Figure())
    options = {**OPTIONS, "block_size": 9, "blocks": 3, "attention": "recorded"}
    models = [sources["before"], sources["after"]]
    found = study(models, half(sources["text"]), str(tmp_path / "out"), paper=True, **options)
    before, after = (each["value"] for each in found["results"]["auc"]["models"])
    assert found["results"]["auc"]["difference"]["value"] == pytest.approx(after - before)
    assert " change" in (tmp_path / "out" / "paper.txt").read_text()


def test_what_models_write_is_measured_beside_the_text(
    sources: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    models = [sources["before"], sources["after"]]
    options = {**OPTIONS, "block_size": 17, "blocks": 4}
    found = study(models, half(sources["text"]), str(out), generation=True, **options)
    names = ["generation.json", "generation.png", "generation.txt"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "generation.json").read_text()) == found
    assert (found["prompt"], found["new"], found["sequences"]) == (8, 9, 4)
    for key, result in found["results"].items():
        shape = tuple(len(found["axes"][axis]) for axis in result["axes"])
        assert array(result["models"][0]["value"]).shape == shape, key
    losses = array(found["results"]["overall/loss"]["models"][0]["value"])
    less = array(found["results"]["overall/loss_change"]["models"][0]["value"])
    np.testing.assert_allclose(less, losses[1:] - losses[0])
    assert losses[1] == losses.min()  # greedy: of all, the likeliest tokens
    table = (out / "generation.txt").read_text()
    assert "greedy less the text" in table
    assert " change" in table
    small = {**OPTIONS, "block_size": 15}
    with pytest.raises(InvalidInputError, match="block_size: found 15, allowed are integers from"):
        study(models[:1], half(sources["text"]), str(tmp_path / "b"), generation=True, **small)


def test_the_papers_figures_cross_tokenizers(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softtrace.cli.paper.draw_paper", lambda paper: Figure())
    other = tmp_path / "other"
    tiny_model("llama", vocab_size=310).save_pretrained(other)
    byte_level().save_pretrained(other)
    models = [sources["before"], str(other)]
    options = {**OPTIONS, "blocks": 4}
    found = study(models, half(sources["text"]), str(tmp_path / "out"), paper=True, **options)
    own = found["own_tokens"]
    assert own["context_mean"][0] == OPTIONS["block_size"] - 1
    assert 0 < own["context_mean"][1] <= own["context_mean"][0]
    assert found["inputs"] == 4
    assert [model["vocabulary"] for model in found["models"]] == [257, 310]
    assert [pair["models"] for pair in found["pairs"]] == [[0, 1]]
    table = (tmp_path / "out" / "paper.txt").read_text().replace("\n", " ")
    assert "per token of its own" in table
    assert "on the same texts" in table
