"""What all programs have in common, and each of them: help, JSON, loudness, exit codes, colours."""

import importlib
import json
import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from swat_jax import command_line
from swat_jax.command_line import Answer, Parser
from swat_jax.errors import RunError, UsageError, did_you_mean
from tests.runs import ROOT

PROGRAMS = (
    *(
        "main",
        "evaluate",
        "predict",
        "export",
        "flops",
        "info",
        "report",
        "tune",
        "data.prepare.__main__",
    ),
)


def parser_of(program, monkeypatch):
    """The parser that a program makes, without running it."""
    found = []
    monkeypatch.setattr(command_line, "run", lambda parser, *_, **__: found.append(parser) or 0)
    assert importlib.import_module(f"swat_jax.{program}").main([]) == 0
    return found[0]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_a_screen_and_shows_three_examples(program, capsys):
    main = importlib.import_module(f"swat_jax.{program}").main
    for flag in ("--help", "-h"):
        assert main(["nonsense", "--nonsense", flag]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    lines = output[: len(output) // 2].splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    examples = output[: len(output) // 2].split("Examples:\n")[1].split("\n\n")[0]
    name = program.removesuffix(".__main__")
    assert len(re.findall(rf"python -m swat_jax\.{name}\b", examples)) == 3
    assert "Exit code: 0 done, 1 failed, 2 wrong" in lines[-1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_names_every_flag_and_no_other(program, monkeypatch):
    parser = parser_of(program, monkeypatch)
    text = parser.format_help()
    flags = {action.option_strings[-1] for action in parser._actions if action.option_strings}
    flags -= {"--help"}
    named = {name for name in re.findall(r"(?<!\S)--[a-z_-]+", text) if name != "--help"}
    assert named == flags
    for action in parser._actions:
        if not action.option_strings:
            assert re.search(rf"^  {action.metavar}\b", text, re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistyped_flag_is_one_line_and_exit_code_2(program, capsys):
    assert importlib.import_module(f"swat_jax.{program}").main(["--jsn"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors == "error: unknown flag --jsn; did you mean --json?\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_examples_are_commands_that_parse(program, monkeypatch):
    parser = parser_of(program, monkeypatch)
    text = parser.format_help().split("Examples:\n")[1].split("\n\n")[0].replace("\\\n", " ")
    monkeypatch.chdir(ROOT)
    for line in text.splitlines():
        arguments = line.partition(" -m ")[2].split()[1:]
        assert parser.parse_args(arguments) is not None


@pytest.mark.parametrize(
    ("given", "known", "told"),
    [
        ("confg", ["config", "data"], "; did you mean config?"),
        ("Batch-Size", ["batch_size"], "; did you mean batch_size?"),
        ("u9O", ["u90", "u95", "u80"], "; did you mean u90?"),
        ("chanel70", {"channel70": "A", "channel60": "B"}, "; did you mean A or B?"),
        ("zzz", ["config"], ""),
        ("", ["config"], ""),
        ("config", [], ""),
    ],
)
def test_did_you_mean(given, known, told):
    assert did_you_mean(given, known) == told


def test_no_more_than_three_are_meant():
    assert did_you_mean("u9", [f"u9{digit}" for digit in range(10)]).count(" or ") == 2


# Running.


def run(work, *flags, **options):
    parser = Parser("A program.")
    parser.add_argument("--name")
    return command_line.run(parser, work, list(flags), **options)


def talking(_):
    """Prints and logs all that a library might."""
    print("printed")
    print("progress", file=sys.stderr)
    logging.getLogger("absl").info("saved")
    logging.getLogger("absl").warning("slow")
    return Answer({"accuracy": 0.5}, "accuracy 50 %", 0)


def test_an_answer_for_people(capsys):
    assert run(talking) == 0
    output, errors = capsys.readouterr()
    assert output == "printed\naccuracy 50 %\n"
    assert errors.startswith("progress\n")
    assert "saved" not in errors


def test_json_is_alone_on_standard_output(capsys):
    assert run(talking, "--json") == 0
    output, errors = capsys.readouterr()
    assert json.loads(output) == {"accuracy": 0.5}
    assert errors.startswith("printed\nprogress\n")


def test_quiet(capsys):
    assert run(talking, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run(talking, "--quiet", "--json") == 0
    output, errors = capsys.readouterr()
    assert (json.loads(output), errors) == ({"accuracy": 0.5}, "")
    assert logging.root.manager.disable == 0

    def failing(options):
        talking(options)
        raise RunError("the disk is full")

    assert run(failing, "--quiet") == 1
    assert capsys.readouterr() == ("", "error: the disk is full\n")


def test_verbose(capsys):
    levels = [logging.getLogger(name).level for name in (None, "absl")]
    handlers = list(logging.root.handlers)

    def failing(options):
        talking(options)
        raise UsageError("no such thing")

    assert run(failing, "--verbose") == 2
    errors = capsys.readouterr().err
    assert "absl: saved\n" in errors
    assert "Traceback" in errors
    assert errors.endswith("error: no such thing\n")
    assert [logging.getLogger(name).level for name in (None, "absl")] == levels
    assert logging.root.handlers == handlers


def test_quiet_and_verbose(capsys):
    assert run(talking, "--quiet", "--verbose") == 2
    assert capsys.readouterr().err.endswith("error: --quiet and --verbose: give one of them\n")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (RunError("two\nlines"), 1, "error: two; lines\n"),
        (UsageError("wrong"), 2, "error: wrong\n"),
        (KeyboardInterrupt(), 130, "go on like this\n"),
    ],
)
def test_exit_codes_of_errors(error, code, told, capsys):
    def failing(_):
        raise error

    assert run(failing, stopped="go on like this") == code
    assert capsys.readouterr() == ("", told)
    assert run(failing, "--json", stopped="go on like this") == code
    output, errors = capsys.readouterr()
    line = told.removeprefix("error: ").removesuffix("\n")
    assert (json.loads(output), errors) == ({"error": line, "exit_code": code}, told)


def test_json_of_arguments_that_are_wrong(capsys):
    assert run(talking, "--jsn", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found == {"error": "unknown flag --jsn; did you mean --json?", "exit_code": 2}


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError):
        run(lambda _: 1 / 0)


def test_exit_code_of_the_answer_and_of_none(capsys):
    assert run(lambda _: Answer([], "", 1)) == 1
    assert run(lambda _: Answer([], "it differs", 1), "--quiet") == 1
    assert capsys.readouterr().out == "it differs\n"
    assert run(lambda _: None, "--json") == 0
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_read_enough():
    code = """
from swat_jax.command_line import Answer, Parser, run
raise SystemExit(run(Parser(""), lambda _: Answer(["x"] * 100_000, ""), ["--json"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"[\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_what_json_has_no_word_for(capsys):
    assert run(lambda _: Answer({"loss": float("nan"), "size": (1,)}, ""), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"loss": None, "size": [1]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--number=x"], "--number: invalid int value: 'x'"),
        (["--kind=c", "F"], "--kind: invalid choice: 'c'"),
        (["--num=3"], "unknown flag --num; did you mean --number?"),
        (["--number"], "--number: expected one argument"),
        ([], "FILE is missing; --help shows examples"),
        (["--zzz", "F"], "unknown flag --zzz; --help names those there are"),
        (["F", "G"], "unrecognized arguments: G"),
    ],
)
def test_wrong_arguments(arguments, told):
    parser = Parser("A program.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--number", type=int)
    parser.add_argument("--kind", choices=("a", "b"))
    with pytest.raises(UsageError) as caught:
        parser.parse_args(arguments)
    assert str(caught.value).startswith(told)


# Colours.

SNIPPET = """
import sys
from swat_jax.command_line import colored
print(colored("text", "green", sys.stdout))
"""


def printed_on_a_terminal(**variables):
    """What a process prints whose standard output is a terminal."""
    ours, theirs = pty.openpty()
    environment = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    subprocess.run(
        [sys.executable, "-c", SNIPPET],
        stdout=theirs,
        env={**environment, "TERM": "xterm", **variables},
        cwd=ROOT,
        check=True,
    )
    os.close(theirs)
    text = os.read(ours, 1000).decode().strip()
    os.close(ours)
    return text


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colors_on_a_terminal(variables, shown):
    expected = "\x1b[32mtext\x1b[0m" if shown else "text"
    assert printed_on_a_terminal(**variables) == expected


def test_colors_elsewhere(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)

    def failing(_):
        raise UsageError("wrong")

    run(failing)
    assert capsys.readouterr().err == "error: wrong\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(failing)
    assert capsys.readouterr().err == "\x1b[31merror:\x1b[0m wrong\n"
    monkeypatch.setenv("NO_COLOR", "1")
    run(failing)
    assert capsys.readouterr().err == "error: wrong\n"
