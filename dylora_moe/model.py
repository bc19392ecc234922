"""`DyLoRAMoE`: a frozen causal LM, its LoRA experts and their router."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from .bases import decoder_layers
from .config import MAX_EXPERTS, MoELoraConfig, RouterConfig
from .errors import UsageError, listed
from .layers import RoutedLinear, expert_name
from .router import Router, balance_loss, balance_statistics
from .routing import Plan, RoutedCheckpointing, Routing

NEW, IMMATURE, MATURE = "new", "immature", "mature"
STATES = (NEW, IMMATURE, MATURE)
ATTENTION_TARGETS = ("k_proj", "o_proj", "q_proj", "v_proj")
ALL_LINEAR = "all-linear"
IGNORED_LABEL = -100


@dataclass
class DyLoRAMoEOutput(CausalLMOutputWithPast):
    """As a causal LM's output.

    `loss` is what training minimises: `lm_loss`, in nats per labelled token, and in training the load-balancing loss
    times its coefficient. `balance_loss` is None where nothing was routed.
    """

    lm_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None


@dataclass
class Usage:
    """How tokens were routed since the last look: sums over tokens, averaged over decoder layers."""

    first: torch.Tensor  # (N,) tokens whose first choice was the expert
    total: torch.Tensor  # (N,) sum of the routing probabilities

    def shares(self) -> list[float]:
        """The mean routing probability of each expert; they sum to 1."""
        return (self.total / self.total.sum().clamp(min=1e-12)).tolist()

    def balance(self) -> float:
        """N * sum_i f_i P_i over all tokens: 1 where the load is even, N where one expert takes all."""
        tokens = self.first.sum().clamp(min=1e-12)
        return float(len(self.first) * (self.first / tokens * self.total / tokens).sum())


class DyLoRAMoE(nn.Module):
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
        layers = decoder_layers(base)
        configs = _expert_configs(experts, lora)
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label smoothing must be at least 0 and less than 1, got {label_smoothing!r}")
        self.label_smoothing = label_smoothing
        self.notes: list[str] = []  # lines that a user should see
        configs = [self._with_targets(base, config) for config in configs]
        base.requires_grad_(False)
        self._mature: list[bool] = []
        self._untrained: dict[int, tuple] = {}
        self.peft_model: PeftModelForCausalLM | None = None
        for config in configs:
            self._inject(base, config)
        hidden_size = self.base.get_input_embeddings().embedding_dim
        hidden_size = getattr(self.base.config.get_text_config(), "hidden_size", hidden_size)
        self.router = Router(hidden_size, len(configs), router or RouterConfig(), device=self._expert_device())
        self._routing = Routing(self.router, layers, self._plan)
        self._usage: list[torch.Tensor] | None = None
        self.train_all_experts()
        self.train(base.training)

    # ---- where it comes from ----

    @classmethod
    def from_base(
        cls,
        model: str,
        experts: int | Sequence[MoELoraConfig] = 2,
        *,
        lora: MoELoraConfig | None = None,
        router: RouterConfig | None = None,
        label_smoothing: float = 0.0,
        weights: str = "auto",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        token: str | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> DyLoRAMoE:
        """Load a base model (hub id, folder, GGUF file or preset) and put fresh experts, seeded by `seed`, on it.

        Raises:
            UsageError: as `bases.find_base` and this class do.
        """
        from .bases import find_base, load_base

        source, weights = find_base(model, weights=weights, token=token, revision=revision)
        base = load_base(source, weights, dtype=dtype, device=device, seed=seed)
        with seeded(seed):
            mixture = cls(base, experts, lora=lora, router=router, label_smoothing=label_smoothing)
        mixture.base_revision = source.revision
        if source.note:
            mixture.notes.append(source.note)
        return mixture

    @classmethod
    def from_checkpoint(cls, folder: str | Path, base: PreTrainedModel | None = None, **options) -> DyLoRAMoE:
        """Read a checkpoint into a fresh mixture, on `base` or on the base model which the checkpoint names.

        Raises:
            CheckpointError: with every problem, before anything is built.
        """
        from . import checkpoint

        return checkpoint.load(folder, base, **options)

    # ---- its parts ----

    base_revision: str | None = None

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
        return len(self._mature)

    @property
    def expert_configs(self) -> list[MoELoraConfig]:
        return [self.peft_model.peft_config[expert_name(i)] for i in range(self.num_experts)]

    @property
    def has_base_weights(self) -> bool:
        return not any(p.is_meta for name, p in self.base.named_parameters() if "lora_" not in name)

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
        config = self._with_targets(self.base, config or replace_config(self.expert_configs[0]))
        _check_dropout([*self.expert_configs, config])
        trainable = {name: p.requires_grad for name, p in self.named_parameters()}
        active = self.peft_model.active_adapters
        mode = self.training
        self._inject(self.base, config)
        self.router.grow()
        self._routing.attach(decoder_layers(self.base))
        self.peft_model.base_model.set_adapter([*active, expert_name(self.num_experts - 1)])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable.get(name, "lora_" in name))
        if self.num_experts == 2:
            self.router.gate.weight.requires_grad_(True)
        self.train(mode)
        return self.num_experts - 1

    def train_all_experts(self) -> None:
        """Make every expert, and the router where there is something to route, trainable; the base stays frozen.

        PEFT's `set_adapter`, `load_adapter` and `disable_adapter` freeze experts: call this before an optimizer is
        built.
        """
        self.peft_model.base_model.set_adapter([expert_name(i) for i in range(self.num_experts)])
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self.router.gate.weight.requires_grad_(self.num_experts > 1)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that would leave an expert or the router as it is.

        Raises:
            UsageError: names what is frozen or outside the optimizer.
        """
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        frozen, outside = set(), set()
        for name, parameter in self.trained_parameters().items():
            owner = re.search(r"expert_\d+", name)
            owner = owner.group() if owner else "router"
            if not parameter.requires_grad:
                frozen.add(owner)
            elif id(parameter) not in known:
                outside.add(owner)
        problems = [f"{owner} is frozen (requires_grad is False)" for owner in sorted(frozen)]
        problems += [f"{owner} has parameters that the optimizer does not hold" for owner in sorted(outside - frozen)]
        if problems:
            raise UsageError(
                f"this training would not move every part of the mixture:\n{listed(problems)}\n"
                "Call train_all_experts() and build the optimizer after it, from all parameters that require a gradient."
            )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name: all experts, and the router where there are two and more."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if "lora_" in name or (name == "router.gate.weight" and self.num_experts > 1)
        }

    @property
    def expert_states(self) -> list[str]:
        """ "new" (never trained: B is zero), "immature" (trained, its run not finished) or "mature", per expert."""
        new = self._new_experts()
        return [NEW if i in new else MATURE if mature else IMMATURE for i, mature in enumerate(self._mature)]

    def mark_mature(self, experts: Sequence[int] | None = None) -> None:
        """The run that trained these experts (all by default) has finished."""
        for index in range(self.num_experts) if experts is None else experts:
            self._mature[index] = True

    def mark_immature(self) -> None:
        """A run that trains all experts begins."""
        self._mature = [False] * self.num_experts

    def set_expert_states(self, states: Sequence[str]) -> None:
        """Take over the states that a checkpoint has; whether an expert is new shows in its tensors."""
        self._mature = [state == MATURE for state in states]
        self._untrained = {i: () for i in range(self.num_experts)}

    def _new_experts(self) -> tuple[int, ...]:
        """The experts whose B is still all zero.

        A tensor is read again only when its version counter says that it was written to; an expert that has been
        seen to be trained is not looked at any more.
        """
        for index, seen in list(self._untrained.items()):
            weights = self._lora_b(index)
            versions = tuple(_version(w) for w in weights)
            if versions == seen and None not in versions:
                continue
            if any(bool(w.any()) for w in weights if not w.is_meta):
                del self._untrained[index]
            else:
                self._untrained[index] = versions
        return tuple(self._untrained)

    def _lora_b(self, expert: int) -> list[torch.Tensor]:
        name = expert_name(expert)
        return [layer.lora_B[name].weight for _, layer in self.routed_layers() if name in layer.lora_B]

    def _plan(self) -> Plan:
        new = self._new_experts()
        trained = tuple(i for i in range(self.num_experts) if i not in new)
        sparse = not self.training and bool(trained) and all(self._mature[i] for i in trained)
        return Plan(trained, new, sparse)

    # ---- building ----

    def _inject(self, base: PreTrainedModel, config: MoELoraConfig) -> None:
        """Add one expert through PEFT, and make its parameters: float32, on the base's device (CPU for meta)."""
        name = expert_name(self.num_experts)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks Transformers by a name that is going
            if self.peft_model is None:
                self.peft_model = PeftModelForCausalLM(base, config, adapter_name=name, low_cpu_mem_usage=True)
            else:
                self.peft_model.add_adapter(name, config, low_cpu_mem_usage=True)
        routed = 0
        for path, module in self.base.named_modules():
            if not isinstance(module, LoraLayer) or name not in module.lora_A:
                continue
            if not isinstance(module, RoutedLinear):
                raise UsageError(
                    f"{path} ({type(module.get_base_layer()).__name__}) cannot be routed: experts go on nn.Linear and "
                    "Conv1D layers only; leave it out of the targets"
                )
            device = module.get_base_layer().weight.device
            device = torch.device("cpu") if device.type == "meta" else device
            for linear in (module.lora_A[name], module.lora_B[name]):
                linear.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.float32, device=device))
            module.reset_lora_parameters(name, config.init_lora_weights)
            routed += 1
        if routed == 0:
            raise UsageError(f"no linear layer of {type(base).__name__} matches the targets {config.target_modules}")
        self._untrained[self.num_experts] = ()
        self._mature.append(False)

    def _with_targets(self, base: PreTrainedModel, config: MoELoraConfig) -> MoELoraConfig:
        config, outside = resolve_targets(base, config)
        note = f"left out of the targets, since outside the decoder layers: {', '.join(outside[:10])}"
        if outside and note not in self.notes:
            self.notes.append(note)
        return config

    def _expert_device(self) -> torch.device:
        return next(p.device for name, p in self.base.named_parameters() if "lora_" in name)

    # ---- running it ----

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        expert: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> DyLoRAMoEOutput:
        """As the base model's forward.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), or what else the base takes.
            labels: (B, T) int64; the token at t is predicted at t - 1; -100 is left out of the loss.
            expert: send every token to this expert alone.
            num_items_in_batch: labelled tokens of the whole batch, where this is one of several micro-batches.
        """
        self._check_expert(expert)
        if labels is not None:
            kwargs.setdefault("use_cache", False)
        collect = labels is not None and self._looks_at_routing(expert)
        with self._routing.force(expert):
            if collect:
                with self._routing.record() as probs:
                    out = self.base(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
            else:
                out = self.base(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        result = DyLoRAMoEOutput(**{key: value for key, value in out.items() if key != "loss" and value is not None})
        if labels is None:
            return result
        targets = labels[:, 1:]
        count = (targets != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=out.logits.device, dtype=torch.float32).clamp(min=1)
        result.lm_loss = self._lm_loss(out.logits, targets) / count
        result.loss = result.lm_loss
        if collect and probs:
            mask = targets != IGNORED_LABEL
            if attention_mask is not None and attention_mask.dim() == 2:
                mask = mask & attention_mask[:, -labels.shape[1] : -1].bool()
            first, total = balance_statistics(torch.stack([p[:, :-1] for p in probs]), mask.to(probs[0].device))
            if self._usage is not None:
                self._usage = [s + t.detach().sum(1).mean(0) for s, t in zip(self._usage, (first, total), strict=True)]
            result.balance_loss = balance_loss(first, total, count)
            if self.training and self.router.config.balance_coefficient:
                result.loss = result.lm_loss + self.router.config.balance_coefficient * result.balance_loss
        return result

    def _looks_at_routing(self, expert: int | None) -> bool:
        wanted = self._usage is not None or (self.training and self.router.config.balance_coefficient > 0)
        return wanted and expert is None and self.num_experts > 1

    def _lm_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the tokens' cross-entropies in float32; smoothed in training only, so that evaluation is in nats."""
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            targets.flatten().to(logits.device),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )

    def generate(self, *args, expert: int | None = None, **kwargs):
        """As the base model's `generate`; every token is routed, or goes to `expert` alone."""
        self._check_expert(expert)
        with self._routing.force(expert):
            return self.base.generate(*args, **kwargs)

    def _check_expert(self, expert: int | None) -> None:
        if expert is not None and not (isinstance(expert, int) and 0 <= expert < self.num_experts):
            raise UsageError(f"expert must be None or 0 to {self.num_experts - 1}, got {expert!r}")

    @contextmanager
    def expert(self, index: int) -> Iterator[DyLoRAMoE]:
        """Inside, every token goes to one expert."""
        self._check_expert(index)
        with self._routing.force(index):
            yield self

    def disable_experts(self):
        """A context in which the mixture is its base model. PEFT's own, but it leaves requires_grad as found."""
        return _bare_base(self)

    @contextmanager
    def watch_usage(self) -> Iterator[DyLoRAMoE]:
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

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As Transformers', without re-entrance: the routing weights reach a layer outside of its arguments."""
        options = {**(gradient_checkpointing_kwargs or {})}
        if options.setdefault("use_reentrant", False):
            raise UsageError("gradient checkpointing of a mixture needs use_reentrant=False")
        kwargs = {key: value for key, value in kwargs.items() if key in ("every_n_layers", "offload") and value}
        if kwargs.get("every_n_layers") == 1:
            del kwargs["every_n_layers"]
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)
        for index, layer in enumerate(decoder_layers(self.base)):
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, RoutedCheckpointing):
                layer._gradient_checkpointing_func = RoutedCheckpointing(self._routing, index, function)

    def gradient_checkpointing_disable(self) -> None:
        self.base.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules())

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters the parts have: "base", "experts" (all), "router"."""
        experts = sum(p.numel() for name, p in self.base.named_parameters() if "lora_" in name)
        base = sum(p.numel() for name, p in self.base.named_parameters() if "lora_" not in name)
        return {"base": base, "experts": experts, "router": self.router.gate.weight.numel()}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's generators start from `seed`; outside they go on as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def untouched(model: DyLoRAMoE) -> Iterator[DyLoRAMoE]:
    """Evaluation without dropout or gradients that leaves mode (of every module) and RNG as found."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _bare_base(model: DyLoRAMoE) -> Iterator[DyLoRAMoE]:
    layers = [(layer, layer._disable_adapters) for _, layer in model.routed_layers()]
    for layer, _ in layers:
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer, disabled in layers:
            layer._disable_adapters = disabled


def fresh_base(base: PreTrainedModel) -> PreTrainedModel:
    """A base model of its own module tree, without experts, whose tensors are those of `base` (shared, not copied)."""
    with init_empty_weights(include_buffers=False):
        fresh = type(base)(copy.deepcopy(base.config))
    donor = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    donor = {name.replace(".base_layer.", "."): tensor for name, tensor in donor.items() if "lora_" not in name}
    for path, module in fresh.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = donor[f"{path}.{name}" if path else name]
    return fresh.eval()


def adapter_parameters(config: PreTrainedConfig, r: int) -> int:
    """The parameters of one expert of rank r with the default targets; nothing is allocated."""
    with init_empty_weights(include_buffers=True):
        base = AutoModelForCausalLM.from_config(config)
    targets = resolve_targets(base, MoELoraConfig(r=r))[0].target_modules
    sizes = [m.weight.shape for n, m in linear_layers(base).items() if any(_matches(n, t) for t in targets)]
    return sum(r * (rows + columns) for rows, columns in sizes)


def resolve_targets(base: PreTrainedModel, config: MoELoraConfig) -> tuple[MoELoraConfig, list[str]]:
    """A copy of the config whose targets are names of linear layers inside the decoder layers.

    Returns:
        The config, and the layers outside that the targets matched and that were left out.

    Raises:
        UsageError: for targets that are not there.
    """
    linear = linear_layers(base)
    inside = {name for layer in decoder_layers(base) for name in _names_of(base, layer) if name in linear}
    leaf = {name.rsplit(".", 1)[-1] for name in inside}
    known = f"the decoder layers have {', '.join(sorted(leaf))}"
    wanted = config.target_modules
    if wanted is None:
        wanted = set(ATTENTION_TARGETS) if leaf.issuperset(ATTENTION_TARGETS) else leaf
    elif wanted == ALL_LINEAR:
        wanted = leaf
    elif isinstance(wanted, str):
        wanted = {name for name in linear if re.fullmatch(wanted, name)} or {wanted}
    unknown = sorted(t for t in wanted if not any(_matches(name, t) for name in linear))
    if unknown:
        raise UsageError(f"no linear layer of {type(base).__name__} is named {', '.join(unknown)}; {known}")
    matched = {name for name in linear if any(_matches(name, target) for target in wanted)}
    outside = sorted(matched - inside)
    targets = {target for target in wanted if any(_matches(name, target) for name in inside)}
    if not targets:
        raise UsageError(f"all targets lie outside the decoder layers ({', '.join(outside[:10])}); {known}")
    excluded = [name for name in outside if any(_matches(name, target) for target in targets)]
    resolved = replace_config(
        config,
        target_modules=sorted(targets),
        exclude_modules=excluded or None,
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in matched & inside),
        base_model_name_or_path=base.config._name_or_path or None,
    )
    return resolved, outside


def linear_layers(base: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of a model by name, wrapped or not."""
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            found[name] = module.get_base_layer()
        elif isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name and not name.endswith(".base_layer"):
            found[name] = module
    return found


def replace_config(config: MoELoraConfig, **changes) -> MoELoraConfig:
    """A copy of the config with changes, and its mapping to routed layers."""
    if isinstance(config.target_modules, set):
        changes.setdefault("target_modules", sorted(config.target_modules))
    if isinstance(config.exclude_modules, set):
        changes.setdefault("exclude_modules", sorted(config.exclude_modules))
    return replace(config, **changes)


def _expert_configs(experts: int | Sequence[MoELoraConfig], lora: MoELoraConfig | None) -> list[MoELoraConfig]:
    if isinstance(experts, (bool, float, str)) or (isinstance(experts, int) and not 1 <= experts <= MAX_EXPERTS):
        raise UsageError(f"the number of experts must be 1 to {MAX_EXPERTS}, got {experts!r}")
    configs = [lora or MoELoraConfig()] * experts if isinstance(experts, int) else list(experts)
    if not 1 <= len(configs) <= MAX_EXPERTS:
        raise UsageError(f"the number of experts must be 1 to {MAX_EXPERTS}, got {len(configs)}")
    _check_dropout(configs)
    return configs


def _check_dropout(configs: Sequence[MoELoraConfig]) -> None:
    """The experts see one dropped input, which is what makes them two matmuls."""
    rates = sorted({config.lora_dropout for config in configs})
    if len(rates) > 1:
        raise UsageError(f"all experts must have the same lora dropout, got {', '.join(map(str, rates))}")


def _names_of(base: nn.Module, layer: nn.Module) -> Iterator[str]:
    prefix = next(name for name, module in base.named_modules() if module is layer)
    return (f"{prefix}.{name}" for name, _ in layer.named_modules() if name)


def _matches(name: str, target: str) -> bool:
    """PEFT's rule for a list of targets."""
    return name == target or name.endswith(f".{target}")


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
