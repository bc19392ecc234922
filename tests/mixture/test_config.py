"""Configs: what is accepted, and the one clear error for what is not."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    JambaConfig,
    Llama4TextConfig,
    Mamba2Config,
    MambaConfig,
    PhimoeConfig,
)

from dylora_moe import DyLoRAMoE, MoELoraConfig, RouterConfig, UsageError
from dylora_moe.mixture.targets import adapter_parameters, resolve_targets

from ..support.tiny import ARCHITECTURES, random_ids, tiny_base

ROOT = Path(__file__).parents[2]
MIXTURE_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "pad_token_id": 0,
}
MAMBA = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
DEEPSEEK = DeepseekV3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
)
STATE_SPACE = {
    "mamba": MAMBA,
    "mamba2": Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8),
    "jamba": JambaConfig(**MIXTURE_SIZES, mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1),
}
TARGETS = {
    "gemma": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "llama": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "qwen2": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gpt_neox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
}


def fingerprint(base):
    return [(name, type(module), module.training) for name, module in base.named_modules()], [
        (name, parameter.requires_grad, parameter._version) for name, parameter in base.named_parameters()
    ]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"r": 0}, "lora r must be a whole number of at least 1, got 0"),
        ({"r": 2.0}, "lora r must be a whole number"),
        ({"r": True}, "lora r must be a whole number"),
        ({"lora_alpha": math.nan}, "lora alpha must be a positive number, got nan"),
        ({"lora_alpha": -1}, "lora alpha must be a positive number"),
        ({"lora_dropout": 1}, "lora dropout must be at least 0 and less than 1, got 1"),
        ({"use_dora": True}, "not supported: use_dora=True"),
        ({"bias": "all"}, "not supported: bias='all'"),
        ({"init_lora_weights": "pissa"}, "not supported: init_lora_weights='pissa'"),
        ({"rank_pattern": {"q_proj": 2}}, "not supported: rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "not supported: modules_to_save"),
    ],
)
def test_an_expert_that_cannot_be_routed_is_refused(options, text):
    with pytest.raises(UsageError, match=text):
        MoELoraConfig(**options)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"temperature": 0}, "router temperature must be a positive number, got 0"),
        ({"temperature": math.inf}, "router temperature"),
        ({"top_k": 0}, "router top_k must be a whole number of at least 1, got 0"),
        ({"top_k": True}, "router top_k"),
        ({"balance_coefficient": -1}, "balance coefficient must be at least 0, got -1"),
    ],
)
def test_router_settings_out_of_range_are_refused(options, text):
    with pytest.raises(UsageError, match=text):
        RouterConfig(**options)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_plain_initialisations_are_accepted(init):
    assert MoELoraConfig(init_lora_weights=init).init_lora_weights is init


@pytest.mark.parametrize(
    "arguments, options, text",
    [
        ((0,), {}, "the number of experts must be 1 to 1024, got 0"),
        ((-1,), {}, "the number of experts must be 1 to 1024, got -1"),
        ((1025,), {}, "the number of experts must be 1 to 1024, got 1025"),
        ((True,), {}, "experts must be a whole number or a list of MoELoraConfig, got True"),
        ((2.5,), {}, "experts must be a whole number or a list of MoELoraConfig, got 2.5"),
        (("2",), {}, "experts must be a whole number"),
        (([],), {}, "the number of experts must be 1 to 1024, got 0"),
        (([LoraConfig()],), {}, "must be a MoELoraConfig, got LoraConfig"),
        ((2,), {"lora": LoraConfig()}, "must be a MoELoraConfig, got LoraConfig"),
        (([MoELoraConfig()],), {"lora": MoELoraConfig()}, "leave lora out"),
        (([MoELoraConfig(), MoELoraConfig(lora_dropout=0.1)],), {}, "the same lora dropout, got 0.05, 0.1"),
        ((2,), {"lora": MoELoraConfig(target_modules=["nose"])}, "is named nose; the decoder layers have down_proj, "),
        ((2,), {"lora": MoELoraConfig(target_modules=["lm_head"])}, r"outside the decoder layers \(lm_head\)"),
        ((2,), {"lora": MoELoraConfig(target_modules=[])}, "no target is left"),
        ((2,), {"lora": MoELoraConfig(target_modules="q_(")}, "neither a name nor a regular expression"),
        ((2,), {"lora": MoELoraConfig(target_modules="embed_tokens")}, "is named embed_tokens"),
        ((2,), {"label_smoothing": 1.0}, "label smoothing must be"),
        ((2,), {"label_smoothing": math.nan}, "label smoothing must be"),
    ],
)
def test_what_cannot_be_built_leaves_the_base_alone(arguments, options, text):
    base = tiny_base()
    before = fingerprint(base)
    with pytest.raises(UsageError, match=text):
        DyLoRAMoE(base, *arguments, **options)
    assert fingerprint(base) == before


def test_a_base_that_has_adapters_or_is_none_is_refused():
    model = DyLoRAMoE(tiny_base(), 2)
    with pytest.raises(UsageError, match="without adapters, got LlamaForCausalLM with LoRA layers in it"):
        DyLoRAMoE(model.base, 2)
    with pytest.raises(UsageError, match="without adapters, got DyLoRAMoE"):
        DyLoRAMoE(model, 2)
    with pytest.raises(UsageError, match="got str"):
        DyLoRAMoE("llama", 2)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_default_targets(kind):
    resolved, notes = resolve_targets(tiny_base(kind), MoELoraConfig())
    assert sorted(resolved.target_modules) == TARGETS[kind]
    assert notes == []


def test_default_targets_are_such_as_peft_takes():
    base = AutoModelForCausalLM.from_config(MAMBA)
    assert sorted(resolve_targets(base, MoELoraConfig())[0].target_modules) == ["in_proj"]
    assert DyLoRAMoE(base, 2).num_experts == 2
    base = AutoModelForCausalLM.from_config(DEEPSEEK)
    expected = ["kv_a_proj_with_mqa", "o_proj", "q_a_proj", "q_b_proj"]
    assert sorted(resolve_targets(base, MoELoraConfig())[0].target_modules) == expected
    generated = DyLoRAMoE(base, 2).generate(random_ids(1, 4) % 64, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)


def without_a_gradient(config, targets):
    """The targets whose experts get no gradient from a loss, and the notes."""
    model = DyLoRAMoE(AutoModelForCausalLM.from_config(config), 2, lora=MoELoraConfig(r=2, target_modules=targets))
    ids = random_ids(1, 9) % 64
    model.train()(ids, labels=ids).loss.backward()
    missing = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.trained_parameters().items() if p.grad is None
    }
    return sorted(missing), model.notes


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("kind", STATE_SPACE)
def test_layers_that_are_read_without_a_call_get_no_experts(kind, targets):
    missing, notes = without_a_gradient(STATE_SPACE[kind], targets)
    assert missing == []
    if targets or kind != "jamba":  # whose default are the projections of its attention
        (note,) = notes
        assert note.startswith(
            "left out of the targets, since a Mamba layer reads their weights without calling them: "
        )


def test_such_layers_are_named_where_they_were_asked_for():
    missing, notes = without_a_gradient(MAMBA, ["in_proj", "dt_proj"])
    assert missing == ["dt_proj"]  # as it would be without a word, and with the default targets, too
    (note,) = notes
    assert note.startswith("experts may have no effect on some of the targets, since") and note.endswith(": dt_proj")


def test_all_linear_of_a_base_with_stacked_experts_is_what_peft_takes():
    missing, _ = without_a_gradient(DEEPSEEK, "all-linear")
    assert missing == []


def test_a_loaded_model_is_no_name():
    with pytest.raises(UsageError, match="A base model is found by a name or path, got LlamaForCausalLM"):
        DyLoRAMoE.from_base(tiny_base())


def test_targets_that_peft_refuses_are_one_clear_error():
    with pytest.raises(UsageError, match=r"PEFT refuses the targets out_proj: .*Mamba.* Give other targets"):
        DyLoRAMoE(AutoModelForCausalLM.from_config(MAMBA), 2, lora=MoELoraConfig(target_modules=["out_proj"]))


def test_a_base_that_was_refused_is_as_it_was():
    base = AutoModelForCausalLM.from_config(MAMBA)
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(UsageError, match="PEFT refuses"):
        DyLoRAMoE(base, 2, lora=MoELoraConfig(target_modules=["x_proj", "out_proj"]))
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert DyLoRAMoE(base, 2).num_experts == 2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_linear_is_what_lies_inside_the_decoder_layers(kind):
    model = DyLoRAMoE(tiny_base(kind), 2, lora=MoELoraConfig(target_modules="all-linear"))
    assert all(".lm_head" not in name and "embed_out" not in name for name, _ in model.routed_layers())
    assert len(list(model.routed_layers())) == 3 * (4 if kind.startswith("gpt") else 7)
    assert model.notes == []


MIXTURES = {
    "llama4": Llama4TextConfig(**MIXTURE_SIZES, intermediate_size_mlp=48, head_dim=8, num_experts_per_tok=1),
    "phimoe": PhimoeConfig(**MIXTURE_SIZES, num_experts_per_tok=2),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_router_of_a_base_is_not_a_linear_layer(kind):
    base = AutoModelForCausalLM.from_config(MIXTURES[kind])
    model, ids = DyLoRAMoE(base, 2, lora=MoELoraConfig(target_modules="all-linear")), random_ids(1, 5) % 64
    model(ids, labels=ids).loss.backward()
    assert any("Router" in type(module).__name__ for module in base.modules())
    assert not any(name.endswith((".router", ".gate")) for name, _ in model.routed_layers())


def test_targets_outside_are_left_out_with_one_note():
    model = DyLoRAMoE(tiny_base(), 3, lora=MoELoraConfig(target_modules=["q_proj", "lm_head"]))
    assert model.notes == ["left out of the targets, since outside the decoder layers: lm_head"]
    assert {name.rsplit(".", 1)[-1] for name, _ in model.routed_layers()} == {"q_proj"}


def test_targets_by_regular_expression_and_exclusion():
    lora = MoELoraConfig(target_modules=r".*\.layers\.[01]\..*q_proj", exclude_modules=["layers.1.self_attn.q_proj"])
    model = DyLoRAMoE(tiny_base(), 2, lora=lora)
    assert [name for name, _ in model.routed_layers()] == ["model.layers.0.self_attn.q_proj"]


def test_parameters_of_an_expert_are_known_beforehand():
    base = tiny_base()
    assert (
        adapter_parameters(base.config, 4) * 2
        == DyLoRAMoE(base, 2, lora=MoELoraConfig(r=4)).parameter_counts()["experts"]
    )


def saved_config() -> str:
    model = DyLoRAMoE(tiny_base("gpt_neox"), 2)
    return json.dumps([[c.to_dict() for c in model.expert_configs], list(model.expert_tensors(1))], default=str)


@pytest.mark.slow
def test_the_saved_config_does_not_change_with_the_hash_seed():
    """That of this process is drawn by chance."""
    code = "from tests.mixture.test_config import saved_config; print(saved_config())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    other = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert other.strip() == saved_config()
    assert json.loads(other)[0][0]["target_modules"] == TARGETS["gpt_neox"]
