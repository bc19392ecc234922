"""`Mixture`: a frozen causal LM, its LoRA experts and their router."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from peft import PeftModelForCausalLM
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..base.preserve import as_found_on_error, fresh_base
from ..base.structure import check_base, decoder_layers
from ..constants import EXPERT_PREFIX, IGNORED_LABEL, MAX_EXPERTS, NO_EXPERT, expert_name
from ..errors import UsageError, listed
from .config import MoELoraConfig, RouterConfig, check_configs, expert_configs
from .cross_entropy import summed_cross_entropy
from .expert_matrices import Unchanged, Watch
from .experts import ExpertStates, Injector
from .forward_pass import Participants
from .frozen_linear import float32_backward
from .routed_linear import RoutedLinear
from .router import Router, Usage, balance_loss, balance_statistics
from .routing import Routing
from .targets import comma_separated, replace_config, resolve_targets

_EXPERT_PARAMETER = re.compile(rf"\.lora_[AB]\.({EXPERT_PREFIX}\d+)\.weight$")


@dataclass
class MixtureOutput(CausalLMOutputWithPast):
    """As a causal LM's output.

    `loss` is what training minimises: `lm_loss`, in nats per labelled token, and in training the load-balancing loss
    times its coefficient. `balance_loss` is None where nothing was routed.
    """

    lm_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None


_OUTPUT_FIELDS = {field.name for field in fields(MixtureOutput)}


class Mixture(nn.Module):
    """A mixture of LoRA experts on a frozen causal LM, with one trainable router.

    Args:
        base: any Hugging Face causal LM; it is frozen and its linear layers are wrapped in place. On the `meta`
            device only the experts and the router are real.
        experts: how many, or the config of each; ranks and targets may differ.
        lora: the config of every expert, where `experts` is a number.
        router: the router's settings.
        label_smoothing: of the language-modelling loss in training, as in `torch.nn.CrossEntropyLoss`.

    Raises:
        UsageError: for a number of experts, targets or a base that cannot be had; nothing is changed then.
    """

    accepts_loss_kwargs = True  # the Trainer hands over num_items_in_batch
    loss_type = "ForCausalLM"  # the Trainer counts labels as the loss does: without the first of each row

    def __init__(
        self,
        base: PreTrainedModel,
        experts: int | Sequence[MoELoraConfig] = 2,
        *,
        lora: MoELoraConfig | None = None,
        router: RouterConfig | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        check_base(base)
        layers = decoder_layers(base)
        configs = expert_configs(experts, lora)
        if isinstance(label_smoothing, (bool, str)) or not 0 <= label_smoothing < 1:
            raise UsageError(f"label smoothing must be at least 0 and less than 1, got {label_smoothing!r}")
        self.label_smoothing = label_smoothing
        self.notes: list[str] = []  # lines that a user should see
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
        hidden_size = self.base.config.get_text_config().hidden_size
        device = next(p.device for name, p in self.base.named_parameters() if _EXPERT_PARAMETER.search(name))
        self.router = Router(hidden_size, len(configs), router or RouterConfig(), device=device)
        self._routing = Routing(self.router, layers, self._watch, self._participants)
        self._usage: list[torch.Tensor] | None = None
        self.train_all_experts()
        self.train(base.training)

    # ---- its parts ----

    base_revision: str | None = None
    sharded = False  # by sharding.shard: a forward pass then needs every rank

    @property
    def base(self) -> PreTrainedModel:
        """The base model, with the routed layers inside."""
        return self.peft_model.get_base_model()

    @property
    def config(self):
        return self.base.config

    @property
    def generation_config(self):
        return self.base.generation_config

    @property
    def device(self) -> torch.device:
        return self.router.gate.weight.device

    @property
    def num_experts(self) -> int:
        return len(self._states)

    @property
    def expert_configs(self) -> list[MoELoraConfig]:
        return [self.peft_model.peft_config[expert_name(i)] for i in range(self.num_experts)]

    @property
    def has_base_weights(self) -> bool:
        return not any(p.is_meta for p in self.base.parameters())

    def routed_layers(self) -> Iterator[tuple[str, RoutedLinear]]:
        """(name in the base model, layer) of every routed layer, in the model's order."""
        for name, module in self.base.named_modules():
            if isinstance(module, RoutedLinear):
                yield name, module

    def expert_tensors(self, expert: int) -> dict[str, nn.Parameter]:
        """The A (r, d_in) and B (d_out, r) of one expert, float32, by the names they have in a PEFT file."""
        name, tensors = expert_name(expert), {}
        for path, layer in self.routed_layers():
            if name in layer.lora_A:
                tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A[name].weight
                tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B[name].weight
        return tensors

    def fresh_base(self) -> PreTrainedModel:
        """As the function of that name, of this mixture's base."""
        return fresh_base(self.base)

    # ---- the experts ----

    def add_expert(self, config: MoELoraConfig | None = None) -> int:
        """Add a new expert and a row of the gate. No output changes until it is trained.

        Build the optimizer afterwards: it must know the new parameters.

        Returns:
            The index of the expert.
        """
        if self.num_experts >= MAX_EXPERTS:
            raise UsageError(f"a mixture has at most {MAX_EXPERTS} experts, this one has {self.num_experts}")
        check_configs([*self.expert_configs, *([] if config is None else [config])])
        config = self._with_targets(self.base, config or replace_config(self.expert_configs[0]))
        trainable = {name: p.requires_grad for name, p in self.named_parameters()}
        active = self.peft_model.active_adapters
        mode = self.training
        self._inject(config)
        self.router.grow()
        self._routing.attach(decoder_layers(self.base))
        self.peft_model.base_model.set_adapter([*active, expert_name(self.num_experts - 1)])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable.get(name, True))
        if self.num_experts == 2:
            self.router.gate.weight.requires_grad_(True)
        if self._usage is not None:
            self.reset_usage()
        self.train(mode)
        return self.num_experts - 1

    def train_all_experts(self) -> None:
        """Make every expert, and the router where there is something to route, trainable; the base stays frozen.

        PEFT's `set_adapter`, `load_adapter` and `disable_adapter` freeze experts: call this before an optimizer is
        built.
        """
        self.peft_model.base_model.set_adapter([expert_name(i) for i in range(self.num_experts)])
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(_EXPERT_PARAMETER.search(name) is not None)
        self.router.gate.weight.requires_grad_(self.num_experts > 1)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that would leave an expert or the router as it is.

        Raises:
            UsageError: names what is frozen or outside the optimizer.
        """
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        problems = {}  # in the order of the experts
        for name, parameter in self.trained_parameters().items():
            expert = _EXPERT_PARAMETER.search(name)
            owner = (int(expert[1].removeprefix(EXPERT_PREFIX)), expert[1]) if expert else (self.num_experts, "router")
            if not parameter.requires_grad:
                problems[owner] = f"{owner[1]} is frozen (requires_grad is False)"
            elif id(parameter) not in known:
                problems.setdefault(owner, f"{owner[1]} has parameters that the optimizer does not hold")
        if problems:
            texts = [problems[owner] for owner in sorted(problems)]
            raise UsageError(
                f"this training would not move every part of the mixture:\n{listed(texts)}\n"
                "Call train_all_experts(), and then build the optimizer from all parameters that require a gradient."
            )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name: all experts, and the router where there are two and more."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if _EXPERT_PARAMETER.search(name) or (name == "router.gate.weight" and self.num_experts > 1)
        }

    @property
    def expert_states(self) -> list[str]:
        """ "new" (never trained: B is zero), "immature" (trained, its run not finished) or "mature", per expert."""
        return self._states.states()

    def set_expert_states(self, states: Sequence[str]) -> None:
        """Take over the states that a checkpoint has; whether an expert is new shows in its tensors."""
        self._states.set(states)

    def mark_mature(self, experts: Sequence[int] | None = None) -> None:
        """The run that trained these experts (all by default) has finished."""
        self._states.mark_mature(range(self.num_experts) if experts is None else experts)

    def mark_immature(self) -> None:
        """A run that trains all experts begins."""
        self._states.mark_immature()

    def train(self, mode: bool = True) -> Mixture:
        self._forget()
        return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs):
        self._forget()  # what was derived would stay on its device
        return super()._apply(*args, **kwargs)

    def _forget(self) -> None:
        """Read every parameter again: it may have been written in a way that nobody sees."""
        self._watch.forget()
        self._states.forget()

    def _participants(self, unchanged: Unchanged | None) -> Participants:
        new = self._states.new(unchanged)
        trained = tuple(i for i in range(self.num_experts) if i not in new)
        sparse = not self.training and bool(trained) and self._states.all_mature(trained)
        return Participants(trained, new, sparse)

    # ---- building ----

    def _inject(self, config: MoELoraConfig) -> None:
        name = expert_name(self.num_experts)
        self._states.add([layer.lora_B[name] for layer in self._injector.add(name, config)])

    def _with_targets(self, base: PreTrainedModel, config: MoELoraConfig) -> MoELoraConfig:
        config, outside = resolve_targets(base, config)
        note = f"left out of the targets, since outside the decoder layers: {comma_separated(outside)}"
        if outside and note not in self.notes:
            self.notes.append(note)
        return config

    # ---- running it ----

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        expert: int | Sequence[int] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MixtureOutput:
        """As the base model's forward.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), or what else the base takes.
            labels: (B, T) int64; the token at t is predicted at t - 1; -100 is left out of the loss.
            expert: send every token to this expert alone; a sequence: one expert for each row of the batch.
            num_items_in_batch: labelled tokens of the whole batch, where this is one of several micro-batches.
        """
        if isinstance(expert, Sequence):
            expert = self._check_rows(expert, kwargs.get("inputs_embeds") if input_ids is None else input_ids)
        else:
            self._check_expert(expert)
        if labels is not None:
            kwargs.setdefault("use_cache", False)
        if self.training:
            self._routing.wrap_checkpointing(decoder_layers(self.base))
        as_tuple = kwargs.pop("return_dict", True) is False
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "return_dict": True}
        linear = float32_backward(self.get_input_embeddings().weight)
        record = labels is not None and self._looks_at_routing()
        with self._routing.run(expert, record=record, linear=linear) as state:
            out = self.base(input_ids, **kwargs)
        losses = {}
        if labels is not None:
            losses = self._losses(out.logits, labels, attention_mask, num_items_in_batch, state.recorded)
        result = MixtureOutput(**{name: value for name, value in out.items() if name in _OUTPUT_FIELDS} | losses)
        for name, value in out.items():
            if name not in _OUTPUT_FIELDS:  # some bases have their state in a field of their own
                result[name] = value
        return result.to_tuple() if as_tuple else result

    def _losses(self, logits, labels, attention_mask, num_items_in_batch, probs) -> dict:
        """The losses by their names in the output; counts the usage. probs: of each decoder layer, (B, T, N)."""
        # The logit at t is held against the token at t + 1. Shifting the labels spares a copy of the logits.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(logits.device)  # (B, T)
        count = (targets != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=logits.device, dtype=torch.float32).clamp(min=1)
        smoothing = self.label_smoothing if self.training else 0.0  # evaluation is in nats
        lm_loss = summed_cross_entropy(logits, targets, smoothing) / count
        if not probs:
            return {"loss": lm_loss, "lm_loss": lm_loss}
        mask = targets != IGNORED_LABEL
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = mask & attention_mask[:, -labels.shape[1] :].to(mask)
        probs = torch.stack([p.to(logits.device) for p in probs])  # (L, B, T, N)
        first, total = balance_statistics(probs, mask)
        if self._usage is not None:
            seen = [t.detach().sum(1).mean(0) for t in (first, total)]  # (N,) each
            self._usage = [before.to(now.device) + now for before, now in zip(self._usage, seen, strict=True)]
        if num_items_in_batch is None:  # with it, what other micro-batches leave out is not known
            count = mask.sum().clamp(min=1)
        balance = balance_loss(first, total, count)
        coefficient = self.router.config.balance_coefficient if self.training else 0.0
        return {
            "loss": lm_loss + coefficient * balance if coefficient else lm_loss,
            "lm_loss": lm_loss,
            "balance_loss": balance,
        }

    def _looks_at_routing(self) -> bool:
        wanted = self._usage is not None or (self.training and self.router.config.balance_coefficient > 0)
        return wanted and self.num_experts > 1

    def generate(self, *args, expert: int | None = None, **kwargs):
        """As the base model's `generate`; every token is routed, or goes to `expert` alone."""
        self._check_expert(expert)
        with torch.no_grad(), self._routing.run(expert):
            return self.base.generate(*args, **kwargs)

    def _check_expert(self, expert: int | None) -> None:
        whole = isinstance(expert, int) and not isinstance(expert, bool)
        if expert is not None and not (whole and 0 <= expert < self.num_experts):
            raise UsageError(f"expert must be None or 0 to {self.num_experts - 1}, got {expert!r}")

    def _check_rows(self, experts: Sequence[int], batch: torch.Tensor | None) -> tuple[int, ...]:
        if batch is None:
            raise UsageError("one of input_ids and inputs_embeds is needed, got neither")
        for expert in experts:
            self._check_expert(-1 if expert is None else expert)
        if len(experts) != len(batch):
            raise UsageError(
                f"expert names {len(experts)} experts for the {len(batch)} rows of the batch: one for each"
            )
        return tuple(experts)

    @contextmanager
    def expert(self, index: int) -> Iterator[Mixture]:
        """Inside, every token goes to one expert, also where PEFT's or the base's own methods are called."""
        self._check_expert(index)
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
        """What was routed where since `reset_usage`; None where nobody asked or there is one expert."""
        return Usage(*self._usage) if self._usage is not None and self.num_experts > 1 else None

    # ---- what the Trainer and users of Transformers expect ----

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As Transformers', without re-entrance: the routing weights reach a layer outside of its arguments."""
        options = {**(activation_checkpointing_kwargs or {})}
        if options.setdefault("use_reentrant", False):
            raise UsageError("gradient checkpointing of a mixture needs use_reentrant=False")
        enable = getattr(self.base, "activation_checkpointing_enable", None) or self.base.gradient_checkpointing_enable
        enable(options, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        disable = getattr(self.base, "activation_checkpointing_disable", None)
        (disable or self.base.gradient_checkpointing_disable)()

    @property
    def is_activation_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules())

    # The earlier names of the three.

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters the parts have: "base", "experts" (all), "router"."""
        experts = sum(p.numel() for name, p in self.base.named_parameters() if _EXPERT_PARAMETER.search(name))
        base = sum(p.numel() for p in self.base.parameters()) - experts
        return {"base": base, "experts": experts, "router": self.router.gate.weight.numel()}
