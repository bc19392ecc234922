"""Use a mixture from the shell, and see what is in a checkpoint or a run folder.

dylora-moe generate runs/first/checkpoint-100
dylora-moe generate runs/first/checkpoint-100 --prompt "How do I sort a list?" --show-routing
dylora-moe route runs/first/checkpoint-100 "How do I sort a list?"
dylora-moe eval runs/first/checkpoint-100 --data sql.jsonl
dylora-moe inspect runs/first
dylora-moe verify runs/first/checkpoint-100 --json result.json
dylora-moe list runs/first
dylora-moe report runs/first
dylora-moe experts list runs/first/checkpoint-100
dylora-moe export runs/first/checkpoint-100 served --to vllm
dylora-moe gateway runs/first/checkpoint-100 --upstream http://127.0.0.1:8000
dylora-moe run lm_eval --model dylora_moe --model_args pretrained=runs/first/checkpoint-100 --tasks arc_easy
dylora-moe push runs/first you/first
dylora-moe pull you/first
dylora-moe convert OLD NEW
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..system import command_line

# Command: what --help says of it. Its module is the file of its name in commands/, with `add_flags` and `run`.
COMMANDS = {
    "generate": "answer a prompt, the prompts of standard input, or a chat in the terminal",
    "route": "which expert a text goes to, how sure that is, and the tokens that decide it",
    "eval": "loss of each data set: routed, by each expert alone, and of the base model",
    "inspect": "what is in a checkpoint or a run: sizes, experts, skills, and what the last run said",
    "verify": "exit code 0: complete and sound, 1: problems, all of which are listed, 2: not a folder",
    "list": "one line for each checkpoint of a run folder",
    "report": "write the page report.html of a run folder, from its results.json",
    "experts": "list, import, export, remove, rename, merge and collapse the experts of a checkpoint",
    "export": "the experts of a checkpoint for vLLM or llama.cpp, which serve each request with one of them",
    "gateway": "an OpenAI-compatible proxy for vLLM or llama.cpp that chooses each request's expert",
    "run": "another Python program, such as lm_eval, which can then load checkpoints by Transformers' Auto classes",
    "push": "a checkpoint to a repository on the Hub, with a model card",
    "pull": "a checkpoint from the Hub into its cache, verified",
    "convert": "the experts of a checkpoint of version 0.2.1 in a new checkpoint, with a fresh router",
}
TAKE_TEXTS = {"generate", "route"}  # words of theirs may have line breaks


def main(argv: Sequence[str] | None = None) -> int:
    """The command `dylora-moe`, also as `python -m dylora_moe`; returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        _complete(os.environ.get("COMP_LINE", ""))
    return command_line.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    words, rest = list(sys.argv[1:] if argv is None else argv), []
    if words[:1] == ["run"]:  # what follows the name of a program is the program's, as it is
        words, rest = words[:2], words[2:]
    args = build_parser(words).parse_args(words)
    args.words = rest
    return args.command(args)


def _complete(line: str) -> None:
    """Answer the shell's Tab, if argcomplete has been installed and registered, and exit."""
    import argcomplete

    argcomplete.autocomplete(build_parser(line.split()[1:]))


def build_parser(words: Sequence[str]) -> command_line.Parser:
    """Return the parser for a command line.

    Only the command that it names gets its flags: the modules of the others are not loaded.
    """
    called = next((word for word in words if word in COMMANDS), None)
    texts = called in TAKE_TEXTS
    parser = command_line.Parser(prog="dylora-moe", description=__doc__, texts=texts)
    parser.add_argument("--version", action="version", version=f"dylora-moe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, texts=texts)
        if name == called:
            module = import_module(f"{__package__}.commands.{name}")
            module.add_flags(command)
            command.set_defaults(command=module.run)
    return parser
