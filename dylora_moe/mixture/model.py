"""`Mixture`: a frozen causal LM, its LoRA experts and their router."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModelForCausalLM
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..base.fingerprint import parameter_count
from ..base.preserve import as_found_on_error, fresh_base, generation_text
from ..base.structure import check_base, decoder_layers, keep_layout
from ..constants import IGNORED_LABEL, IMMATURE, MATURE, MAX_EXPERTS, NO_EXPERT, expert_name
from ..errors import UsageError
from ..ops.cross_entropy import summed_cross_entropy
from ..ops.frozen_linear import float32_products
from ..pretrained.model import OnBase
from .config import MoELoraConfig, RouterConfig, check_configs, expert_configs
from .expert_matrices import Watch, weight_of
from .experts import EXPERT_PARAMETER, ROUTER, ExpertStates, Injector, check_expert, check_optimizer, checked_rows
from .forward_pass import OUTPUT_FIELDS, MixtureOutput
from .routed_linear import RoutedLinear
from .router import Router, Usage, balance_loss, balance_statistics
from .routing import Routing
from .targets import replace_config, resolve_targets


class Mixture(OnBase):
    """A mixture of LoRA experts on a frozen causal LM, with one trainable router.

    Args:
        base: any Hugging Face causal LM; it is frozen and its linear layers are wrapped in place. On the `meta`
            device only the experts and the router are real.
        experts: their number, or the config of each; ranks and targets may differ.
        lora: the config of every expert, if `experts` is a number.
        router: the router's settings.
        label_smoothing: of the language-modelling loss in training, as in `torch.nn.CrossEntropyLoss`.

    Raises:
        UsageError: if the number of experts or their targets are invalid, or the base is not supported. The base is
            left as it was.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        experts: int | Sequence[MoELoraConfig] = 2,
        *,
        lora: MoELoraConfig | None = None,
        router: RouterConfig | None = None,
        label_smoothing: float = 0.0,
    ):
        check_base(base)
        keep_layout(base)
        super().__init__(base)
        configs = expert_configs(experts, lora)
        if isinstance(label_smoothing, (bool, str)) or not 0 <= label_smoothing < 1:
            raise UsageError(f"label smoothing must be at least 0 and less than 1, got {label_smoothing!r}")
        self.label_smoothing = label_smoothing
        self.generation_of_base: str | None = generation_text(base)
        self.notes: list[str] = [*getattr(base, "notes", ())]  # lines that a user should see
        resolved = {id(config): self._with_targets(base, config) for config in configs}
        configs = [replace_config(resolved[id(config)]) for config in configs]
        self._watch = Watch()
        self._states = ExpertStates(self._watch)
        self._injector = Injector(base)
        with as_found_on_error(base):
            base.requires_grad_(False)
            for config in configs:
                self._inject(config)
        self.peft_model: PeftModelForCausalLM = self._injector.peft_model
        device = next(p.device for name, p in self.base.named_parameters() if EXPERT_PARAMETER.search(name))
        width = weight_of(self.get_input_embeddings()).shape[1]
        self.router = Router(width, len(configs), router or RouterConfig(), device=device)
        self._routing = Routing(self.router, self.base, self._watch, self._states)
        self._usage: list[torch.Tensor] | None = None
        self._tell_config()
        self._is_built = True
        self.train_all_experts()
        self.train(base.training)

    @property
    def has_own_generation_config(self) -> bool:
        """Whether the generation config has changed since the mixture was built, or a checkpoint has brought it."""
        return generation_text(self.base) != self.generation_of_base

    # ---- its parts ----

    base_revision: str | None = None
    _trained: frozenset[int] = frozenset()  # the experts that are trained
    _trains_router = True
    sharded = False  # by sharding.shard: a forward pass then needs every rank

    @property
    def base(self) -> PreTrainedModel:
        """The base model, with the routed layers inside."""
        return cast(PreTrainedModel, self.peft_model.get_base_model())

    @property
    def device(self) -> torch.device:
        return self.router.gate.weight.device

    @property
    def num_experts(self) -> int:
        return len(self._states)

    @property
    def expert_configs(self) -> list[MoELoraConfig]:
        self._injector.check()
        return [cast(MoELoraConfig, self.peft_model.peft_config[expert_name(i)]) for i in range(self.num_experts)]

    @property
    def has_base_weights(self) -> bool:
        return not any(p.is_meta for p in self.base.parameters())

    def routed_layers(self) -> Iterator[tuple[str, RoutedLinear]]:
        """(name in the base model, layer) of every routed layer, in the model's order."""
        self._injector.check()
        for name, module in self.base.named_modules():
            if isinstance(module, RoutedLinear):
                yield name, module

    def expert_tensors(self, expert: int) -> dict[str, nn.Parameter]:
        """The A (r, d_in) and B (d_out, r) of one expert, float32, by the names they have in a PEFT file."""
        name, tensors = expert_name(expert), {}
        for path, layer in self.routed_layers():
            if name in layer.lora_A:
                tensors[f"base_model.model.{path}.lora_A.weight"] = weight_of(layer.lora_A[name])
                tensors[f"base_model.model.{path}.lora_B.weight"] = weight_of(layer.lora_B[name])
        return tensors

    def fresh_base(self) -> PreTrainedModel:
        """Return the base model in a module tree of its own, without experts; its tensors are shared."""
        return fresh_base(self.base)

    # ---- the experts ----

    def add_expert(self, config: MoELoraConfig | None = None) -> int:
        """Add a new expert, which is trained as well, and a row of the gate. No output changes until it is trained.

        Build the optimizer afterwards: it must know the new parameters.

        Returns:
            The index of the expert.
        """
        if self.num_experts >= MAX_EXPERTS:
            raise UsageError(f"a mixture has at most {MAX_EXPERTS} experts, this one has {self.num_experts}")
        check_configs([*self.expert_configs, *([] if config is None else [config])])
        config = self._with_targets(self.base, config or replace_config(self.expert_configs[0]))
        frozen = [parameter for parameter in self.parameters() if not parameter.requires_grad]
        self._inject(config)
        self.router.grow()
        self._tell_config()
        self._routing.attach(decoder_layers(self.base))
        self.train_only({*self._trained, self.num_experts - 1}, router=self._trains_router)
        for parameter in frozen if self.num_experts > 2 else ():  # the router of one expert was not trained yet
            parameter.requires_grad_(False)
        if self._usage is not None:
            self.reset_usage()
        self.train(self.training)  # the new modules, too
        return self.num_experts - 1

    def train_all_experts(self) -> None:
        """Make every expert trainable, and the router if there are several experts; the base stays frozen.

        PEFT's `set_adapter`, `load_adapter` and `disable_adapter` freeze experts: call this before building an
        optimizer.
        """
        self.train_only(range(self.num_experts), router=True)

    def train_only(self, experts: Iterable[int], *, router: bool = False) -> None:
        """Make these experts trainable, and the router as well if there are several experts; all else is frozen.

        Raises:
            UsageError: if there is no such expert.
        """
        chosen = frozenset(experts)
        for expert in chosen:
            check_expert(expert, self.num_experts)
        self._trained, self._trains_router = chosen, router
        self.unfreeze()

    def unfreeze(self) -> None:
        """Make what `train_only` has chosen trainable again, after PEFT or others have frozen it."""
        cast(Any, self.peft_model.base_model).set_adapter([expert_name(i) for i in range(self.num_experts)])
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained_parameters().values():
            parameter.requires_grad_(True)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that would not train every expert and the router, and nothing else.

        Raises:
            UsageError: with what else the optimizer holds, or every part that is frozen or that it does not hold.
        """
        check_optimizer(optimizer, self.trained_parameters(), self)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters to train by name, of experts and router, as `train_only` has chosen them.

        At first these are all, but for the router of a single expert.
        """
        names = {expert_name(i) for i in self._trained}
        router = self._trains_router and self.num_experts > 1
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if ((found := EXPERT_PARAMETER.search(name)) and found[1] in names) or (router and name.startswith(ROUTER))
        }

    @property
    def expert_states(self) -> list[str]:
        """ "new" (never trained: B is zero), "immature" (trained, its run not finished) or "mature", per expert."""
        return self._states.states()

    def set_expert_states(self, states: Sequence[str]) -> None:
        """Set the states that a checkpoint has; whether an expert is new shows in its tensors."""
        self._states.set(states)

    def mark_mature(self, experts: Sequence[int] | None = None) -> None:
        """Mark experts (by default those that are trained) as mature, once the run has finished."""
        self._states.mark_mature(sorted(self._trained) if experts is None else experts)

    def mark_immature(self) -> None:
        """Mark the experts that are trained as immature, when a run begins."""
        self._states.mark_immature(self._trained)

    def train(self, mode: bool = True) -> Mixture:
        self._forget()
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    def get_extra_state(self) -> torch.Tensor:
        """Return which experts are mature, (N,) in uint8, for `state_dict`: it decides how tokens are routed."""
        return torch.tensor([state == MATURE for state in self.expert_states], dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over what `get_extra_state` has returned."""
        self.set_expert_states([MATURE if mature else IMMATURE for mature in state.tolist()])

    def _apply(self, *args: Any, **kwargs: Any) -> Mixture:
        self._forget()  # what was derived from the parameters would stay on their old device
        return super()._apply(*args, **kwargs)

    def _forget(self) -> None:
        """Read every parameter again: it may have been written in a way that leaves no trace."""
        self._watch.forget()
        self._states.forget()

    def _inject(self, config: MoELoraConfig) -> None:
        name = expert_name(self.num_experts)
        self._states.add([layer.lora_B[name] for layer in self._injector.add(name, config)])

    def _tell_config(self) -> None:
        """Tell trainers how many experts there are, and the coefficient of their load-balancing loss: one has none."""
        self.config.num_experts = self.num_experts
        self.config.router_aux_loss_coef = self.router.config.balance_coefficient if self.num_experts > 1 else 0.0

    def _with_targets(self, base: PreTrainedModel, config: MoELoraConfig) -> MoELoraConfig:
        config, notes = resolve_targets(base, config)
        self.notes += [note for note in notes if note not in self.notes]
        return config

    # ---- running it ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._routing.called():
            return super().__call__(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        expert: int | Sequence[int] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MixtureOutput | tuple:
        """Run the base model with its experts; further arguments are those of the base model's forward.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), or another form that the base takes.
            labels: (B, T) int64; the token at t is predicted at t - 1; -100 is left out of the loss.
            expert: send every token to this expert; a sequence: one expert for each row of the batch.
            num_items_in_batch: labelled tokens of the whole batch, if this is one of several micro-batches.
        """
        if isinstance(expert, Sequence):
            batch = kwargs.get("inputs_embeds") if input_ids is None else input_ids
            expert = checked_rows(expert, batch, self.num_experts)
        else:
            check_expert(expert, self.num_experts)
        self._injector.check(training=self.training and torch.is_grad_enabled())
        if labels is not None:
            kwargs.setdefault("use_cache", False)
        as_tuple = kwargs.pop("return_dict", True) is False
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "return_dict": True}
        for_loss = labels is not None or (self.training and torch.is_grad_enabled())
        linear = float32_products(weight_of(self.get_input_embeddings())) if for_loss else None
        wanted = self._usage is not None or (self.training and self.router.config.balance_coefficient > 0)
        asked = kwargs.pop("output_router_logits", None)  # a base may have a router of its own
        with_logits = bool(self.config.output_router_logits if asked is None else asked)
        record = with_logits or (labels is not None and wanted and self.num_experts > 1)
        with self._routing.run(expert, record=record, linear=linear) as state:
            out = self.base(input_ids, **kwargs)
        losses: dict[str, Any] = {"router_logits": state.router_logits()} if with_logits else {}
        if labels is not None:
            losses |= self._losses(out.logits, labels, attention_mask, num_items_in_batch, state.probabilities)
        result = MixtureOutput(**{name: value for name, value in out.items() if name in OUTPUT_FIELDS} | losses)
        for name, value in out.items():
            if name not in OUTPUT_FIELDS:  # some bases return their state in a field of their own
                result[name] = value
        return result.to_tuple() if as_tuple else result

    def _losses(
        self, logits: torch.Tensor, labels: torch.Tensor, attention_mask: Any, num_items_in_batch: Any, probs: Any
    ) -> dict[str, torch.Tensor]:
        """The losses by their names in the output; counts the usage. probs: (B, T, N), or None."""
        # The logit at t predicts the token at t + 1. Shifting the labels spares a copy of the logits.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(logits.device)  # (B, T)
        mask = targets != IGNORED_LABEL
        count = mask.sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=logits.device, dtype=torch.float32).clamp(min=1)
        smoothing = self.label_smoothing if self.training else 0.0  # evaluation is in nats
        lm_loss = summed_cross_entropy(logits, targets, smoothing) / count
        if probs is None:
            return {"loss": lm_loss, "lm_loss": lm_loss}
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = mask & attention_mask[:, -labels.shape[1] :].to(mask)
        first, total = balance_statistics(probs.to(logits.device), mask)
        if self._usage is not None:
            seen = [t.detach().sum(0) for t in (first, total)]  # (N,) each
            self._usage = [before.to(now.device) + now for before, now in zip(self._usage, seen, strict=True)]
        # With num_items_in_batch, how many tokens other micro-batches leave out is not known.
        balance = balance_loss(first, total, mask.sum().clamp(min=1) if num_items_in_batch is None else count)
        coefficient = self.router.config.balance_coefficient if self.training else 0.0
        loss = lm_loss + coefficient * balance if coefficient else lm_loss
        return {"loss": loss, "lm_loss": lm_loss, "balance_loss": balance}

    def generate(self, *args: Any, expert: int | None = None, **kwargs: Any) -> Any:
        """Call the base model's `generate`; every token is routed, or goes to `expert`."""
        self._injector.check()
        check_expert(expert, self.num_experts)
        with torch.no_grad(), self._routing.run(expert):
            return cast(Any, self.base).generate(*args, **kwargs)

    @contextmanager
    def expert(self, index: int) -> Iterator[Mixture]:
        """Inside, every token goes to one expert, also in PEFT's and the base's own methods."""
        check_expert(index, self.num_experts)
        with self._routing.force(index):
            yield self

    @contextmanager
    def disable_experts(self) -> Iterator[Mixture]:
        """Inside, the mixture is its base model. PEFT's `disable_adapter` also freezes experts; this does not."""
        with self._routing.force(NO_EXPERT):
            yield self

    @contextmanager
    def watch_usage(self) -> Iterator[Mixture]:
        """Inside, forward passes with labels add to `usage()`."""
        before = self._usage
        self.reset_usage()
        try:
            yield self
        finally:
            self._usage = before

    def reset_usage(self) -> None:
        self._usage = [torch.zeros(self.num_experts, device=self.device) for _ in range(2)]

    def usage(self) -> Usage | None:
        """Return how tokens were routed since `reset_usage`; None if it was not called, or there is one expert."""
        return Usage(*self._usage) if self._usage is not None and self.num_experts > 1 else None

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of "base", "experts" (all) and "router"."""
        experts = sum(p.numel() for name, p in self.base.named_parameters() if EXPERT_PARAMETER.search(name))
        router = sum(p.numel() for p in self.router.parameters())
        return {"base": parameter_count(self.base), "experts": experts, "router": router}
