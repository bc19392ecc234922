"""Settings, each defined once: a field of a frozen dataclass that is a flag and a key of the --config file as well.

@dataclass(frozen=True, kw_only=True)
class Settings:
    experts: int = flag(2, "number of experts (2)", group="model", type=number(int, 1, MAX_EXPERTS))

parser = build_parser(Settings, prog="train.py")
settings = Settings(**read_config(Settings, parser, path) | given(parser, argv))
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError
from .command_line import FlagError, Parser, did_you_mean


def flag(default: Any, help: str, group: str | None = None, *, secret: bool = False, **options: Any) -> Any:
    """A field of a settings dataclass that is also a flag.

    Args:
        default: The value of the field where nothing sets it. False makes the flag a switch.
        group: In the help, the title of the group of flags that begins with this one.
        secret: Whether its value must not be shown, in an error or in the settings' repr.
        options: Further arguments of `ArgumentParser.add_argument`.
    """
    if default is False:
        options["action"] = "store_true"
    metadata = {"group": group, "secret": secret, "options": {"help": help, **options}}
    return field(default=default, repr=not secret, metadata=metadata)


def build_parser(
    settings: type, names: Sequence[str] | None = None, helps: Mapping[str, str] | None = None, **options: Any
) -> Parser:
    """Return a parser with the flags of a settings dataclass, in the order of its fields.

    What it parses holds the flags that were given, and no defaults.

    Args:
        names: The fields that are flags here; all of them by default.
        helps: Help texts that replace those of the fields.
        options: Arguments of `Parser`.
    """
    parser = Parser(argument_default=argparse.SUPPRESS, **options)
    place: Any = parser
    for each in _flags(settings):
        if each.metadata["group"]:
            place = parser.add_argument_group(each.metadata["group"])
        if names is None or each.name in names:
            help = (helps or {}).get(each.name, each.metadata["options"]["help"])
            place.add_argument(spelled(each.name), **each.metadata["options"] | {"help": help})
    return parser


def spelled(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.rstrip("_").replace("_", "-")  # "from" is no name of a field, "from_" is


def given(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the settings that a command line gives, without defaults. Several values make a tuple.

    Raises:
        FlagError: If a flag is unknown or its value is wrong.
    """
    values = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_config(settings: type, parser: Parser, path: str) -> dict[str, Any]:
    """Return the settings of a YAML or JSON file, checked as the flags are. An empty or false value sets nothing.

    Raises:
        UsageError: If the file cannot be read, or has a setting that is unknown or wrong.
    """
    known = {each.name: each for each in _flags(settings) if each.name != "config"}
    found: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = str(key).replace("-", "_")
        name = f"{name}_" if f"{name}_" in known else name
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"--config {path}: there is no setting {key!r}{hint}; see {parser.prog} --help")
        if name in found:
            raise UsageError(f"--config {path}: {name} is there twice, with - and with _; leave one out")
        if value is None or value is False:
            continue
        options = known[name].metadata["options"]
        takes_list = options.get("action") == "append" or options.get("nargs") == "+"
        if not all(_is_plain(each) for each in (value if isinstance(value, list) and takes_list else [value])):
            got = type(value).__name__ if known[name].metadata["secret"] else repr(value)
            raise UsageError(f"--config {path}: {key}: expected a value, got {got}")
        try:
            found[name] = given(parser, _as_words(name, options, value))[name]
        except FlagError as error:
            raise UsageError(f"--config {path}: {error.message}") from None
    return found


def _flags(settings: type) -> list[Field]:
    return [each for each in fields(settings) if "options" in each.metadata]


def _is_plain(value: object) -> bool:
    return not isinstance(value, (dict, list, set))


def _as_words(name: str, options: dict[str, Any], value: object) -> list[str]:
    """Return the words that give a setting of a file on the command line."""
    if value is True and (options.get("action") == "store_true" or options.get("nargs") == "?"):
        return [spelled(name)]
    values = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if options.get("nargs") == "+":
        return [spelled(name), *values]
    return [f"{spelled(name)}={each}" for each in values]


def _load(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text in UTF-8"
        raise UsageError(f"--config {path}: cannot be read ({reason})") from None
    kind = "JSON" if path.endswith(".json") else "YAML"
    load: Callable[[str], Any] = json.loads if kind == "JSON" else yaml.safe_load
    try:
        settings = load(text)
    except RecursionError:
        raise UsageError(f"--config {path}: is nested too deeply; expected one value for each setting") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: is not valid {kind}: {_problem(error)}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path}: expected settings by name, found {type(settings).__name__}")
    return settings


def _problem(error: Exception) -> str:
    """Say what a parser found and where, without the line itself, which may hold a token."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split()) if isinstance(error, json.JSONDecodeError) else type(error).__name__
    return f"{getattr(error, 'problem', None)} (line {mark.line + 1}, column {mark.column + 1})"
