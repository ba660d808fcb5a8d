"""The ``softtrace`` command: fit, evaluate, study, compare, decode-bench, card, inspect."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from softtrace.errors import SofttraceError
from softtrace.files import NO_ROOM
from softtrace.libraries import missing

#: errors of what cannot be a path, such as a text that was given in place of its file
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)

#: commands whose interrupted runs can be resumed
_RESUMED = ("fit", "evaluate")

#: options that name model and text, of other commands and of fit: easily taken for each other
_OF_FIT = {"--model": "--model.path", "--data": "--data.path"}

_USAGE = """usage: softtrace [-h] [--version] COMMAND ...

Fine-tune language models so that easy tokens need a sparse, early part of the
computation graph, and measure it.

  fit           fine-tune a model directory on text, with the density penalty
  evaluate      measure how much of its graph a model needs; write a report
  study         answer the paper's questions of one model or more
  compare       put what evaluate measured of several models side by side
  decode-bench  time decoding with early exits against plain decoding
  card          put what evaluate measured into a model's README.md
  inspect       show how a model is taken apart, and what was verified

softtrace COMMAND --help shows the options of each."""


class _WrongOption(Exception):
    """An option that has another name in this command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        0, 1 for bad input or what is missing here (named on stderr) or output that nothing reads
        any more, 2 for arguments that do not parse, 130 if interrupted.

    Raises:
        SystemExit: 2 with a command's own arguments, 143 if a fit was terminated (SIGTERM).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"softtrace {version('softtrace')}")
        return 0
    command = _COMMANDS.get(words[0])
    if command is None:
        allowed = ", ".join(_COMMANDS)
        print(f"softtrace: found command {words[0]!r}, allowed are {allowed}", file=sys.stderr)
        return 2

    def say(message: object) -> None:
        print(f"softtrace {words[0]}: {message}", file=sys.stderr)

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("softtrace: %(message)s"))
    log = logging.getLogger("softtrace")
    log.addHandler(handler)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes one says what it does
    usual = log.level
    log.setLevel(logging.INFO if first else logging.WARNING)
    try:
        command(words[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `softtrace compare ... | head`: Python would say so again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _WrongOption as error:
        say(error)
        return 2
    except SofttraceError as error:
        say(error)
        return 1
    except (ImportError, NotImplementedError) as error:
        if (said := missing(error)) is None:
            raise
        say(said)
        return 1
    except OSError as error:  # raised by whatever writes: plots, results, the terminal's output
        if error.errno in _NO_PATH:
            say(
                f"{error.filename}: cannot be a path ({error.strerror}); expected that of a file "
                "or a folder"
            )
            return 1
        if error.errno not in NO_ROOM:
            raise
        say(
            f"could not write ({error.strerror}); what was written before is untouched. Make room, "
            "then run it again"
        )
        return 1
    except KeyboardInterrupt as stop:
        resumed = "the same with --resume true resumes it" if words[0] in _RESUMED else ""
        more = str(stop) or resumed  # Python's own says nothing
        say(f"interrupted{more and '; '}{more}")
        return 130
    finally:
        log.removeHandler(handler)
        log.setLevel(usual)
    return 0


# Each command imports what it needs when it runs: `softtrace --help` stays quick.
def _fit(args: list[str]) -> None:
    _refuse_paths(args)
    from softtrace.cli.fit import fit
    from softtrace.loss import draws

    out = fit(args)
    if draws.rank() == 0:  # the first process writes; others are done before
        places = {"the model": "model*.safetensors", "fit.yaml": "fit.yaml", "logs": "logs"}
        found = [name for name, place in places.items() if any(out.glob(place))]
        print(f"\nwritten to {out}/: {', '.join(found)}")


def _refuse_paths(args: list[str]) -> None:
    """Refuse a path where fit takes a group of options, from a file or written out as an object.

    Raises:
        _WrongOption: which option takes the path.
    """
    for place, word in enumerate(args):
        name, given, value = word.partition("=")
        if not given:
            value = "".join(args[place + 1 : place + 2])
        options = value.endswith((".yaml", ".yml", ".json")) or value.startswith("{")
        if name in _OF_FIT and not options:
            raise _WrongOption(
                f"found {name} {value}, which is no YAML file of options; give the "
                f"{name.removeprefix('--')} by {_OF_FIT[name]} {value}"
            )


def _evaluate(args: list[str]) -> None:
    from softtrace.cli.evaluate import evaluate

    description = (
        "Measure how much of its graph a model needs on a text, and write density.json, plots and "
        "report.html to OUT."
    )
    _call(evaluate, "evaluate", description, args)


def _decode_bench(args: list[str]) -> None:
    from softtrace.cli.decode_bench import decode_bench

    description = (
        "Measure what a model's early exits are worth in decoding: acceptance and speed of "
        "self-speculation."
    )
    _call(decode_bench, "decode-bench", description, args)


def _card(args: list[str]) -> None:
    from softtrace.cli.card import card

    description = (
        "Put what evaluate measured into a section of a model's README.md; the rest of it stays."
    )
    _call(card, "card", description, args)


def _call(
    function: Callable[..., Any],
    name: str,
    description: str,
    args: list[str],
    several: Mapping[str, str] | None = None,
) -> None:
    """Run a function whose parameters are the command's options.

    Where a parameter is a dataclass, its fields are the options.

    Args:
        function: what the command runs.
        name: of the command.
        description: what its help begins with.
        args: its words.
        several: parameters that take one or more words without an option's name, and their help.

    Raises:
        _WrongOption: model or text has the option that it has in fit.
    """
    parser = ArgumentParser(prog=f"softtrace {name}", description=description)
    parser.add_argument("-c", "--config", action="config", help="Read options from a YAML file.")
    groups: dict[str, Any] = {}
    kinds, parameters = get_type_hints(function), list(signature(function).parameters)
    for parameter in parameters:  # one by one: help keeps their order
        if several and parameter in several:
            parser.add_argument(parameter, nargs="+", type=str, help=several[parameter])
        elif is_dataclass(kinds[parameter]):
            groups[parameter] = kinds[parameter]
            parser.add_class_arguments(groups[parameter], as_group=False)
        else:
            others: set[str | int] = {each for each in parameters if each != parameter}
            parser.add_function_arguments(function, as_group=False, skip=others)
    given = {word.partition("=")[0] for word in args}
    for own, of_fit in _OF_FIT.items():
        if of_fit in given and own in parser._option_string_actions:
            raise _WrongOption(
                f"found {of_fit}, allowed is {own}; {of_fit} is an option of softtrace fit"
            )
    options = parser.parse_args(args).as_dict()
    options.pop("config", None)
    for parameter, kind in groups.items():
        options[parameter] = kind(**{each.name: options.pop(each.name) for each in fields(kind)})
    function(**options)


def _study(args: list[str]) -> None:
    from softtrace.cli.study import study

    description = (
        "Ask the paper's questions of models: two phases, uncertainty, shallow statistics, length. "
        "The answers go to OUT, with intervals."
    )
    models = (
        "Model directories (safetensors) or hub names of one tokenizer; two are taken for before "
        "and after training."
    )
    _call(study, "study", description, args, {"models": models})


def _compare(args: list[str]) -> None:
    from softtrace.cli.compare import compare

    description = "Compare runs measured on the same text; the others against the first."
    paths = "2 to 8 files density.json, or the folders they are in."
    _call(compare, "compare", description, args, {"paths": paths})


def _inspect(args: list[str]) -> None:
    import json

    from softtrace.cli.inspect import inspect, report

    parser = ArgumentParser(
        prog="softtrace inspect",
        description="Show how a model is taken apart into the edges of its graph, and prove it.",
    )
    parser.add_argument("model", type=str, help="Model directory (safetensors) or hub name.")
    parser.add_argument(
        "--length",
        type=int | None,
        help="Number of tokens of the sequence whose edges are counted, for its last token; by "
        "default 128, or as many positions as the model learned.",
    )
    parser.add_argument(
        "--dtype",
        type=str,
        default="float32",
        help="Number format of the weights: float32, bfloat16, float16, or auto for the one that "
        "they were saved in.",
    )
    parser.add_argument(
        "--json", type=bool, default=False, help="Print JSON instead of a text for people."
    )
    options = parser.parse_args(args)
    found = inspect(options.model, options.length, options.dtype)
    print(json.dumps(found, indent=2) if options.json else report(found))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "study": _study,
    "compare": _compare,
    "decode-bench": _decode_bench,
    "card": _card,
    "inspect": _inspect,
}
