"""Settings from one definition: the field, the flag and the key of a file."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from dylora_moe.errors import UsageError
from dylora_moe.system.command_line import number
from dylora_moe.system.settings import build_parser, flag, given, read_config


@dataclass(frozen=True, kw_only=True)
class Settings:
    lora_r: int = flag(16, "rank (16)", "model", type=number(int, 1, 64))
    names: tuple[str, ...] = flag((), "repeatable", "data", action="append", metavar="NAME")
    targets: tuple[str, ...] | None = flag(None, "of layers", nargs="+")
    resume: str | None = flag(None, "or DIR", nargs="?", const="auto", metavar="DIR")
    demo: bool = flag(False, "a switch")
    config: str | None = flag(None, "a file")


@pytest.fixture
def parser():
    return build_parser(Settings, prog="x")


def test_what_is_given_and_what_is_not(parser):
    assert given(parser, []) == {}
    assert Settings() == Settings(lora_r=16, names=(), targets=None, resume=None, demo=False, config=None)
    words = "--lora_r 2 --names a --names b --targets q v --resume --demo"
    assert given(parser, words.split()) == {
        "lora_r": 2, "names": ("a", "b"), "targets": ("q", "v"), "resume": "auto", "demo": True
    }  # fmt: skip


def test_the_help_has_every_flag_in_order_below_its_group(parser):
    lines = [line.split() for line in parser.format_help().splitlines() if line]
    at = [next(i for i, words in enumerate(lines) if words[0] == word) for word in (
        "model:", "--lora-r", "data:", "--names", "--targets", "--resume", "--demo", "--config"
    )]  # fmt: skip
    assert at == sorted(at)


def test_some_flags_with_another_help():
    parser = build_parser(Settings, ["demo"], {"demo": "another help"}, prog="x")
    assert "another help" in parser.format_help() and "--lora-r" not in parser.format_help()
    with pytest.raises(UsageError, match="x: error: unrecognized arguments: --lora-r; see x --help"):
        given(parser, ["--lora-r", "2"])


def test_a_file_gives_what_the_flags_would(parser, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"lora-r": 2, "names": ["a", "-b"], "targets": "q", "resume": True, "demo": False}))
    assert read_config(Settings, parser, str(path)) == {
        "lora_r": 2, "names": ("a", "-b"), "targets": ("q",), "resume": "auto"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lora_r": 65}, "argument --lora-r: expected a whole number from 1 to 64, got 65"),
        ({"lora_r": True}, "argument --lora-r: expected a whole number from 1 to 64, got 'True'"),
        ({"demo": 5}, "argument --demo: ignored explicit argument '5'"),
        ({"demo": [True]}, "demo: expected a value, got [True]"),
        ({"config": "other"}, "there is no setting 'config'; see x --help"),
        ({"lora_r": 1, "lora-r": 1}, "lora_r is there twice, with - and with _; leave one out"),
    ],
)
def test_a_wrong_file(parser, tmp_path, settings, text):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UsageError) as error:
        read_config(Settings, parser, str(path))
    assert str(error.value) == f"--config {path}: {text}"
