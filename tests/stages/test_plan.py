"""Which block trains which expert: the order of the blocks, the trunk, and what a run with a plan changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from dylora_moe import DyLoRAMoE, MoELoraConfig
from dylora_moe.base.preserve import seeded
from dylora_moe.errors import UsageError
from dylora_moe.stages.batches import BlockCollator
from dylora_moe.stages.plan import Plan, PlannedBlocks, branch_after, copy_expert, steps_of
from dylora_moe.training.checkpoint_callback import PeftCheckpointCallback
from dylora_moe.training.trainer import MoETrainer

from ..support.runs import assert_same, states, steps
from ..support.tiny import random_ids, tiny_base, tiny_mixture

EXPERTS = (0, 1, 2)


def blocks(number: int = 30, length: int = 12) -> Dataset:
    """The source of block i is i % 3."""
    ids = random_ids(number, length).tolist()
    columns = {"input_ids": ids, "labels": ids, "position_ids": [list(range(length))] * number}
    return Dataset.from_dict(columns | {"source": [i % 3 for i in range(number)]})


def planned(plan: Plan, rows: int = 4, micro_batches: int = 1, number: int = 30) -> PlannedBlocks:
    return PlannedBlocks(blocks(number), plan, rows, micro_batches, seed=0)


# ---- the order ----


def test_each_micro_batch_has_one_expert_and_every_block_comes_once_a_pass():
    data = planned(Plan(0, 3, 30, EXPERTS))
    assert len(data) == 30 * 4
    by_batch = data.experts.reshape(30, 4)
    assert (by_batch == by_batch[:, :1]).all()
    assert (by_batch[:3] == 0).all() and set(by_batch[3:, 0]) == {0, 1, 2}  # the trunk, then every skill
    own = np.asarray(data.blocks["source"])[data.order]
    assert set(own[:12]) == {0, 1, 2} and (own[12:] == data.experts[12:]).all()
    counts = np.bincount(data.order, minlength=30)
    assert counts.sum() == 120 and counts.max() - counts.min() <= 2
    assert (
        data[15]["expert"] == data.experts[15]
        and data[15]["input_ids"] == data.blocks[int(data.order[15])]["input_ids"]
    )


def test_a_longer_run_begins_in_the_same_order():
    short, long = planned(Plan(0, 3, 10, EXPERTS)), planned(Plan(0, 3, 20, EXPERTS))
    assert (long.order[:40] == short.order).all() and (long.experts[:40] == short.experts).all()
    assert (planned(Plan(0, None, 10, EXPERTS)).order != short.order).any()  # without a trunk it is another one


def test_steps_before_the_run_have_their_places():
    later = planned(Plan(7, None, 10, EXPERTS), micro_batches=2)
    assert len(later) == 10 * 2 * 4 and (later.order[: 7 * 8] == 0).all()
    first = planned(Plan(0, None, 3, EXPERTS), micro_batches=2)
    assert (later.order[7 * 8 :] == first.order).all()


def test_the_number_of_steps():
    assert [steps_of(30, epochs, 4, 2) for epochs in (1, 2, 0.01)] == [4, 8, 1]
    assert [branch_after(*arguments) for arguments in [(3, 100), (1, 100), (3, 1), (2, 2)]] == [50, None, None, 1]


# ---- copies ----


def test_a_copy_has_the_tensors_and_moments_of_its_own():
    model = tiny_mixture(experts=2)
    optimizer = torch.optim.AdamW(model.trained_parameters().values())
    ids = random_ids(2, 8)
    model.train()(input_ids=ids, labels=ids, expert=0).loss.backward()
    optimizer.step()
    copy_expert(model, 0, 1, optimizer)
    there, here = model.expert_tensors(0), model.expert_tensors(1)
    assert all(torch.equal(there[name], here[name]) and there[name] is not here[name] for name in there)
    for name, tensor in here.items():
        state = optimizer.state[tensor]
        assert torch.equal(state["exp_avg"], optimizer.state[there[name]]["exp_avg"])
        assert state["exp_avg"].data_ptr() != optimizer.state[there[name]]["exp_avg"].data_ptr()


def test_a_copy_of_another_shape_is_refused():
    model = tiny_mixture(experts=[MoELoraConfig(r=4), MoELoraConfig(r=2)])
    with pytest.raises(UsageError, match="expert_1 cannot begin as a copy of expert_0"):
        copy_expert(model, 0, 1)


# ---- a run with a plan ----


def trainer(folder: Path, plan: Plan, **settings) -> MoETrainer:
    options = {"max_steps": plan.last_step, "save_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    quiet = {"use_cpu": True, "remove_unused_columns": False, "label_names": ["labels"], "report_to": "none"}
    with seeded(0):
        model = DyLoRAMoE(tiny_base(), 3)
    return MoETrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options | quiet | settings),
        train_dataset=planned(plan),
        data_collator=BlockCollator(),
        callbacks=[PeftCheckpointCallback()],
        start_step=plan.first_step,
    )


def experts_of(model: DyLoRAMoE) -> list[torch.Tensor]:
    return [torch.cat([t.detach().flatten() for t in model.expert_tensors(i).values()]) for i in range(3)]


def test_the_trunk_is_trained_alone_and_then_every_expert_begins_as_its_copy(tmp_path):
    run = trainer(tmp_path, Plan(0, 6, 12, EXPERTS), save_steps=6)
    router = {name: tensor.clone() for name, tensor in run.mixture.router.state_dict().items()}
    run.train()
    trunk = DyLoRAMoE.from_checkpoint(tmp_path / "checkpoint-6", base=tiny_base())
    assert trunk.expert_states == ["immature", "new", "new"]  # saved before the copies are made
    assert states(tmp_path / "checkpoint-12") == ["mature"] * 3
    of_trunk, ended = experts_of(trunk)[0], experts_of(run.mixture)
    apart = [(of_trunk - expert).norm() for expert in ended]
    assert all(0 < distance < 0.5 * of_trunk.norm() for distance in apart)
    assert not torch.equal(ended[0], ended[1]) and not torch.equal(ended[1], ended[2])
    assert all(torch.equal(tensor, router[name]) for name, tensor in run.mixture.router.state_dict().items())


@pytest.mark.parametrize("stop", [3, 6, 9])  # in the trunk, at the branch, behind it
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, stop):
    plan = Plan(0, 6, 12, EXPERTS)
    trainer(tmp_path / "through", plan).train()
    resumed = trainer(tmp_path / "resumed", plan)
    (tmp_path / "through" / f"checkpoint-{stop}").rename(tmp_path / "resumed" / f"checkpoint-{stop}")
    resumed.train(resume_from_checkpoint=True)
    assert_same(tmp_path / "through" / "checkpoint-12", tmp_path / "resumed" / "checkpoint-12")


def test_a_plan_for_one_expert_leaves_the_others_as_they_are(tmp_path):
    run = trainer(tmp_path, Plan(5, None, 9, (2, 2, 2)))
    before = [expert.clone() for expert in experts_of(run.mixture)]
    run.train()
    assert run.state.global_step == 9 and steps(tmp_path) == [6, 9]
    after = experts_of(run.mixture)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert run.lr_scheduler.get_last_lr() == [0.0]  # the schedule ends with the run, though it began at step 5
    assert states(tmp_path / "checkpoint-6") == ["new", "new", "immature"]


def test_the_schedule_begins_where_the_run_begins(tmp_path):
    rates = {}
    for first in (0, 5):
        run = trainer(tmp_path / str(first), Plan(first, None, first + 4, EXPERTS), logging_steps=1)
        run.train()
        rates[first] = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates[0] == rates[5] and len(rates[0]) == 4
