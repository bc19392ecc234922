"""`dylora-moe run`: another Python program, for which the Auto classes of Transformers know the mixtures."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from ...errors import DyLoRAMoEError, UsageError
from ...system.command_line import FAILED, PASSED, did_you_mean, text
from ..wording import needed

HARNESS = "lm_eval"  # whose further model `dylora_moe` is in harness.py


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [-h] PROGRAM [ARGUMENT ...]"
    parser.description = (
        "Runs a program by the name of its command, or of its module as `python -m` does, with its own arguments.\n"
        "Where it loads a model by AutoModelForCausalLM, pipeline and the like, it can load a checkpoint.\n"
        "A program that it starts in turn cannot, unless that is `python -m dylora_moe run` again, as in\n"
        "    accelerate launch -m dylora_moe run lm_eval ..."
    )
    parser.add_argument("program", metavar="PROGRAM", type=text, help="as in lm_eval, transformers, json.tool")


def run(args: Namespace) -> int:
    """Run the program, to which all further words go as they are. Its exit code is the command's."""
    program = _command(args.program) or _module(args.program)
    if args.program.replace("-", "_") == HARNESS:
        _register()
    sys.argv = [args.program, *args.words]
    try:
        with needed():
            sys.exit(program())
    except DyLoRAMoEError:
        raise
    except Exception:  # it is the program's own, and not for us to explain
        traceback.print_exc()
        return FAILED


def _command(name: str) -> Callable[[], Any] | None:
    """Return the function of an installed command; None if there is no such command."""
    for command in entry_points(group="console_scripts", name=name):
        return command.load()
    return None


def _module(name: str) -> Callable[[], Any]:
    """Return a function that runs a module as `python -m` does. Raises UsageError if there is no such module."""
    sys.path.insert(0, os.getcwd())
    if all(part.isidentifier() for part in name.split(".")) and not name.endswith(".py"):
        try:
            spec = find_spec(name)
            if spec is not None and spec.submodule_search_locations is not None:
                spec = find_spec(f"{name}.__main__")
        except ModuleNotFoundError:  # of the package that it would be in
            spec = None
        if spec is not None and spec.has_location:
            return partial(_run_module, name)
    commands = {command.name for command in entry_points(group="console_scripts")}
    raise UsageError(
        f"there is no program {name}{did_you_mean(name, commands)}: expected a command that is installed in "
        f"{sys.prefix}, or a module that `python -m` runs"
    )


def _run_module(name: str) -> int:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return PASSED


def _register() -> None:
    from lm_eval.api.registry import model_registry

    model_registry.register("dylora_moe", target="dylora_moe.cli.harness:MixtureLM")
