"""Random weights: shared by the layers, the same for a seed everywhere, and fit to compute with."""

import pytest
import torch
from transformers import GptOssConfig, Mamba2Config

from dylora_moe.base.find import find_base
from dylora_moe.base.fingerprint import same_weights, weights_fingerprint
from dylora_moe.base.hankel import HankelMatrix
from dylora_moe.base.load import compact_random_bytes, load_base
from dylora_moe.base.preserve import fresh_base
from dylora_moe.base.random_weights import shared_bytes
from dylora_moe.base.structure import decoder_layers, skeleton

from ..support.base_folders import FAMILIES, config_only, error_of, folder_of

DRAWING = {
    "gpt_oss": GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "mamba2": Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=1
    ),
}
VECTORS = {"gpt_oss": "model.layers.0.self_attn.sinks", "mamba2": "backbone.layers.0.mixer.dt_bias"}
IDS = torch.arange(3, 15)[None]


def held_bytes(model):
    """Of memory, by its parameters."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_share_the_layers_and_give_distinct_finite_logits(family, tmp_path):
    base, weights = find_base(folder_of(family, tmp_path))
    assert weights == "random" and "no weights" in base.note
    state = torch.get_rng_state()
    model = load_base(base, weights, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert nbytes == held_bytes(model) == shared_bytes(skeleton(base.config, model.dtype))
    first, *others = decoder_layers(model)
    for layer in others:
        assert all(a is b for a, b in zip(first.parameters(), layer.parameters(), strict=True))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == bool(base.config.tie_word_embeddings)
    logits = model(IDS).logits[0]
    assert torch.isfinite(logits).all()
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 1e-3
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compact_weights_are_the_same_in_little_memory(family, dtype, tmp_path):
    base, _ = find_base(folder_of(family, tmp_path))
    dense, compact = (load_base(base, "random", dtype=dtype, compact=compact) for compact in (False, True))
    assert same_weights(weights_fingerprint(dense), weights_fingerprint(compact))
    for (name, here), there in zip(dense.named_parameters(), compact.parameters(), strict=True):
        assert torch.equal(here, there), name
    assert held_bytes(compact) == compact_random_bytes(base.config, dtype)
    of_conv1d = family == "gpt2"  # which multiplies by its matrix itself
    assert held_bytes(compact) < held_bytes(dense) / (1.1 if of_conv1d else 4)
    with torch.no_grad():
        expected, found = dense(IDS).logits, compact(IDS).logits
    assert (expected - found).abs().max() < (1e-5 if dtype == "float32" else 0.05)
    twin = fresh_base(compact)
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, found)
    assert held_bytes(twin) == held_bytes(compact)


def test_a_matrix_that_others_than_linear_layers_use_is_never_compact(tmp_path):
    gpt2 = load_base(find_base(folder_of("gpt2", tmp_path))[0], "random", compact=True)
    assert isinstance(gpt2.transformer.wte.weight, HankelMatrix)
    assert gpt2.transformer.h[0].attn.c_attn.weight.is_contiguous()


def test_random_weights_are_the_same_bytes_for_a_seed_and_others_for_another(tmp_path):
    base, _ = find_base(folder_of("gemma", tmp_path), weights="random")
    prints = [weights_fingerprint(load_base(base, "random", seed=seed)) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert same_weights(prints[0], "float32:52de788f2f2edd1902fe28ca7852933a1e4cf2a638200a3983b6c16d06c7f081")


@pytest.mark.parametrize("drawing", ["gpt_oss", "mamba2"])  # some of whose vectors are drawn, children's matrices too
def test_random_vectors_are_the_same_too_and_leave_the_matrices_alone(drawing, tmp_path):
    base, _ = find_base(config_only(tmp_path / drawing, DRAWING[drawing].to_dict()))
    models = []
    for state, options in ((1, {}), (2, {}), (3, {"compact": True}), (1, {"seed": 1})):
        torch.manual_seed(state)
        models.append(load_base(base, "random", dtype="float32", **options))
    prints = [weights_fingerprint(model) for model in models]
    assert prints[0] == prints[1] and same_weights(prints[0], prints[2]) and not same_weights(prints[0], prints[3])
    vectors = [dict(m.named_parameters())[VECTORS[drawing]] for m in models]
    assert len(vectors[0].unique()) > 1 and not torch.equal(vectors[0], vectors[3])
    assert all(parameter.isfinite().all() for parameter in models[2].parameters())


def test_norms_and_biases_are_as_the_model_initialises_them(tmp_path):
    gemma = load_base(find_base(folder_of("gemma", tmp_path))[0], "random")
    assert (gemma.model.norm.weight == 0).all()
    gpt2 = load_base(find_base(folder_of("gpt2", tmp_path))[0], "random")
    assert (gpt2.transformer.ln_f.weight == 1).all() and (gpt2.transformer.ln_f.bias == 0).all()
    assert (gpt2.transformer.h[0].attn.c_attn.bias == 0).all()
    assert gpt2.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_random_weights_that_do_not_fit_are_not_begun(tmp_path, monkeypatch):
    base, weights = find_base(folder_of("llama", tmp_path))
    monkeypatch.setattr("dylora_moe.system.machine.available_memory", lambda: 1000)
    assert "Not enough memory" in error_of(load_base, base, weights)
    assert load_base(base, "none")
