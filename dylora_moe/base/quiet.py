"""Silencing transformers, accelerate and huggingface_hub, and turning their exceptions into one error."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator

from huggingface_hub import utils as hub
from transformers import modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging as transformers_logging

from ..errors import UsageError, is_out_of_memory


@contextlib.contextmanager
def refused(what: str, remedy: str) -> Iterator[None]:
    """Turn an exception inside the block into a UsageError with the first line of its cause, unless memory ran out."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(f"{what}: {type(error).__name__}: {cause[:300]} {remedy}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, log lines and warnings of the libraries inside the block."""
    verbosity = transformers_logging.get_verbosity()
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "accelerate")]
    levels, tqdm = [logger.level for logger in loggers], gguf.tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            transformers_logging.set_verbosity(transformers_logging.CRITICAL)
            transformers_logging.disable_progress_bar()
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            gguf.tqdm = functools.partial(tqdm, disable=True)
            yield
        finally:
            gguf.tqdm = tqdm
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
            if hub_bars:
                hub.enable_progress_bars()
            else:
                hub.disable_progress_bars()
            transformers_logging.set_verbosity(verbosity)
