"""The flags of the commands that load a mixture."""

from __future__ import annotations

from argparse import ArgumentParser

from ..system.command_line import text


def add_base_flag(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--base", metavar="NAME", type=text, help="the base model, by hub id, folder or GGUF file, if it has moved"
    )


def add_model_flags(parser: ArgumentParser) -> None:
    add_base_flag(parser)
    parser.add_argument("--device", default="auto", type=text, help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument(
        "--dtype",
        type=text,
        help="of the base model: float32, bfloat16, float16 or float64 (default: as it was trained)",
    )
