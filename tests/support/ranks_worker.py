"""One of two processes: calls train.main once for each scenario of a JSON file, and writes down what came of it.

    torchrun --nproc_per_node 2 ranks_worker.py scenarios.json out/

A scenario is {"argv": [...], "spoil": name or null, "environment": {}}; out/<rank>.json gets a list of {"code", "out",
"err", "saves"}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.distributed.tensor import DTensor

import train
from dylora_moe.checkpoint.write import save_checkpoint
from dylora_moe.errors import UsageError
from dylora_moe.training import checkpoint_callback
from dylora_moe.training.prepare import load_data

RANK = int(os.environ["RANK"])


def stop_rank_1(self, args, state, control, **kwargs):
    if state.global_step == 6 and RANK == 1:
        signal.raise_signal(signal.SIGTERM)


def echoed_ctrl_c(self, args, state, control, **kwargs):
    """What a worker of torchrun hears of one Ctrl-C."""
    if state.global_step == 6:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def drift(self, args, state, control, model=None, **kwargs):
    if state.global_step == 7 and RANK == 1:  # the trunk has ended
        with torch.no_grad():
            next(iter(model.expert_tensors(1).values()))[0, 0] += 1e-7


def count_shards(self, args, state, control, model=None, **kwargs):
    """Says in how many numbers each part of the mixture is here."""
    if state.global_step == 6:
        here = list(model.parameters())
        parts = [parameter for parameter in here if isinstance(parameter, DTensor)]
        counts = {
            "sharded": sum(part.numel() for part in parts),
            "held": sum(part.to_local().numel() for part in parts),
            "whole": sum(parameter.numel() for parameter in here if not isinstance(parameter, DTensor)),
            "base": model.parameter_counts()["base"],
            "trained": sum(parameter.numel() for parameter in model.trained_parameters().values()),
            "router": model.parameter_counts()["router"],
        }
        print("counted:", json.dumps(counts))


def router_drift(self, args, state, control, model=None, **kwargs):
    if state.global_step == 5 and RANK == 1:
        with torch.no_grad():
            weight = model.router.gate.weight
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))


def nan_on_rank_1(self, args, state, control, model=None, **kwargs):
    """Just before it is saved."""
    if state.global_step == 8 and RANK == 1:
        with torch.no_grad():
            model.router.gate.weight[0, 0] = float("nan")


def no_rng_state():
    if RANK == 1:
        raise UsageError("the generators cannot be read here")
    return rng_state()


def full_disk(folder, *args, **kwargs):
    (folder / "router.safetensors").write_bytes(b"half")
    raise OSError(28, "No space left on device", str(folder / "router.safetensors"))


def no_data(*args):
    if RANK == 1:
        raise UsageError("the data cannot be read here")
    return load_data(*args)


rng_state = checkpoint_callback.rng_state
SPOILERS = {
    "stop": (train.PeftCheckpointCallback, "on_step_begin", stop_rank_1),
    "ctrl-c": (train.PeftCheckpointCallback, "on_step_begin", echoed_ctrl_c),
    "drift": (train.PeftCheckpointCallback, "on_step_begin", drift),
    "count shards": (train.PeftCheckpointCallback, "on_step_begin", count_shards),
    "router drift": (train.PeftCheckpointCallback, "on_step_begin", router_drift),
    "NaN on rank 1": (train.PeftCheckpointCallback, "on_step_end", nan_on_rank_1),
    "no generators on rank 1": (checkpoint_callback, "rng_state", no_rng_state),
    "full disk": ("dylora_moe.checkpoint.write", "write_files", full_disk),
    "no data on rank 1": ("dylora_moe.training.prepare", "load_data", no_data),
}


def main() -> None:
    scenarios, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = []
    for scenario in scenarios:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, scenario.get("environment", {})))
            spoil = scenario.get("spoil")
            if spoil:
                where, name, replacement = SPOILERS[spoil]
                patch = mock.patch if isinstance(where, str) else mock.patch.object
                target = (f"{where}.{name}",) if isinstance(where, str) else (where, name)
                stack.enter_context(patch(*target, replacement))
            counted = stack.enter_context(
                mock.patch("dylora_moe.training.checkpoint_callback.save_checkpoint", wraps=save_checkpoint)
            )
            said, complained = io.StringIO(), io.StringIO()
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(complained))
            code = train.main(scenario["argv"])
        texts = {"out": said.getvalue(), "err": complained.getvalue()}
        results.append({"code": code, "saves": counted.call_count, **texts})
    (out / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
