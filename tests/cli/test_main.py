"""The ``softtrace`` command as a shell sees it: exit status, stdout, stderr."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softtrace.cli import main
from softtrace.cli.main import _COMMANDS
from softtrace.files import LOCK, claimed
from tests.support.corpus import write_model, write_tree
from tests.support.densities import synthetic_density, write_run
from tests.support.processes import as_rank


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {command} " in output for command in ("fit", "evaluate", "study", "compare"))
    assert main([]) == 2


@pytest.mark.parametrize("command", ["fit", "evaluate", "study", "compare", "decode-bench", "card"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert f"usage: softtrace {command}" in output
    assert "--out" in output or command == "card"
    assert "``" not in output
    assert ":`" not in output


def test_help_of_the_penalty_shows_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--penalty.family {both,sparse,shallow}" in text
    assert "(type: Optional[Literal['straight', 'soft']], default: null)" in text
    assert "--penalty.strength STRENGTH Weight of the term, >= 0" in text


def test_unknown_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert (
        "found command 'train', allowed are fit, evaluate, study, compare"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as stop:
        main(["compare", "a", "b", "--out", "c", "--nonsense", "1"])
    assert stop.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_other_failures_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", synthetic_density())

    def failing(number: int) -> None:
        def write(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("softtrace.cli.compare.write_json", write)

    arguments = ["compare", str(run), str(run), "--out", str(tmp_path / "out")]
    failing(errno.ENOSPC)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("softtrace compare: could not write (No space left on device)")
    assert error.count("\n") == 1
    failing(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        main(arguments)


def test_a_text_where_a_path_belongs_is_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "some text " * 30
    assert main(["compare", text, text, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"softtrace compare: {text}")
    assert "cannot be a path (File name too long)" in error
    assert error.count("\n") == 1


def test_bad_input_is_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    assert main(["compare", str(missing), str(missing), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"softtrace compare: {missing}: found no such file")
    assert error.count("\n") == 1


@pytest.mark.thorough
def test_fit_evaluate_compare_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = write_model(tmp_path / "base"), write_tree(tmp_path / "text")
    common = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--data.block_size=16"]
    common += ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    for name, strength in (("plain", 0), ("penalty", 1)):
        out = tmp_path / name
        words = ["fit", "--model.path", model, "--data.path", text, "--out", out / "model"]
        assert main([*map(str, words), *common, f"--penalty.strength={strength}"]) == 0
        words = ["evaluate", "--model", out / "model", "--data", text, "--out", out / "density"]
        words += ["--block_size", 16, "--blocks", 4, "--extra_blocks", 2, "--device", "cpu"]
        assert main([str(word) for word in words]) == 0
    words = ["compare", tmp_path / "plain/density", tmp_path / "penalty/density/density.json"]
    capsys.readouterr()
    assert main([*map(str, words), "--out", str(tmp_path / "compare")]) == 0
    table = capsys.readouterr().out
    assert "area under distortion" in table
    compared = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert len(compared["runs"]) == 2
    assert len(list((tmp_path / "compare").glob("*.png"))) == 4


def test_runs_on_other_text_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = synthetic_density("other")
    other["data"]["sha256"] = "f" * 64
    runs = [write_run(tmp_path / "a", synthetic_density()), write_run(tmp_path / "b", other)]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 1
    assert "data sha256) differs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["evaluate", "study", "decode-bench", "compare", "card"])
def test_no_command_writes_to_a_folder_that_another_run_writes_to(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "out", write_tree(tmp_path / "text")
    model, run = write_model(tmp_path / "model"), write_run(tmp_path / "run", synthetic_density())
    words = {
        "evaluate": ["--model", model, "--data", text, "--out", out, "--overwrite", "true"],
        "study": [model, "--data", text, "--out", out, "--overwrite", "true"],
        "decode-bench": ["--model", model, "--data", text, "--out", out, "--overwrite", "true"],
        "compare": [run, run, "--out", out, "--overwrite", "true"],
        "card": ["--model", out, "--density", run],
    }[command]
    before = {LOCK}
    if command == "card":  # for which it has to be a model's
        out.mkdir()
        (out / "config.json").touch()
        before.add("config.json")
    with claimed(out):
        assert main([command, *map(str, words)]) == 1
        assert "found another run that is writing to it" in capsys.readouterr().err
        assert {path.name for path in out.iterdir()} == before


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_process_that_wrote_says_so(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others are done while the first still writes, and may fail to."""
    monkeypatch.setattr("softtrace.cli.fit.fit", lambda _: Path("out"))
    with as_rank(rank):
        assert main(["fit"]) == 0
    assert ("written to out/" in capsys.readouterr().out) == (rank == 0)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate", "interrupted; the same with --resume true resumes it\n"),
        ("fit", "interrupted; the same with --resume true resumes it\n"),
        ("study", "interrupted\n"),
    ],
)
def test_an_interrupted_command_says_whether_it_can_be_resumed(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(_COMMANDS, command, interrupted)
    assert main([command]) == 130
    assert capsys.readouterr().err == f"softtrace {command}: {said}"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_of_several_processes_says_what_it_does(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: list[str]) -> None:
        logging.getLogger("softtrace.some").info("reading")
        logging.getLogger("softtrace.some").warning("damaged")

    monkeypatch.setitem(_COMMANDS, "inspect", command)
    monkeypatch.setenv("LOCAL_RANK", rank)
    usual = logging.getLogger("softtrace").level
    assert main(["inspect"]) == 0
    said = "softtrace: reading\n" if rank == "0" else ""
    assert capsys.readouterr().err == said + "softtrace: damaged\n"
    assert logging.getLogger("softtrace").level == usual


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["fit", "--model", "folder", "--out", "out"],
            "fit: found --model folder, which is no YAML file of options; give the model by "
            "--model.path folder",
        ),
        (
            ["fit", "--data=text"],
            "fit: found --data text, which is no YAML file of options; give the data by "
            "--data.path text",
        ),
        (
            ["evaluate", "--model.path", "folder"],
            "evaluate: found --model.path, allowed is --model; --model.path is an option of "
            "softtrace fit",
        ),
        (
            ["study", "a", "b", "--data.path=text"],
            "study: found --data.path, allowed is --data; --data.path is an option of softtrace "
            "fit",
        ),
    ],
)
def test_the_option_of_another_command_is_refused_with_the_right_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """jsonargparse said that a config could not be loaded, or showed one of its classes."""
    assert main(words) == 2
    assert capsys.readouterr().err == f"softtrace {said}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--model", "model.yaml"],
        ["fit", "--data", '{"block_size": 8}'],
        ["fit", "--model.path", "folder"],
        ["evaluate", "--model", "folder", "--data", "text"],
    ],
)
def test_right_options_reach_their_command(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setitem(_COMMANDS, words[0], given.extend)
    assert main(words) == 0
    assert given == words[1:]


def test_output_that_nothing_reads_any_more_is_no_traceback(tmp_path: Path) -> None:
    """As of ``softtrace compare ... | head -1``; what the command writes to files is there."""
    runs = [write_run(tmp_path / name, synthetic_density(name)) for name in ("old", "new")]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "softtrace.cli", "compare", *map(str, runs), "--out", "c"]
    found = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (found.returncode, found.stderr) == (1, "")
    assert (tmp_path / "c" / "report.html").exists()
