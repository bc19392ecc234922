"""What a launcher may ask of FSDP, and what of sharding shows in one process; two are in test_distributed.py."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from dylora_moe import DyLoRAMoE
from dylora_moe.distributed import sharding
from dylora_moe.errors import UsageError

from ..support.runs import arguments
from ..support.tiny import tiny_base
from ..training.test_trainer import trainer

CPU = torch.device("cpu")


@pytest.fixture
def launched(monkeypatch):
    """Puts into the environment what `accelerate launch` would."""

    def put(version: str | None = "2", **settings: str) -> None:
        variables = {"ACCELERATE_USE_FSDP": "true", **settings} | ({} if version is None else {"FSDP_VERSION": version})
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


# ---- what the launcher asks for ----


def test_without_fsdp_nothing_is_asked_for(monkeypatch):
    with sharding.requested() as how:
        assert how is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    with sharding.requested() as how:
        assert how is None
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"


def test_what_is_asked_for_is_hidden_from_accelerate_meanwhile(launched):
    # What `accelerate launch` sets, whether or not it was told.
    launched(FSDP_SHARDING_STRATEGY="FULL_SHARD", FSDP_OFFLOAD_PARAMS="false", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    with pytest.raises(KeyError, match="a bug"), sharding.requested() as how:
        assert how == sharding.Sharding()
        assert "ACCELERATE_USE_FSDP" not in os.environ
        raise KeyError("a bug")
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_how_to_shard_is_read(launched):
    launched(FSDP_RESHARD_AFTER_FORWARD="False", FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer, OtherLayer")
    with sharding.requested() as how:
        assert how == sharding.Sharding(reshard_after_forward=False, layers=("LlamaDecoderLayer", "OtherLayer"))


@pytest.mark.parametrize("version", ["1", None])
def test_fsdp1_is_refused(launched, tmp_path, capsys, version):
    launched(version, FSDP_RESHARD_AFTER_FORWARD="FULL_SHARD")
    words = arguments(tmp_path / "run")
    capsys.readouterr()
    assert train.main(words) == 2
    assert capsys.readouterr().err.startswith("train.py: FSDP version 1 is not supported, FSDP2 is: accelerate launch")
    assert not (tmp_path / "run").exists()


def test_every_setting_that_is_not_supported_is_named(launched):
    launched(
        FSDP_OFFLOAD_PARAMS="true",
        FSDP_FORWARD_PREFETCH="true",
        FSDP_ACTIVATION_CHECKPOINTING="true",
        FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD="true",
        FSDP_AUTO_WRAP_POLICY="NO_WRAP",
        FSDP_IGNORED_MODULES="lm_head",
        FSDP_RESHARD_AFTER_FORWARD="FULL_SHARD",
    )
    with pytest.raises(UsageError, match="these settings of FSDP are not supported") as error, sharding.requested():
        pass
    names = [line.split()[1].rstrip(":") for line in str(error.value).splitlines()[1:]]
    assert names == [
        "--fsdp_offload_params", "--fsdp_forward_prefetch", "--fsdp_activation_checkpointing",
        "--fsdp_activation_checkpointing_offload", "--fsdp_auto_wrap_policy", "--fsdp_ignored_modules",
        "--fsdp_reshard_after_forward",
    ]  # fmt: skip


# ---- doing it ----


def test_other_layers_than_the_decoders_are_refused():
    model = DyLoRAMoE(tiny_base(), 2)
    with pytest.raises(UsageError, match="OtherLayer: the base's decoder layers are of LlamaDecoderLayer"):
        sharding.shard(model, CPU, sharding.Sharding(layers=("OtherLayer",)))
    assert (
        sharding.shard(model, CPU, sharding.Sharding(layers=("LlamaDecoderLayer",)))
        == "FSDP2: one process has the whole base"
    )
    assert not model.sharded


def test_experts_that_are_not_trained_are_whole_too():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        model = DyLoRAMoE(tiny_base(), 3)
        model.train_only([1])
        assert sharding.shard(model, CPU, sharding.Sharding()).startswith("FSDP2: each of 2 processes keeps ")
        experts = [tensor for index in range(3) for tensor in model.expert_tensors(index).values()]
        assert not any(isinstance(tensor, DTensor) for tensor in [*experts, *model.router.parameters()])
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def test_a_quantized_base_is_refused():
    model = DyLoRAMoE(tiny_base(), 2)
    model.base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UsageError, match="FSDP2 does not shard a quantized base model"):
        sharding.shard(model, CPU, sharding.Sharding())


def test_one_process_trains_with_the_whole_base(launched, tmp_path, capsys):
    launched()
    assert train.main(arguments(tmp_path / "run", steps=1)) == 0
    assert "FSDP2: one process has the whole base" in capsys.readouterr().out


def test_accelerate_may_not_shard(launched, tmp_path):
    launched()
    with pytest.raises(UsageError, match="Accelerate would shard or wrap the experts with the base"):
        trainer(tmp_path / "run").train()


@pytest.mark.parametrize("rows", [1, 4, 5, 7, 8])
def test_every_rank_evaluates_as_many_batches(tmp_path, monkeypatch, rows):
    mine = trainer(tmp_path / "run", per_device_eval_batch_size=2)
    data = mine.eval_dataset["a"][:rows]
    labelled: list[list[int]] = []  # of each rank, the labelled rows of its batches
    for rank in range(3):
        monkeypatch.setattr("dylora_moe.distributed.ranks.world", lambda rank=rank: (rank, 3))
        labelled.append([int((batch["labels"] != -100).any(1).sum()) for batch in mine.evaluation().own_batches(data)])
    own = [len(range(rank, rows, 3)) for rank in range(3)]
    assert [sum(batches) for batches in labelled] == own
    assert {len(batches) for batches in labelled} == {-(-own[0] // 2)}
