"""What the mixture should compute, by the book: loops over tokens and experts in float64, with none of its layers.

    s_t = decay s_{t-1} + gate(h_t / rms(h_t))       n_t = decay n_{t-1} + 1       h_t: input embedding; t = 1, 2, ...
    weights_t = softmax(s_t / (n_t + prior_tokens) / temperature + prior), or the top-k of them, renormalised
    y = W x + sum_i weights_i * (alpha / r) * B_i A_i x

`value_difference` holds each routed layer against it for the input that it saw, in any dtype. `gradient_difference`
runs a whole float64 twin of the model and compares the gradients of all experts and of the router.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import fresh_base, untouched

RMS_EPSILON = 1e-6
NEAR_TIE = 1e-4  # where the last logit kept and the first left out are closer, rounding decides the choice
VALUE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


def routing_weights(model: DyLoRAMoE, input_ids: torch.Tensor, router: dict[str, torch.Tensor], sparse: bool) -> tuple:
    """input_ids (B, T) without padding; router: its parameters by name, in float64.

    Returns (weights (B, T, N), bool (B, T): which tokens' top-k is beyond doubt).
    """
    config = model.router.config
    if model.num_experts == 1:
        one = torch.ones(*input_ids.shape, 1, dtype=torch.float64, device=input_ids.device)
        return one, one[..., 0] > 0
    hidden = model.get_input_embeddings()(input_ids).double()  # (B, T, D)
    x = hidden / (hidden.square().mean(-1, keepdim=True) + RMS_EPSILON).sqrt()
    seen = x @ router["gate.weight"].T + router["gate.bias"]  # (B, T, N)
    sums, count, rows = torch.zeros_like(seen[:, 0]), 0.0, []
    for t in range(seen.shape[1]):
        if t > 0:
            sums, count = config.decay * sums + seen[:, t], config.decay * count + 1
        rows.append(sums / (count + config.prior_tokens) / config.temperature + router["prior"])
    logits = torch.stack(rows, 1)  # (B, T, N)
    clear = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    count = config.experts_per_token(logits.shape[-1])
    if sparse and count < logits.shape[-1]:
        top = logits.sort(-1, descending=True).values  # (B, T, N)
        clear = top[..., count - 1] - top[..., count] > NEAR_TIE
        logits = logits.masked_fill(logits < top[..., count - 1 : count], float("-inf"))
    return logits.softmax(-1), clear


# ---- values, layer by layer ----


@torch.no_grad()
def value_difference(model: DyLoRAMoE, input_ids: torch.Tensor, sparse: bool) -> float:
    """The largest |y - loop's y| / max |loop's y| of all routed layers; infinite where a layer was not run."""
    seen = _seen(model, input_ids)
    router = {name: parameter.double() for name, parameter in model.router.named_parameters()}
    weights, clear = routing_weights(model, input_ids, router, sparse)
    if clear.float().mean() < 0.9:
        return float("inf")  # too little is left to compare
    worst = 0.0
    for name, layer in model.routed_layers():
        if name not in seen:
            return float("inf")
        x, y = seen[name]
        expected = _loop(layer.get_base_layer(), x, _experts_of(layer), weights)
        off = ((y - expected).abs().amax(-1) * clear).max() / expected.abs().max()
        worst = max(worst, off.item()) if off == off else float("inf")
    return worst


def _loop(base_layer, x: torch.Tensor, experts: list, weights: torch.Tensor) -> torch.Tensor:
    """x (B, T, d_in), weights (B, T, N) -> (B, T, d_out), all float64."""
    bias = base_layer.bias
    y = F.linear(x, base_layer.weight.double(), None if bias is None else bias.double())
    for index, (a, b, scaling) in enumerate(experts):
        y = y + weights[..., index : index + 1] * scaling * (x @ a.double().T @ b.double().T)
    return y


def _experts_of(layer) -> list[tuple]:
    """(A (r, d_in), B (d_out, r), scaling) of each expert, in their order."""
    names = sorted(layer.lora_A, key=lambda name: int(name.rpartition("_")[2]))
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]


def _seen(model: DyLoRAMoE, input_ids: torch.Tensor) -> dict[str, tuple]:
    """In float64: (input, output) of each routed layer by name."""
    seen: dict[str, tuple] = {}

    def layer_hook(name):
        return lambda module, args, output: seen.update({name: (args[0].double(), output.double())})

    handles = [layer.register_forward_hook(layer_hook(name)) for name, layer in model.routed_layers()]
    try:
        with untouched(model):
            model(input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ---- gradients, end to end ----


def gradient_difference(model: DyLoRAMoE, input_ids: torch.Tensor) -> dict[str, float]:
    """|g - loop's g| / |loop's g| of the language-modelling loss, in norm, for "experts" and "router".

    All experts take part, without dropout.

    The model's own gradients are None afterwards.
    """
    training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    model(input_ids, labels=input_ids).lm_loss.backward()
    found = {name: p.grad.detach().double() for name, p in _trained(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.train(training)
    wanted = _loop_gradients(model, input_ids)
    if found.keys() != wanted.keys():
        return {"experts": float("inf"), "router": float("inf")}
    of_router = [name for name in wanted if name in dict(model.router.named_parameters())]
    parts = {"experts": [name for name in wanted if name not in of_router], "router": of_router}
    return {part: _relative(found, wanted, names) for part, names in parts.items() if names}


def _relative(found: dict, wanted: dict, names: list[str]) -> float:
    off = sum((found[name] - wanted[name]).square().sum().item() for name in names)
    size = sum(wanted[name].square().sum().item() for name in names)
    return (off / size) ** 0.5 if size else float("inf")


def _trained(model: DyLoRAMoE) -> dict[str, torch.nn.Parameter]:
    tensors = dict(model.router.named_parameters()) if model.num_experts > 1 else {}
    for name, layer in model.routed_layers():
        for index, (a, b, _) in enumerate(_experts_of(layer)):
            tensors |= {f"{name}.{index}.A": a, f"{name}.{index}.B": b}
    return tensors


def _loop_gradients(model: DyLoRAMoE, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {name: p.detach().double().requires_grad_() for name, p in _trained(model).items()}
    twin = copy.deepcopy(fresh_base(model.base)).double().requires_grad_(False)
    weights = routing_weights(model, input_ids, leaves, sparse=False)[0]
    with _looping(twin, model, leaves, weights):
        logits = twin(input_ids, use_cache=False).logits  # (B, T, vocabulary)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


@contextmanager
def _looping(twin, model: DyLoRAMoE, leaves: dict[str, torch.Tensor], weights: torch.Tensor) -> Iterator[None]:
    """Hooks that make `twin`, a bare base, compute the mixture whose float64 tensors are `leaves`."""
    modules = dict(twin.named_modules())

    def add(name, scalings):
        def hook(module, args, output):
            for index, scaling in enumerate(scalings):
                a, b = leaves[f"{name}.{index}.A"], leaves[f"{name}.{index}.B"]
                output = output + weights[..., index : index + 1] * scaling * (args[0] @ a.T @ b.T)
            return output

        return hook

    handles = []
    for name, layer in model.routed_layers():
        scalings = [scaling for _, _, scaling in _experts_of(layer)]
        handles.append(modules[name].register_forward_hook(add(name, scalings)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
