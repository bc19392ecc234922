"""The experts on a base model: how PEFT puts them on its layers, and how far each is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..constants import EXPERT_PREFIX, IMMATURE, MATURE, NEW, STATES
from ..errors import UsageError, listed
from .config import MoELoraConfig
from .expert_matrices import Unchanged, Watch, weight_of
from .forward_pass import Groups
from .routed_linear import RoutedLinear

ROUTER = "router."  # begins the names of its parameters in a mixture
EXPERT_PARAMETER = re.compile(rf"\.lora_[AB]\.({EXPERT_PREFIX}\d+)\.weight$")


class Injector:
    """Puts experts on the linear layers of a base model, which PEFT wraps in place.

    Args:
        base: the base model, without adapters.
    """

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._layers: dict[str, list[RoutedLinear]] = {}  # by the expert that is on them
        self._places: list[tuple[nn.Module, str, RoutedLinear]] = []  # each of them, in its parent by its name there
        self.peft_model: Any = None  # a PeftModelForCausalLM from the first expert on

    def add(self, name: str, config: MoELoraConfig) -> list[RoutedLinear]:
        """Add one expert, with parameters in float32 on the base's device (CPU for meta), and return its layers."""
        twin = self._twin(config)
        layers = self._inject(name, config) if twin is None else self._inject_beside(twin, name, config)
        for layer in layers:
            device = weight_of(layer.get_base_layer()).device
            device = torch.device("cpu") if device.type == "meta" else device
            for linear in (layer.lora_A[name], layer.lora_B[name]):
                linear.weight = nn.Parameter(torch.empty(weight_of(linear).shape, dtype=torch.float32, device=device))
            layer.reset_lora_parameters(name, config.init_lora_weights)
        self._layers[name] = layers
        if twin is None:
            self._places = [
                (parent, leaf, layer)
                for parent in self._base.modules()
                for leaf, layer in parent.named_children()
                if isinstance(layer, RoutedLinear)
            ]
        return layers

    def check(self, training: bool = False) -> None:
        """Check that the PEFT model is as the mixture has made it. This costs as much as a few small operations.

        Args:
            training: whether the experts are to be trained; PEFT's `disable_adapter` may be in use otherwise.

        Raises:
            UsageError: if it was changed otherwise than through the mixture, in a way that changes what is computed or
                saved.
        """
        if torch.compiler.is_compiling():
            return
        there, known = self.peft_model.peft_config.keys(), self._layers.keys()
        problems = []
        if there - known:
            problems.append(f"it has other adapters ({', '.join(sorted(there - known))}): delete_adapter removes them")
        if known - there:
            problems.append(f"experts were deleted from it ({', '.join(sorted(known - there))}): load them again")
        if any(parent._modules.get(leaf) is not layer for parent, leaf, layer in self._places):
            problems.append("experts were unloaded from it, or merged into the base model: load both again")
        if any(layer.merged_adapters for _, _, layer in self._places):
            problems.append("experts are merged into the base model: unmerge_adapter() takes them out again")
        if training and any(layer._disable_adapters for _, _, layer in self._places):
            problems.append("its adapters are disabled: enable_adapter_layers() enables them")
        if problems:
            raise UsageError(f"the PEFT model of this mixture was changed behind it:\n{listed(problems)}")

    def _inject(self, name: str, config: MoELoraConfig) -> list[RoutedLinear]:
        """Let PEFT find the layers for the config's targets and put an expert on them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT uses a deprecated name of Transformers
            try:
                if self.peft_model is None:
                    self.peft_model = PeftModelForCausalLM(
                        self._base, config, adapter_name=name, low_cpu_mem_usage=True
                    )
                else:
                    self.peft_model.add_adapter(name, config, low_cpu_mem_usage=True)
            except ValueError as error:
                targets = ", ".join(sorted(config.target_modules or ()))
                raise UsageError(f"PEFT refuses the targets {targets}: {error} Give other targets.") from error
        layers = []
        for path, module in self._base.named_modules():
            if not isinstance(module, LoraLayer) or name not in module.lora_A:
                continue
            if not isinstance(module, RoutedLinear):
                raise UsageError(
                    f"{path} ({type(module.get_base_layer()).__name__}) cannot be routed: experts go on nn.Linear and "
                    "Conv1D layers only; leave it out of the targets"
                )
            layers.append(module)
        if not layers:
            name = type(self._base).__name__
            raise UsageError(f"no linear layer of {name} matches the targets {config.target_modules}")
        return layers

    def _inject_beside(self, twin: str, name: str, config: MoELoraConfig) -> list[RoutedLinear]:
        """Do what PEFT does for an adapter whose layers are wrapped already.

        PEFT would first walk over all modules several times, and every expert brings more of them: a thousand experts
        would take hours.
        """
        self.peft_model.peft_config[name] = config
        with init_empty_weights():
            for layer in self._layers[twin]:
                layer.add_adapter(name, config)
        return self._layers[twin]

    def _twin(self, config: MoELoraConfig) -> str | None:
        """An expert that is on the layers which this config targets."""
        for name in self._layers:
            other = self.peft_model.peft_config[name]
            if (other.target_modules, other.exclude_modules) == (config.target_modules, config.exclude_modules):
                return name
        return None


class ExpertStates:
    """The states of a mixture's experts.

    - new: created, never trained. This shows in the tensors: its B is still all zero.
    - immature: trained, but the run that does it has not finished.
    - mature: marked so.

    Args:
        watch: tells whether the tensors have changed.
    """

    def __init__(self, watch: Watch):
        self._watch = watch
        self._mature: list[bool] = []
        self._b: list[list[nn.Module]] = []  # the linear layers that hold an expert's B
        self._untrained: set[int] = set()  # the experts whose B was all zero when last read
        self._read: Unchanged | None = None  # what has not changed since

    def __len__(self) -> int:
        return len(self._mature)

    def add(self, b: list[nn.Module]) -> None:
        """One more expert, whose B matrices (d_out, r) are the weights of these modules."""
        self._untrained.add(len(self))
        self._mature.append(False)
        self._b.append(b)

    def states(self) -> list[str]:
        new = self.new(self._watch.look())
        return [NEW if i in new else MATURE if mature else IMMATURE for i, mature in enumerate(self._mature)]

    def set(self, states: Sequence[str]) -> None:
        """Take over the states of a checkpoint; whether an expert is new shows in its tensors."""
        unknown = sorted({str(state) for state in states} - set(STATES))
        if unknown or len(states) != len(self):
            raise UsageError(f"expected {len(self)} states of {', '.join(STATES)}, got {list(states)}")
        self._mature = [state == MATURE for state in states]
        self.forget()

    def mark_mature(self, experts: Sequence[int]) -> None:
        """Mark experts as mature; a new one stays new, since the run has left it as it was."""
        outside = [index for index in experts if not 0 <= index < len(self)]
        if outside:
            raise UsageError(f"there is no expert {outside[0]}, only 0 to {len(self) - 1}")
        new = self.new(self._watch.look())
        for index in experts:
            self._mature[index] = index not in new

    def mark_immature(self, experts: Iterable[int]) -> None:
        for index in experts:
            self._mature[index] = False

    def routed(self, unchanged: Unchanged | None) -> tuple[Groups, bool]:
        """Return the experts that are routed over, and whether those that were trained are all mature."""
        new = self.new(unchanged)
        trained = tuple(i for i in range(len(self)) if i not in new)
        groups = tuple(group for group in (trained, new) if group)
        return groups, bool(trained) and all(self._mature[i] for i in trained)

    def forget(self) -> None:
        """Read all tensors again the next time: an expert that was trained may have been reset."""
        self._untrained, self._read = set(range(len(self))), None

    def new(self, unchanged: Unchanged | None) -> tuple[int, ...]:
        """Return the experts whose B is still all zero.

        Tensors are read again only if they may have changed, and those of an expert that has been trained not at all.

        Args:
            unchanged: what the watch has returned.
        """
        if unchanged is None or unchanged is not self._read:
            self._untrained = {index for index in self._untrained if self._is_zero(index)}
            self._read = unchanged
        return tuple(sorted(self._untrained))

    def _is_zero(self, index: int) -> bool:
        weights = [weight_of(module) for module in self._b[index]]
        return not any(bool(weight.any()) for weight in weights if not weight.is_meta)


def check_expert(expert: int | None, num_experts: int) -> None:
    """Raise UsageError for what is neither None nor the index of an expert."""
    whole = isinstance(expert, int) and not isinstance(expert, bool)
    if expert is not None and not (whole and 0 <= expert < num_experts):
        raise UsageError(f"expert must be None or 0 to {num_experts - 1}, got {expert!r}")


def checked_rows(experts: Sequence[int], batch: torch.Tensor | None, num_experts: int) -> tuple[int, ...]:
    """Return the experts of the rows of a batch; raise UsageError if they do not fit it."""
    if batch is None:
        raise UsageError("one of input_ids and inputs_embeds is needed, got neither")
    for expert in experts:
        check_expert(-1 if expert is None else expert, num_experts)
    if len(experts) != len(batch):
        raise UsageError(f"expert names {len(experts)} experts for the {len(batch)} rows of the batch: one for each")
    return tuple(experts)


def check_optimizer(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Raise UsageError for trained parameters that are frozen or not in the optimizer, and for others that it holds."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in trained.values()}
    foreign = [name for name, p in model.named_parameters() if id(p) in known - own and not name.startswith(ROUTER)]
    if foreign:
        raise UsageError(
            f"this training would change the base model, which is frozen; the optimizer holds:\n{listed(foreign)}\n"
            "Build it from trained_parameters().values()."
        )
    problems = {}  # in the order of the experts, the router last
    for name, parameter in trained.items():
        expert = EXPERT_PARAMETER.search(name)
        owner = (0, int(expert[1].removeprefix(EXPERT_PREFIX)), expert[1]) if expert else (1, 0, "router")
        if not parameter.requires_grad:
            problems[owner] = f"{owner[-1]} is frozen (requires_grad is False)"
        elif id(parameter) not in known:
            problems.setdefault(owner, f"{owner[-1]} has parameters that the optimizer does not hold")
    if problems:
        texts = [problems[owner] for owner in sorted(problems)]
        raise UsageError(
            f"this training would not move every part of the mixture:\n{listed(texts)}\n"
            "Call train_all_experts(), and then build the optimizer from trained_parameters().values()."
        )
