"""The command's help as a newcomer meets it."""

from __future__ import annotations

import argparse
import re

import pytest

from softtrace.cli import main
from softtrace.cli.main import _COMMANDS, _USAGE
from tests.docs.pages import parsed

#: what each command has to be given, so that it parses
NEEDED = {
    "fit": ["--model.path", "m", "--data.path", "t", "--out", "o"],
    "evaluate": ["--model", "m", "--data", "t", "--out", "o"],
    "study": ["m", "--data", "t", "--out", "o"],
    "compare": ["a", "b", "--out", "o"],
    "decode-bench": ["--model", "m", "--data", "t", "--out", "o"],
    "card": ["--model", "m", "--density", "d"],
    "inspect": ["m"],
}


def test_the_overview_names_every_command_and_what_it_is_for() -> None:
    assert set(NEEDED) == set(_COMMANDS)
    for command in _COMMANDS:
        [line] = [line for line in _USAGE.splitlines() if line.split()[:1] == [command]]
        assert len(line.split()) > 5
    assert max(map(len, _USAGE.splitlines())) <= 80


@pytest.mark.parametrize("command", NEEDED)
def test_every_option_says_what_it_is(command: str) -> None:
    parser = parsed([command, *NEEDED[command]]).parser
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert len(shown) > 3
    for action in shown:
        assert action.help, action.option_strings or action.dest
        assert action.help.strip() != "", action.option_strings
    assert parser.description


#: options of fit that Lightning, jsonargparse and argparse explain
OTHERS = ("trainer", "help", "config", "print_config", "seed_everything", "model.lora.help")
OTHERS += ("model", "data", "penalty")  # a configuration file for all of a group


@pytest.mark.parametrize("command", NEEDED)
def test_what_an_option_is_is_said_in_sentences(command: str) -> None:
    for action in parsed([command, *NEEDED[command]]).parser._actions:
        text = str(action.help)
        own = action.dest not in OTHERS and not action.dest.startswith("trainer.")
        if own and text != argparse.SUPPRESS:
            assert text[0].isupper() or text[0].isdigit(), text
            assert text.endswith("."), text


def test_options_of_several_commands_are_flat_and_in_the_order_of_the_function() -> None:
    """Where a text comes from and how a command runs are dataclasses; nobody types their names."""
    text = ["data", "held_out_share", "salt", "suffixes", "exclude", "special_tokens"]
    run = ["device", "dtype", "overwrite"]
    shares = {"evaluate": 0.0, "study": 0.05, "decode-bench": 0.0}
    for command, share in shares.items():
        found = parsed([command, *NEEDED[command]])
        names = list(found.options.as_dict())
        at, after = names.index("data"), names.index("device")
        assert names[at : at + 7] == [*text, "out"]
        assert names[after : after + 3] == run
        assert found.options.held_out_share == share
        assert (found.options.device, found.options.dtype) == ("auto", "float32")
        assert found.options.overwrite is False


@pytest.mark.parametrize("command", NEEDED)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 8
    # what cannot be broken may stand out: titles, and names of options and of Lightning's classes
    long = [line for line in lines if len(line) > columns and len(line.split()) > 2]
    assert [line for line in long if not (line[0] != " " and line.endswith(":"))] == []
    assert max(map(len, long), default=0) <= 100


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints before it ends, all being well."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_of_fit_begins_with_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(["fit", "--help"], capsys)
    first = text.partition("\n\n")[0]
    assert first == "usage: softtrace fit --model.path MODEL --data.path TEXT --out OUT [options]"
    names = ("--out", "--model.path", "--data.path", "--penalty.strength", "--trainer.devices")
    places = [text.index(f"\n  {name} ") for name in names]
    assert places == sorted(places)
    assert "optimiser steps between measurements of density" in " ".join(text.split())


def test_less_common_options_of_lightning_are_shown_when_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short, whole = (shown(["fit", option], capsys) for option in ("-h", "--help_all"))
    options = [set(re.findall(r"^  (?:-\w.*, )?(--[\w.]+)", each, re.M)) for each in (short, whole)]
    assert options[0] < options[1]
    assert {name.partition(".")[0] for name in options[1] - options[0]} == {"--trainer"}
    assert {"--help_all", "--trainer.max_steps", "--penalty.exit_tokens"} <= options[0]
    assert len(options[1] - options[0]) > 20
    assert "softtrace fit --help_all" in short.splitlines()[-1]
    found = parsed(["fit", *NEEDED["fit"], "--trainer.limit_val_batches", "2"]).options
    assert found.trainer.limit_val_batches == 2  # not shown, but taken
    assert "help_all" not in found
