"""Answers of a mixture, token by token. Imports torch."""

from __future__ import annotations

import signal
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..base.quiet import quiet
from ..errors import UsageError
from ..mixture.experts import check_expert
from .mixtures import Loaded
from .prompts import Prompt, encode

INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character
Show = Callable[[str, int | None], object]  # takes the text of a token, and its expert if it is wanted


@dataclass(frozen=True)
class Answer:
    """What a mixture has answered.

    Attributes:
        ids: its tokens, the last of which may end it.
        ended: "end" if the mixture has ended it, "length" if it has as many tokens as it may have, "interrupted".
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    ended: str
    weights: torch.Tensor | None  # (tokens, N): of each expert for each token; None if one expert was chosen


class TokenStreamer(BaseStreamer):
    """Hands on the text of each token as soon as it is whole: a character may take several tokens.

    `transformers.TextStreamer` hands on words, of which it cannot be told which tokens they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str, list[int]], object]):
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer, self._show = tokenizer, show
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, (1, T), and then each token, (1,)."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        self._hand_on(last=False)

    def end(self) -> None:
        """Hand on what is left."""
        self._hand_on(last=True)

    def _hand_on(self, last: bool) -> None:
        text = str(self._tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if text.endswith(INCOMPLETE) and not last:
            return
        new, self.text = text[len(self.text) :], text
        if new:
            self._show(new, self.ids)


@dataclass
class Stop(StoppingCriteria):
    """Ends an answer after the token that is computed when Ctrl-C is pressed."""

    asked: bool = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)

    @contextmanager
    def by_interrupt(self) -> Iterator[None]:
        """Inside, Ctrl-C asks for the end of the answer. A second one is a KeyboardInterrupt."""

        def received(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, received)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Answers:
    """Answers prompts as the flags of `generate` ask for it."""

    loaded: Loaded
    args: Namespace
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: Loaded, args: Namespace) -> Answers:
        """Raises UsageError if there is no such expert."""
        check_expert(args.expert, loaded.model.num_experts)
        return cls(loaded, args, _settings(loaded, args))

    def room(self, ids: Sequence[int]) -> int:
        """Return how many tokens an answer to this prompt may have; less than 1 if the prompt is too long."""
        most = getattr(self.loaded.model.base.config.get_text_config(), "max_position_embeddings", None)
        return self.args.max_new_tokens if most is None else min(self.args.max_new_tokens, most - len(ids))

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            UsageError: if it is too long, or has tokens that the base model does not know.
        """
        ids = encode(prompt, self.loaded.tokenizer, self.args.raw)
        if self.room(ids) < 1:
            raise UsageError(
                f"the prompt has {len(ids):,} tokens, and the base model has {len(ids) + self.room(ids):,} positions "
                "for it and its answer; give a shorter prompt"
            )
        self.loaded.check_vocabulary(ids)
        return ids

    def answer(self, ids: list[int], show: Show, stop: Stop) -> Answer:
        """Generate an answer to the tokens of a prompt, as `encode` has returned them."""
        model, by_token = self.loaded.model, self.args.show_routing

        def on_token(text: str, so_far: list[int]) -> None:
            show(text, int(self.loaded.weights([*ids, *so_far])[-1].argmax()) if by_token else None)

        streamer = TokenStreamer(self.loaded.tokenizer, on_token)
        prompt = torch.tensor([ids], device=model.device)  # (1, T)
        options = self.settings | {"max_new_tokens": self.room(ids), "streamer": streamer, "expert": self.args.expert}
        with quiet():
            criteria = StoppingCriteriaList([stop])
            model.generate(prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=criteria, **options)
        weights = None if self.args.expert is not None else self.loaded.weights([*ids, *streamer.ids])[len(ids) :]
        ended = "end" if streamer.ids[-1] in (self.settings["eos_token_id"] or ()) else "length"
        if stop.asked and ended != "end":
            ended = "interrupted"
        return Answer(streamer.text, streamer.ids, len(ids), ended, weights)


def _settings(loaded: Loaded, args: Namespace) -> dict[str, Any]:
    """Return the arguments of `generate` that are the same for every prompt."""
    config: Any = loaded.model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # Training ends documents with the tokenizer's, which the base's config may not know.
    found: dict[str, Any] = {"eos_token_id": sorted({*ends, loaded.tokenizer.eos_token_id} - {None}) or None}
    if args.temperature is not None or args.top_p is not None:
        found["do_sample"] = args.temperature != 0
    if args.temperature:
        found["temperature"] = args.temperature
    if args.top_p is not None:
        found["top_p"] = args.top_p
    return found
