"""Routing over a forward pass: caches, padding, gradient checkpointing, new experts."""

import copy
import functools
import pickle

import pytest
import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    QuantizedCache,
)

from dylora_moe import DyLoRAMoE, MoELoraConfig, RouterConfig, UsageError
from dylora_moe.base.preserve import seeded
from dylora_moe.ops.frozen_linear import is_slow

from ..support.tiny import ARCHITECTURES, random_ids, randomise, tiny_base, tiny_mixture

DROPPED = MoELoraConfig(r=4, lora_dropout=0.2)
GEMMA3 = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}  # fmt: skip
GENERATE = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- generation ----


@torch.no_grad()
def greedy_without_cache(model, ids, steps, **options):
    mask = torch.ones_like(ids)
    for _ in range(steps):
        token = model(ids, attention_mask=mask, use_cache=False, **options).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.ones(ids.shape[0], ids.shape[1] + 1, dtype=torch.int64)
    return ids


@pytest.mark.parametrize("mature", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_generation_with_a_cache_is_generation_without(kind, mature):
    model, ids = tiny_mixture(kind, 9), random_ids(1, 5)
    if mature:
        model.mark_mature()
    expected = greedy_without_cache(model, ids, 12)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=True, **options), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)
    assert torch.equal(model.generate(ids, expert=1, **options), greedy_without_cache(model, ids, 12, expert=1))
    assert not torch.equal(expected, greedy_without_cache(model, ids, 12, expert=1))
    with model.disable_experts():
        assert torch.equal(model.generate(ids, **options), tiny_base(kind).generate(ids, **options))


@pytest.mark.parametrize("mature", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(kind, mature):
    model = tiny_mixture(kind, 9)
    if mature:
        model.mark_mature()
    prompts = [random_ids(1, length, seed=length) for length in (3, 7, 5)]
    batch = torch.cat([torch.nn.functional.pad(p, (7 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (7 - p.shape[1], 0)) for p in prompts])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[7:], model.generate(prompt, **options)[0, prompt.shape[1] :])


def route(model, *args, **kwargs):
    """The routing probabilities (B, T, N) of a forward pass."""
    with model._routing.run(record=True) as state:
        model.base(*args, **kwargs)
    return state.probabilities


@torch.no_grad()
def test_one_pass_is_token_by_token_is_chunked():
    model, ids = tiny_mixture(), random_ids(2, 23)
    whole, logits = route(model, ids), model(ids).logits
    for sizes in ([1] * 23, [1, 7, 1, 14], [22, 1]):
        cache, routes, found = DynamicCache(config=model.config), [], []
        for part in ids.split(sizes, 1):
            routes.append(route(model, part, past_key_values=copy.deepcopy(cache), use_cache=True))
            found.append(model(part, past_key_values=cache, use_cache=True).logits)
        assert torch.allclose(torch.cat(routes, 1), whole, atol=1e-6), sizes
        assert torch.allclose(torch.cat(found, 1), logits, atol=1e-5), sizes
    assert (whole[:, -1] - whole[:, 0]).abs().max() > 0.01  # the route follows the tokens


@torch.no_grad()
def test_a_later_token_changes_no_earlier_weight():
    model, ids = tiny_mixture(), random_ids(1, 8)
    other = torch.cat([ids[:, :5], random_ids(1, 3, seed=5)], 1)
    assert torch.equal(route(model, ids)[:, :5], route(model, other)[:, :5])
    assert not torch.equal(route(model, ids)[:, 5:], route(model, other)[:, 5:])
    assert torch.allclose(route(model, ids)[0, 0], model.router.prior.softmax(-1))


@torch.no_grad()
def test_each_document_of_a_block_is_routed_as_if_alone():
    model, one, two = tiny_mixture(), random_ids(1, 6), random_ids(1, 9, seed=3)
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    both = route(model, torch.cat([one, two], 1), position_ids=positions, use_cache=False)
    assert torch.allclose(both, torch.cat([route(model, one), route(model, two)], 1), atol=1e-6)


@torch.no_grad()
def test_embeddings_are_routed_as_their_tokens():
    model, ids = tiny_mixture(), random_ids(2, 6)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(route(model, ids), route(model, inputs_embeds=embeddings))
    for options in ({}, {"use_cache": False}):
        options = GENERATE | {"do_sample": False} | options
        new = model.generate(inputs_embeds=embeddings, **options)
        assert torch.equal(new, model.generate(ids, **options)[:, 6:])


@torch.no_grad()
def test_a_quantized_cache_keeps_the_route_as_it_is():
    model, ids = tiny_mixture(), random_ids(2, 12)
    try:
        cache = QuantizedCache("fp8", config=model.config)
    except ValueError as error:
        if "Unknown quantization backend" not in str(error):
            raise
        pytest.skip("this release of Transformers has no cache in fp8")
    routes, logits = [], []
    for part in ids.split([5, 1, 6], 1):
        with model._routing.run(record=True) as state:
            logits.append(model.base(part, past_key_values=cache, use_cache=True).logits)
        routes.append(state.probabilities)
    assert torch.allclose(torch.cat(routes, 1), route(model, ids), atol=1e-6)
    assert not torch.allclose(torch.cat(logits, 1), model(ids).logits, atol=1e-5)  # attention does not


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate_are_the_same_without_a_cache(options):
    model, ids = tiny_mixture(), random_ids(1, 7)
    ids = torch.cat([ids, ids], 1)  # something to look up
    found = []
    for cached in (True, False):
        with seeded(3):
            plain = {} if cached else {"use_cache": False}
            extra = {} if not cached and "prompt_lookup_num_tokens" in options else options
            found.append(model.generate(ids, **GENERATE, **extra, **plain))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_multimodal_base_is_routed_on_text():
    """It gives its decoder embeddings, and masks that it has made."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=GEMMA3, vision_config=vision | {"image_size": 8, "patch_size": 4},
                          mm_tokens_per_image=4, image_token_index=96)  # fmt: skip
    with seeded(0):
        model = DyLoRAMoE(Gemma3ForConditionalGeneration(config), 3, lora=MoELoraConfig(r=4, lora_dropout=0.0))
    model, ids, mask = randomise(model.eval()), random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    options = GENERATE | {"do_sample": False}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(cached[0, 9:], model.generate(ids[:1, 3:], **options)[0, 6:])
    assert torch.allclose(route(model, ids, attention_mask=mask)[0, 3:], route(model, ids[:1, 3:])[0], atol=1e-6)
    assert not torch.allclose(route(model, ids)[0, 3:], route(model, ids[:1, 3:])[0], atol=1e-3)


@torch.no_grad()
def test_a_cropped_cache_goes_on_where_it_was_cut():
    model, ids = tiny_mixture(), random_ids(1, 12)
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-5)
    again = model(ids[:, 7:], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(again, model(ids).logits[:, 7:], atol=1e-5)


@torch.no_grad()
def test_a_sliding_window_and_a_state_space_base_generate_as_without_a_cache():
    sliding = Gemma3TextConfig(**GEMMA3)
    mamba = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4)
    for base, targets in ((Gemma3ForCausalLM, None), (MambaForCausalLM, ["in_proj"])):
        with seeded(0):
            config = sliding if base is Gemma3ForCausalLM else mamba
            lora = MoELoraConfig(r=4, lora_dropout=0.0, target_modules=targets)
            model = randomise(DyLoRAMoE(base(config), 3, lora=lora).eval())
        ids = random_ids(1, 9)
        options = GENERATE | {"do_sample": False}
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options)), base
        assert not torch.equal(cached, model.generate(ids, expert=1, **options)), base


@torch.no_grad()
def test_caches_that_cannot_hold_the_route_are_refused_by_name():
    model, ids = tiny_mixture(), random_ids(1, 5)
    with pytest.raises(UsageError, match="found StaticCache"):
        model.generate(ids, cache_implementation="static", **GENERATE)
    with pytest.raises(UsageError, match="filled without these experts"):
        model(ids, past_key_values=model(ids, expert=1, use_cache=True).past_key_values)
    cache = model(ids, use_cache=True).past_key_values
    model(ids, past_key_values=cache, expert=1, use_cache=True)  # of these tokens, the router knows nothing
    with pytest.raises(UsageError, match="with one expert for all tokens"):
        model(ids, past_key_values=cache)
    cache = model(ids, use_cache=True).past_key_values
    model.add_expert()
    with pytest.raises(UsageError, match="before an expert was added"):
        model(ids, past_key_values=cache)


@torch.no_grad()
def test_an_offloaded_cache_asks_for_the_first_layer_again(monkeypatch):
    """The last decoder layer asks for the layer after it, which is the route; no GPU is needed to see the order."""
    model, asked = tiny_mixture(), []
    cache = DynamicCache(config=model.base.config)
    monkeypatch.setattr(DynamicCache, "prefetch", lambda self, layer, only: asked.append((layer, only)))
    model(random_ids(1, 5), past_key_values=cache)
    assert asked == []
    cache.offloading, cache.only_non_sliding = True, True
    monkeypatch.setattr(DynamicCache, "update", lambda self, k, v, layer, *a, **o: self.layers[layer].update(k, v))
    model(random_ids(1, 1), past_key_values=cache)
    assert asked == [(0, True)]


@torch.no_grad()
def test_threads_may_leave_their_blocks_in_any_order():
    model, ids = tiny_mixture(), random_ids(1, 5)
    before = model(ids).logits
    first, second = model.expert(0), model.expert(1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, model(ids, expert=1).logits)
    second.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, before)


# ---- gradient checkpointing ----


def train_twice(model, ids, expert):
    """Two forward passes before one backward pass, with dropout; losses, gradients, statistics."""
    model.train()
    model.zero_grad()
    with seeded(3), model.watch_usage():
        one = model(ids[:1], labels=ids[:1], expert=expert)
        two = model(ids[1:], labels=ids[1:])
        (one.loss + two.loss).backward()
        usage = model.usage()
    return one.loss + two.loss, gradients(model), usage.first.sum()


def mixtures_for_checkpointing(kind):
    some_new = tiny_mixture(kind, 3, lora=DROPPED)
    some_new.add_expert()
    return {"trained": tiny_mixture(kind, 3, lora=DROPPED), "some new": some_new, "all new": all_new(kind)}


def all_new(kind):
    with seeded(1):
        return DyLoRAMoE(tiny_base(kind), 3, lora=DROPPED)


@pytest.mark.parametrize("expert", [None, 1])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_with_and_without_checkpointing_are_equal(kind, expert):
    for what, model in mixtures_for_checkpointing(kind).items():
        ids = random_ids(2, 7)
        loss, plain, tokens = train_twice(model, ids, expert)
        model.gradient_checkpointing_enable()
        loss_again, checkpointed, tokens_again = train_twice(model, ids, expert)
        assert torch.equal(loss, loss_again), what
        assert plain.keys() == checkpointed.keys() == {n for n, p in model.named_parameters() if p.requires_grad}, what
        assert all(torch.equal(plain[name], checkpointed[name]) for name in plain), what
        assert tokens == tokens_again == pytest.approx(6 * (2 if expert is None else 1)), what


def test_checkpointing_with_experts_of_different_ranks_targets_and_scalings():
    experts = [
        MoELoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]),
        MoELoraConfig(r=5, lora_alpha=3, lora_dropout=0.2, target_modules="all-linear"),
        MoELoraConfig(r=2, lora_alpha=3, lora_dropout=0.2, target_modules=["q_proj", "down_proj"]),
    ]
    model, ids = tiny_mixture("llama", experts), random_ids(2, 7)
    loss, plain, _ = train_twice(model, ids, None)
    model.gradient_checkpointing_enable()
    loss_again, checkpointed, _ = train_twice(model, ids, None)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_selective_checkpointing_keeps_what_the_base_layers_computed():
    """What it has put by of the first run must not have the experts added to it."""
    model, ids = tiny_mixture(), random_ids(2, 7)
    _, plain, _ = train_twice(model, ids, None)
    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model.gradient_checkpointing_enable({"context_fn": keep})
    _, checkpointed, _ = train_twice(model, ids, None)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("inputs_require_grads", [False, True])
def test_checkpointing_that_was_enabled_on_the_base_is_as_right(inputs_require_grads):
    model, ids = tiny_mixture(lora=DROPPED), random_ids(2, 7)
    _, plain, _ = train_twice(model, ids, None)
    model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if inputs_require_grads:  # as TRL and PEFT do it
        model.base.enable_input_require_grads()
    _, checkpointed, _ = train_twice(model, ids, None)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("name", ["gradient", "activation"])
def test_checkpointing_goes_by_the_names_of_both_versions(name):
    model = tiny_mixture()
    found = [getattr(model, f"is_{name}_checkpointing")]
    for what in ("enable", "disable"):
        getattr(model, f"{name}_checkpointing_{what}")()
        found.append(getattr(model, f"is_{name}_checkpointing"))
    assert found == [False, True, False]


def test_checkpointing_where_attention_is_given_the_input_of_the_layer_itself():
    """Without a norm before it, the routed layers see the very tensor that the layer is run again with."""
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, dropout=0.0,
        word_embed_proj_dim=32, max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    with seeded(0):
        model = randomise(DyLoRAMoE(OPTForCausalLM(config), 3, lora=MoELoraConfig(r=4, lora_dropout=0.3)))
    ids = random_ids(2, 7)
    loss, plain, _ = train_twice(model, ids, None)
    model.gradient_checkpointing_enable()
    loss_again, checkpointed, _ = train_twice(model, ids, None)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_reentrant_checkpointing_is_refused():
    model, ids = tiny_mixture(), random_ids(1, 4)
    with pytest.raises(UsageError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UsageError, match="use_reentrant=False"):
        model.train()(ids, labels=ids)


# ---- adding an expert ----


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("experts", [1, 2, 9])
def test_adding_an_expert_changes_no_output_until_it_is_trained(kind, experts):
    lora = MoELoraConfig(r=4, lora_alpha=3, lora_dropout=0.0)  # scaled by 3/4, it matters what is scaled
    model, ids = tiny_mixture(kind, experts, lora=lora), random_ids(2, 6)
    generate = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def outputs():
        found = []
        for mature in (False, True):
            model.mark_mature(range(experts)) if mature else model.mark_immature()
            with torch.no_grad():
                found += [model(ids).logits, model(ids, expert=0).logits, model.generate(ids, **generate)]
            found.append(model(ids).logits)  # with gradients
        model.train()
        found.append(model(ids).logits)
        model.eval()
        return found

    before = outputs()
    assert model.add_expert() == experts
    model.add_expert(MoELoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear"))
    after = outputs()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.expert_states == ["mature"] * experts + ["new", "new"]

    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.check_optimizer(optimizer)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert model.expert_states[-2:] == ["immature", "immature"]
    model.eval()
    assert not torch.equal(model(ids).logits, before[0])
    with torch.no_grad():  # the new expert has a share of its own now
        logits = model(ids).logits
        for tensor in model.expert_tensors(experts + 1).values():
            tensor.zero_()
        assert not torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("targets", [[["k_proj"], ["q_proj"]], [["q_proj", "k_proj"]] * 2, [["v_proj"]]])
@pytest.mark.parametrize("new", [["q_proj", "k_proj"], ["k_proj"], ["v_proj"]])
def test_an_expert_of_other_targets_takes_nothing_from_those_there(targets, new):
    """Layers that share a product for the trained experts need not share one for the new, nor the other way round."""
    with_targets = functools.partial(MoELoraConfig, r=4, lora_dropout=0.0)
    model, ids = tiny_mixture("llama", [with_targets(target_modules=t) for t in targets]), random_ids(2, 8)

    def run():
        model.zero_grad()
        out = model(ids, labels=ids)
        out.lm_loss.backward()
        return [out.logits, *(p.grad for i in range(len(targets)) for p in model.expert_tensors(i).values())]

    before = run()
    model.add_expert(with_targets(target_modules=new))
    after = run()
    assert all(a.abs().max() > 0 and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    of_new = model.expert_tensors(len(targets))
    assert all(of_new[name].grad.abs().max() > 0 for name in of_new if "lora_B" in name)


def test_a_layer_that_only_a_later_expert_has_is_routed():
    model, ids = tiny_mixture(lora=MoELoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0)), random_ids(1, 5)
    model.add_expert(MoELoraConfig(r=4, target_modules=["down_proj"], lora_dropout=0.0))
    before = model(ids).logits
    randomise(model)
    assert not torch.equal(model(ids).logits, before)
    assert all(layer.current is not None for _, layer in model.routed_layers())


# ---- states ----


def test_states_decide_what_is_routed_and_how():
    model, ids = tiny_mixture("llama", 4), random_ids(2, 6)
    dense = model(ids).logits
    assert model.expert_states == ["immature"] * 4
    model.mark_mature()
    sparse = model(ids).logits
    assert not torch.equal(dense, sparse)
    assert torch.equal(model.train()(ids).logits, dense)  # training is dense
    model.eval().mark_mature([0])
    assert torch.equal(model(ids).logits, sparse)
    model.set_expert_states(["mature", "mature", "immature", "mature"])
    assert model.expert_states == ["mature", "mature", "immature", "mature"]
    assert torch.equal(model(ids).logits, dense)  # one that is not mature
    model.mark_immature()
    assert model.expert_states == ["immature"] * 4


def test_new_is_what_the_tensors_say():
    with seeded(1):
        model = DyLoRAMoE(tiny_base(), 3, lora=MoELoraConfig(r=4))
    assert model.expert_states == ["new"] * 3
    model.mark_mature()
    assert model.expert_states == ["new"] * 3
    with torch.no_grad():
        list(model.expert_tensors(1).values())[-1][0, 0] = 1e-3
    assert model.expert_states == ["new", "immature", "new"]
    model.set_expert_states(["mature"] * 3)
    assert model.expert_states == ["new", "mature", "new"]


@torch.no_grad()
def test_a_change_between_two_evaluations_is_seen():
    model, ids = DyLoRAMoE(tiny_base(), 2, lora=MoELoraConfig(r=4)), random_ids(1, 4)
    before = [model(ids).logits for _ in range(3)][-1]
    list(model.expert_tensors(1).values())[-1].fill_(0.1)
    assert model.expert_states == ["new", "immature"]
    assert not torch.equal(model(ids).logits, before)


def test_an_expert_that_was_written_through_data_is_seen():
    model = DyLoRAMoE(tiny_base(), 2, lora=MoELoraConfig(r=4))
    ids = random_ids(1, 4)
    with torch.no_grad():
        model(ids)
        for tensor in model.expert_tensors(0).values():
            tensor.data.fill_(0.1)
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, tiny_base()(ids).logits)
    assert model.expert_states == ["immature", "new"]


@pytest.mark.parametrize("states", [["mature"], ["mature", "ripe", "new"]])
def test_states_that_do_not_fit_are_refused(states):
    with pytest.raises(UsageError, match="expected 3 states of new, immature, mature"):
        tiny_mixture().set_expert_states(states)


def test_an_expert_that_is_not_there_cannot_be_mature():
    with pytest.raises(UsageError, match="there is no expert 3, only 0 to 2"):
        tiny_mixture().mark_mature([3])


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_a_fresh_mixture_is_its_base(kind, dtype, experts):
    ids = random_ids(2, 6)
    expected = tiny_base(kind, dtype=dtype)(ids).logits
    model = DyLoRAMoE(tiny_base(kind, dtype=dtype), experts)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    trained = model.train()(ids).logits
    if dtype == torch.float32 or not is_slow(dtype):
        assert torch.equal(trained, expected)
    else:  # products in float32, rounded
        assert torch.allclose(trained, expected, atol=0.03)


# ---- copies ----


@pytest.mark.parametrize("run", ["the mixture", "its base"])
def test_nothing_is_left_of_a_pass_also_of_one_that_failed(run):
    model, ids = tiny_mixture(), random_ids(1, 4)
    run = model.train() if run == "the mixture" else model.base
    run(ids, labels=ids)
    layer = next(layer for _, layer in model.routed_layers())
    assert layer.current.state is None
    layer.base_layer.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(ids)
    assert layer.current.state is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_copies_and_pickles_are_models_of_their_own(kind):
    model, ids = tiny_mixture(kind, router=RouterConfig(top_k=1)), random_ids(1, 6)
    model.train()(ids, labels=ids)
    model.eval().mark_mature()
    with torch.no_grad():
        expected = [model(ids).logits for _ in range(3)][-1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)
        randomise(twin, seed=9)
        with torch.no_grad():
            assert not torch.equal(twin(ids).logits, expected)
            assert torch.equal(model(ids).logits, expected)
        twin.train()(ids, labels=ids).loss.backward()


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    model, ids = tiny_mixture("llama", 3), random_ids(2, 6)
    assert "new" not in model.expert_states  # looked at once: whether B is zero cannot be traced
    compiled = torch.compile(model, backend="aot_eager")
    for mature in (False, True):
        if mature:
            model.mark_mature()
        with torch.no_grad():
            assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled(ids, labels=ids).loss.backward()
    found = gradients(model)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
