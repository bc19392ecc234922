"""Documents of a batch do not see each other, whether they share a block or have one each."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dylora_moe.data.packing import COLUMNS
from dylora_moe.stages.batches import BlockCollator, known_tokens, why_not_packed

from ..support.data import BLOCK, EOS, PAD, blocks_of, write_rows

CONFIGS = {
    "gemma": GemmaConfig(head_dim=8, num_key_value_heads=1, num_attention_heads=2),
    "llama": LlamaConfig(num_key_value_heads=1, num_attention_heads=2),
    "qwen2": Qwen2Config(
        num_key_value_heads=1, num_attention_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "mistral": MistralConfig(num_key_value_heads=1, num_attention_heads=2, sliding_window=5),
    "gpt2": GPT2Config(n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gpt_neox": GPTNeoXConfig(num_attention_heads=2),
}


# Of these, documents that share a block see each other. Their layers are of every kind.
LEAKING = {
    "opt": OPTConfig(word_embed_proj_dim=16, ffn_dim=32, num_attention_heads=2, dropout=0.0),
    "bloom": BloomConfig(n_head=2),
    "falcon": FalconConfig(num_attention_heads=2, ffn_hidden_size=32, alibi=True),
    "mpt": MptConfig(n_heads=2, max_seq_len=64),
    "gpt_oss": GptOssConfig(
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mamba": MambaConfig(state_size=4),
    "jamba": JambaConfig(
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    "lfm2": Lfm2Config(
        num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, layer_types=["conv", "full_attention"]
    ),
    "qwen3_next": Qwen3NextConfig(
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=0,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    ),
}


def tiny_model(name, attention=None):
    config = copy.deepcopy((CONFIGS | LEAKING)[name])
    config.update({"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2})
    config.update({"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # else attention is too weak to show a leak
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def largest_difference(model, batch):
    """Between the logits of each document in its block and of the document alone."""
    packed, worst = model(**batch).logits, 0.0
    for row, positions in enumerate(batch["position_ids"]):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
        for start, end in pairwise(starts):
            alone = model(input_ids=batch["input_ids"][row : row + 1, start:end], use_cache=False).logits[0]
            worst = max(worst, (packed[row, start:end] - alone).abs().max().item())
    return worst


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For models this small more threads only wait for each other, on a busy machine for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"text": f"document {i}" + "." * (i % 9)} for i in range(40)]
    return write_rows(tmp_path_factory.mktemp("data") / "a.jsonl", rows)


@pytest.fixture(scope="module")
def batch(data):
    return next(iter(DataLoader(blocks_of(data).train, batch_size=3, collate_fn=BlockCollator())))


@pytest.fixture(scope="module")
def padded(data):
    return next(iter(DataLoader(blocks_of(data, packed=False).train, batch_size=4, collate_fn=BlockCollator())))


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_of_a_block_do_not_see_each_other(name, attention, mode, batch):
    model = tiny_model(name, attention).train(mode != "eval")
    if mode == "checkpointing":
        model.gradient_checkpointing_enable()
    assert (batch["position_ids"] == 0).sum() >= 3 * len(batch["position_ids"])
    assert largest_difference(model, batch) <= 1e-5
    if mode != "checkpointing":  # the control: with a cache, the default, they do
        assert largest_difference(model, {**batch, "use_cache": True}) > 1e-2
    assert largest_difference(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_may_pack(name):
    model = tiny_model(name).train()
    assert why_not_packed(model) is None
    assert model.training


@pytest.mark.parametrize("name", LEAKING)
def test_documents_with_a_block_each_are_computed_as_if_alone(name, padded, batch):
    model = tiny_model(name)
    assert why_not_packed(model) == (
        f"{type(model).__name__} ({model.config.model_type}, attention {model.config._attn_implementation}) lets "
        "documents of one block see each other"
    )
    assert model.eval()(**padded).logits.shape[:2] == padded["input_ids"].shape
    for row, length in enumerate(padded["attention_mask"].sum(1).tolist()):
        alone = model(input_ids=padded["input_ids"][row : row + 1, :length], use_cache=False).logits[0]
        assert (model(**padded).logits[row, :length] - alone).abs().max() <= 1e-5
    assert largest_difference(model, batch) > 1e-3  # the control


def test_another_attention_that_would_help_is_named():
    AttentionInterface.register("own", sdpa_attention_forward)  # which has no function for its mask
    model = tiny_model("llama", "own")
    assert why_not_packed(model) == (
        "LlamaForCausalLM (llama, attention own) lets documents of one block see each other, which it does not with "
        "attn_implementation='sdpa'"
    )
    assert model.config._attn_implementation == "own"


def test_known_tokens():
    model = tiny_model("llama")
    assert known_tokens(model) == 258
    model.lm_head = torch.nn.Linear(16, 250)
    assert known_tokens(model) == 250
    model.set_input_embeddings(torch.nn.Embedding(240, 16))
    assert known_tokens(model) == 240


def test_collator(batch):
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items() if key != "use_cache"} == {
        name: (torch.int64, (3, BLOCK)) for name in COLUMNS
    }
    assert batch["use_cache"] is False
    assert len(batch) == len(COLUMNS) + 1
    with pytest.raises(ValueError, match=r"rows without position_ids.*remove_unused_columns=False"):
        BlockCollator()([{"input_ids": [1], "labels": [1]}])


def test_a_padded_batch_is_cut_to_its_longest_document(padded):
    lengths = padded["attention_mask"].sum(1)
    assert lengths.min() < lengths.max() == padded["input_ids"].shape[1] < BLOCK
    assert {key: value.dtype for key, value in padded.items() if key != "use_cache"} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), torch.int64
    )
    assert (padded["attention_mask"].diff(dim=1) <= 0).all(), "padding stands on the right"
    assert padded["use_cache"] is False
