"""The mixture as a whole: losses, optimizers, and what must be left as found."""

import json
import sys
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MambaConfig, RwkvConfig

from dylora_moe import DyLoRAMoE, MoELoraConfig, RouterConfig, UsageError
from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_base, load_tokenizer
from dylora_moe.base.preserve import fresh_base, seeded, untouched
from dylora_moe.mixture.experts import Injector
from dylora_moe.mixture.targets import replace_config

from ..support.tiny import ARCHITECTURES, VOCABULARY, random_ids, randomise, tiny_base, tiny_mixture

# The keys of a LoraConfig of PEFT 0.13, which refuses a file with others; it loads what is exported to the same bits.
PEFT_0_13 = """
    peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules lora_alpha
    lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern
    rank_pattern alpha_pattern megatron_config megatron_core loftq_config use_dora layer_replication runtime_config
"""


def labels_with_gaps(ids):
    labels = ids.clone()
    labels[0, :3] = -100
    labels[-1, -2:] = -100
    return labels


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


# ---- losses ----


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_shifted_cross_entropy(kind, smoothing):
    model, ids = (
        tiny_mixture(kind, label_smoothing=smoothing, router=RouterConfig(balance_coefficient=0.5)),
        random_ids(2, 7),
    )
    labels = labels_with_gaps(ids)

    def reference(logits, label_smoothing):
        return F.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), label_smoothing=label_smoothing
        )

    out = model.train()(ids, labels=labels)
    assert torch.allclose(out.lm_loss, reference(out.logits, smoothing), atol=1e-6)
    assert torch.allclose(out.loss, out.lm_loss + 0.5 * out.balance_loss)
    assert 1 <= out.balance_loss <= 3
    out = model.eval()(ids, labels=labels)
    assert torch.allclose(out.loss, reference(out.logits, 0.0), atol=1e-6)  # in nats, without balance
    assert out.balance_loss is None


def test_padding_changes_neither_loss_nor_balance():
    model, ids = tiny_mixture(), random_ids(1, 6)
    model.train()
    expected = model(ids, labels=ids)
    padded, labels = F.pad(ids, (0, 4)), F.pad(ids, (0, 4), value=-100)
    found = model(padded, attention_mask=F.pad(torch.ones_like(ids), (0, 4)), labels=labels)
    assert torch.allclose(found.loss, expected.loss, atol=1e-6)
    assert torch.allclose(found.balance_loss, expected.balance_loss, atol=1e-6)
    mask, labels = F.pad(torch.ones_like(ids), (4, 0)), F.pad(ids[:, 1:], (5, 0), value=-100)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = model(F.pad(ids, (4, 0)), attention_mask=mask, labels=labels, position_ids=positions)
    assert torch.allclose(left.loss, expected.loss, atol=1e-5)
    assert torch.allclose(left.balance_loss, expected.balance_loss, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_four_unequal_micro_batches_give_the_gradients_of_one_batch(kind):
    model, ids = tiny_mixture(kind, router=RouterConfig(balance_coefficient=1.0), label_smoothing=0.1), random_ids(4, 9)
    labels = ids.clone()
    for row in range(4):
        labels[row, : 2 * row] = -100
    model.train()
    model(ids, labels=labels).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for row in range(4):
        model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, whole[name], atol=1e-6, rtol=1e-4), name


def test_a_batch_without_labels_to_learn_has_a_loss_of_zero():
    model, ids = tiny_mixture(), random_ids(1, 5)
    out = model.train()(ids, labels=torch.full_like(ids, -100))
    assert out.loss == 0
    out.loss.backward()


def test_tuples_and_embeddings_as_transformers_has_them():
    model, ids = tiny_mixture(), random_ids(1, 5)
    expected = model(ids, labels=ids)
    assert torch.equal(model(ids, labels=ids, return_dict=False)[0], expected.loss)
    assert torch.equal(expected[0], expected.loss) and torch.equal(expected[1], expected.logits)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected.logits)


def test_an_expert_that_was_never_trained_has_no_share():
    model, ids = tiny_mixture(experts=2), random_ids(2, 7)
    with torch.no_grad(), model.watch_usage():
        model(ids, labels=ids)
        before = model.usage().shares()
    model.add_expert()
    with torch.no_grad(), model.watch_usage():
        model(ids, labels=ids)
        assert model.usage().shares() == pytest.approx([*before, 0.0])


def test_usage_counts_labelled_tokens_once():
    model, ids = tiny_mixture(experts=4), random_ids(2, 7)
    assert model.usage() is None
    with model.watch_usage():
        model(ids, labels=labels_with_gaps(ids))
        model(ids, labels=ids, expert=1)  # nothing is routed
        usage = model.usage()
    assert usage.first.sum() == pytest.approx(8)
    assert usage.total.sum() == pytest.approx(8)
    with model.watch_usage():
        model(ids, labels=ids, attention_mask=(torch.arange(7) < 4).long().expand(2, -1))
        assert model.usage().total.sum() == pytest.approx(8)  # 4 attended tokens of each row
    assert sum(usage.shares()) == pytest.approx(1)
    assert model.usage() is None


def test_padding_that_is_labelled_does_not_dilute_the_balance():
    model, ids = tiny_mixture(experts=4, lora=MoELoraConfig(lora_dropout=0.0)).train(), random_ids(2, 8)
    mask = (torch.arange(8) < 5).long().expand(2, -1)
    expected = model(ids[:, :6], labels=ids[:, :6]).balance_loss  # the first 5 have a label after them
    assert torch.allclose(model(ids, labels=ids, attention_mask=mask).balance_loss, expected)


# ---- what is trained ----


@pytest.mark.parametrize("reset", ["by a state dict", "in place"])
def test_an_expert_that_is_reset_is_new_again(reset):
    model, ids = tiny_mixture(), random_ids(1, 6)
    model.mark_mature()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {name: torch.zeros_like(value) for name, value in state.items() if "lora_B.expert_2" in name}
    with torch.no_grad():
        model(ids)
        assert model.expert_states == ["mature"] * 3
        if reset == "in place":
            for name, tensor in model.expert_tensors(2).items():
                tensor.mul_(0 if "lora_B" in name else 1)
            model.eval()
        else:
            model.load_state_dict(state)
        assert model.expert_states == ["mature", "mature", "new"]
        fresh = tiny_mixture()
        fresh.load_state_dict(state)
        fresh.mark_mature()
        assert torch.equal(model(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("state", ["all new", "some new", "trained"])
@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_trainable_parameter_gets_a_gradient_and_is_moved(kind, experts, state):
    with seeded(1):
        model = DyLoRAMoE(tiny_base(kind), experts, lora=MoELoraConfig(r=4))
    if state != "all new":
        randomise(model)
    if state == "some new":
        model.add_expert()
    ids = random_ids(2, 6)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in model.trained_parameters().items()}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    model.check_optimizer(optimizer)
    model.train()
    for step in range(2):  # A gets a gradient of zero while B is zero: it moves in the second step
        model(ids, labels=ids).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == [], "unused parameters stop distributed training"
        optimizer.step()
        optimizer.zero_grad()
        assert step or "new" not in model.expert_states
    assert [name for name, p in model.trained_parameters().items() if torch.equal(p, before[name])] == []
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert ("router.gate.weight" in model.trained_parameters()) == (model.num_experts > 1)


def message_of(model, optimizer):
    with pytest.raises(UsageError) as caught:
        model.check_optimizer(optimizer)
    return str(caught.value)


def test_a_state_dict_tells_which_experts_are_mature(tmp_path):
    model, other = tiny_mixture(experts=4), tiny_mixture(experts=4, seed=2)
    model.mark_mature([0, 2, 3])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert other.load_state_dict(torch.load(tmp_path / "state.pt")) == ([], [])
    assert other.expert_states == model.expert_states == ["mature", "immature", "mature", "mature"]
    model.mark_mature()
    other.load_state_dict(model.state_dict())
    ids = random_ids(2, 9)
    assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)
    with pytest.raises(UsageError, match="expected 3 states"):
        tiny_mixture(experts=3).set_extra_state(model.get_extra_state())


def test_a_choice_that_is_refused_changes_nothing():
    model = tiny_mixture()
    before = model.trained_parameters().keys()
    with pytest.raises(UsageError, match="expert"):
        model.train_only([0, 7])
    assert model.trained_parameters().keys() == before


def test_optimizers_that_would_leave_a_part_as_it_is_are_refused(tmp_path):
    model = tiny_mixture("llama", 11)
    model.check_optimizer(torch.optim.AdamW(trainable(model)))

    model.peft_model.set_adapter("expert_1")
    message = message_of(model, torch.optim.AdamW(trainable(model)))
    assert "expert_0 is frozen (requires_grad is False)" in message and "train_all_experts()" in message
    assert "expert_1 is" not in message and "expert_2 is" in message
    model.train_all_experts()
    model.check_optimizer(torch.optim.AdamW(trainable(model)))

    model.peft_model.set_adapter("expert_10")
    with model.peft_model.disable_adapter():
        assert "expert_3 is frozen" in message_of(model, torch.optim.AdamW(model.trained_parameters().values()))
    model.train_all_experts()

    model.export_expert(1, tmp_path / "one")
    model.peft_model.load_adapter(tmp_path / "one", "expert_1")
    model.check_optimizer(torch.optim.AdamW(trainable(model)))  # this PEFT freezes nothing here; others did
    list(model.expert_tensors(1).values())[3].requires_grad_(False)
    assert "expert_1 is frozen" in message_of(model, torch.optim.AdamW(trainable(model)))
    model.train_all_experts()

    optimizer = torch.optim.AdamW(trainable(model))
    model.add_expert()
    message = message_of(model, optimizer)
    assert "expert_11 has parameters that the optimizer does not hold" in message
    assert "router has parameters that the optimizer does not hold" in message
    assert "expert_10" not in message
    model.check_optimizer(torch.optim.AdamW(trainable(model)))
    only_experts = [p for name, p in model.trained_parameters().items() if "router" not in name]
    assert "  - router has parameters" in message_of(model, torch.optim.AdamW(only_experts))


def test_one_expert_needs_no_router():
    model, ids = tiny_mixture("llama", 1), random_ids(1, 5)
    optimizer = torch.optim.AdamW(trainable(model))
    model.check_optimizer(optimizer)
    assert not model.router.gate.weight.requires_grad
    expected = model(ids).logits
    with torch.no_grad():
        model.router.gate.weight.fill_(float("nan"))
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids, expert=0).logits, expected)
    out = model.train()(ids, labels=ids)
    assert out.balance_loss is None and model.usage() is None


# ---- what is left as found ----


def state_of(model):
    return (
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
        list(model.peft_model.active_adapters),
        [layer._disable_adapters for _, layer in model.routed_layers()],
        model._routing.forced,
        model._routing.current.state,
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


def runs(model, ids):
    """What a user may do with a model that is being trained, each to leave it as it was."""
    generate = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def inside(context):
        with context:
            model(ids)

    def failing():
        with pytest.raises(ZeroDivisionError), untouched(model), model.expert(1), model.disable_experts():
            torch.rand(3)
            raise ZeroDivisionError

    def refused():
        with pytest.raises(UsageError):
            model(ids, expert=3)

    return {
        "forward": lambda: model(ids),
        "forced": lambda: model(ids, labels=ids, expert=1),
        "generate": lambda: model.generate(ids, **generate),
        "generate forced": lambda: model.generate(ids, expert=0, **generate),
        "disable_experts": lambda: inside(model.disable_experts()),
        "expert": lambda: inside(model.expert(1)),
        "untouched": lambda: inside(untouched(model)),
        "watch_usage": lambda: inside(model.watch_usage()),
        "expert_states": lambda: model.expert_states,
        "fresh_base": lambda: model.fresh_base(),
        "failing": failing,
        "refused": refused,
    }


@pytest.mark.parametrize("active", [["expert_1"], ["expert_0", "expert_1", "expert_2"]])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_running_leaves_everything_as_found(kind, active):
    model, ids = tiny_mixture(kind), random_ids(1, 4)
    model.peft_model.base_model.set_adapter(active)
    next(model.base.children()).train()  # modules with a mode of their own
    next(model.routed_layers())[1].eval()
    for what, run in runs(model, ids).items():
        before = state_of(model)
        run()
        assert state_of(model) == before, what


def test_only_dropout_in_training_draws_random_numbers():
    model, ids = tiny_mixture(lora=MoELoraConfig(r=4, lora_dropout=0.5)), random_ids(1, 4)
    for what, run in runs(model, ids).items():
        before = state_of(model)
        run()
        assert state_of(model) == before, what
    before = state_of(model.train())
    with untouched(model):
        model(ids)
    assert state_of(model) == before
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert state_of(model) != before


def test_other_base_weights_than_those_it_was_saved_on_are_not_taken_without_a_word(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    folder = tmp_path / "checkpoint-1"
    randomise(DyLoRAMoE.from_base(str(tmp_path / "base"), 2)).save_checkpoint(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        DyLoRAMoE.from_checkpoint(folder, tiny_base())
    other = tiny_base()
    with torch.no_grad():
        other.lm_head.weight[1] *= -3  # one row, of which no sample has a number
    with pytest.warns(UserWarning, match="was saved on other weights of its base model"):
        DyLoRAMoE.from_checkpoint(folder, other)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="weights"):
        DyLoRAMoE.from_checkpoint(folder)
    with pytest.warns(UserWarning, match="was saved on other weights of its base model"):
        DyLoRAMoE.from_checkpoint(folder, weights="random")


def test_threads_take_turns():
    """Also where each sends its tokens elsewhere."""
    model, ids = tiny_mixture(experts=4), [random_ids(2, 9, seed=seed) for seed in range(4)]
    model.mark_mature()
    with torch.no_grad():
        expected = [model(ids[n], expert=n or None).logits for n in range(4)]
    wrong = []

    @torch.no_grad()
    def run(n):
        for _ in range(40):
            try:
                right = torch.equal(model(ids[n], expert=n or None).logits, expected[n])
            except Exception as error:
                wrong.append(error)
            else:
                wrong.extend([] if right else [n])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        for act in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                act(thread)
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_what_holds_for_all_threads_keeps_none_waiting():
    """As a streamer does it: the main thread reads what another generates."""
    model, ids, results = tiny_mixture(), random_ids(1, 5), []
    with torch.no_grad():
        expected = model(ids, expert=1).logits
        with model.expert(1):
            thread = threading.Thread(target=lambda: results.append(model(ids).logits), daemon=True)
            thread.start()
            thread.join(30)
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("config", [MambaConfig, RwkvConfig])
def test_the_output_has_what_the_base_returns_beside_logits(config):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}
    model = randomise(DyLoRAMoE(AutoModelForCausalLM.from_config(config(**sizes)), 2))
    ids = random_ids(1, 5)
    out = model(ids, labels=ids)
    plain = model(ids, use_cache=True)
    state = "cache_params" if config is MambaConfig else "state"
    assert plain[state] is not None
    assert getattr(plain, state) is plain[state]
    assert out.loss > 0


@pytest.mark.parametrize("kind", [True, False, "gaussian"])
def test_every_initialisation_that_can_be_saved_can_be_loaded(tmp_path, kind):
    model = randomise(DyLoRAMoE(tiny_base(), 2, lora=MoELoraConfig(init_lora_weights=kind)))
    model.save_checkpoint(tmp_path / "a")
    ids = random_ids(1, 6)
    assert torch.equal(DyLoRAMoE.from_checkpoint(tmp_path / "a", tiny_base())(ids).logits, model(ids).logits)


@pytest.mark.parametrize("expert", [-1, 3, True, 1.0, "1"])
def test_an_expert_that_is_not_there_is_refused(expert):
    model = tiny_mixture()
    with pytest.raises(UsageError, match="expert must be None or 0 to 2, got "):
        model(random_ids(1, 4), expert=expert)
    with pytest.raises(UsageError, match="expert must be None or 0 to 2, got "):
        model.generate(random_ids(1, 4), expert=expert)


@pytest.mark.parametrize("experts", [[0], [0, 1, 2], [0, 3], [0, None], [0, True], (), "01"])
def test_experts_that_do_not_fit_the_rows_are_refused(experts):
    with pytest.raises(UsageError, match=r"expert must be None or 0 to 2|names \d experts for the 2 rows"):
        tiny_mixture()(random_ids(2, 4), expert=experts)
    with pytest.raises(UsageError, match="one of input_ids and inputs_embeds is needed"):
        tiny_mixture()(expert=[0, 1])


# ---- bases ----


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fresh_base_shares_the_tensors_and_computes_the_same(kind):
    model, ids = tiny_mixture(kind), random_ids(1, 5)
    fresh = model.fresh_base()
    theirs = {id(p) for p in model.base.parameters()}
    assert all(id(p) in theirs for p in fresh.parameters())
    assert [type(m) for m in fresh.modules()] == [type(m) for m in tiny_base(kind).modules()]
    assert torch.equal(fresh(ids).logits, tiny_base(kind)(ids).logits)
    twin = randomise(DyLoRAMoE(fresh_base(fresh), 3, lora=MoELoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)))
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert fresh.generation_config.to_dict() == model.generation_config.to_dict()


def test_on_a_meta_base_the_experts_are_real():
    with torch.device("meta"):
        base = tiny_base()
    model = DyLoRAMoE(base, 2)
    assert all(not p.is_meta and p.isfinite().all() for p in model.trained_parameters().values())
    assert all(p.is_meta for name, p in model.base.named_parameters() if "lora_" not in name)
    assert not model.has_base_weights
    assert model.expert_states == ["new", "new"]
    assert model.device.type == "cpu"
    assert DyLoRAMoE(tiny_base(), 2).has_base_weights


def test_from_base_is_reproducible_and_leaves_the_generator_alone(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    first, second = (DyLoRAMoE.from_base(str(tmp_path), 2, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(first.trained_parameters().values(), second.trained_parameters().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(first(random_ids(1, 4)).logits, tiny_base()(random_ids(1, 4)).logits)


def test_a_base_whose_weights_are_not_at_hand_is_loaded_on_without_a_word(tmp_path):
    model, ids = tiny_mixture(), random_ids(1, 6)
    model.save_checkpoint(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = DyLoRAMoE.from_checkpoint(tmp_path / "a", cpu_offload(tiny_base()))
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def test_checkpoint_and_export_round_trip(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model, ids = randomise(DyLoRAMoE.from_base(str(tmp_path / "base"), 3)), random_ids(1, 6)
    model.mark_mature()
    assert model.save_checkpoint(tmp_path / "checkpoint-1", step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = DyLoRAMoE.from_checkpoint(tmp_path / "checkpoint-1")
        DyLoRAMoE.from_checkpoint(tmp_path / "checkpoint-1", dtype="bfloat16")  # then it cannot be told
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.expert_states == ["mature"] * 3
    model.export_expert(2, tmp_path / "two")
    assert set(json.loads((tmp_path / "two/adapter_config.json").read_text())) <= set(PEFT_0_13.split())
    stock = PeftModel.from_pretrained(tiny_base(), tmp_path / "two").eval()
    assert torch.equal(stock(input_ids=ids).logits, model(ids, expert=2).logits)
    with pytest.raises(UsageError, match="expert must be None or 0 to 2, got 7"):
        model.export_expert(7, tmp_path / "seven")


def test_parameter_counts():
    model = tiny_mixture()
    counts = model.parameter_counts()
    assert counts["base"] == sum(p.numel() for p in tiny_base().parameters())
    assert counts["experts"] == sum(t.numel() for e in range(3) for t in model.expert_tensors(e).values())
    assert counts["router"] == 3 * (32 + 2)  # gate, its bias and the prior


# ---- real weights ----


@pytest.fixture(scope="module")
def smollm(smollm_gguf):
    source, weights = find_base(smollm_gguf)
    model = randomise(DyLoRAMoE(load_base(source, weights, dtype="float32"), 3, lora=MoELoraConfig(r=8)), spread=0.02)
    return model, load_tokenizer(source)


@pytest.mark.real
@pytest.mark.slow
def test_real_experts_are_stock_peft_loras(smollm, tmp_path):
    model, tokenizer = smollm
    ids = tokenizer("def fibonacci(n):\n    ", return_tensors="pt").input_ids
    for index in range(3):
        model.export_expert(index, tmp_path / str(index))
        stock = PeftModel.from_pretrained(model.fresh_base(), tmp_path / str(index)).eval()
        with torch.no_grad():
            assert (stock(input_ids=ids).logits - model(ids, expert=index).logits).abs().max() <= 1e-5


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("mature", [False, True])
def test_real_generation_with_and_without_cache_and_in_a_padded_batch(smollm, mature):
    model, tokenizer = smollm
    model.mark_mature() if mature else model.mark_immature()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = ["The capital of France is", "import os\nfor name in"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    alone = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
        alone.append(cached[0, ids.shape[1] :])
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    for row, expected in zip(together, alone, strict=True):
        assert torch.equal(row[batch.input_ids.shape[1] :], expected)


@pytest.mark.real
@pytest.mark.slow
def test_real_training_lowers_the_loss_and_moves_every_part(smollm):
    model, tokenizer = smollm
    with seeded(0):
        model = DyLoRAMoE(model.fresh_base(), 2, lora=MoELoraConfig(r=4, lora_dropout=0.0))
    ids = tokenizer("To be, or not to be, that is the question: whether 'tis nobler", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    before = {name: p.clone() for name, p in model.trained_parameters().items()}
    losses = []
    model.train()
    for _ in range(6):
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.lm_loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(p, before[name]) for name, p in model.trained_parameters().items())


def test_an_expert_beside_another_is_what_peft_would_have_made(monkeypatch):
    configs = [MoELoraConfig(r=4), MoELoraConfig(r=2, lora_alpha=8), MoELoraConfig(r=4, use_rslora=True)]

    def build():
        with seeded(3):
            return DyLoRAMoE(tiny_base(), [replace_config(config) for config in configs])

    ours = build()
    with monkeypatch.context() as patch:
        patch.setattr(Injector, "_twin", lambda self, config: None)
        theirs = build()
    for mine, other in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert mine[0] == other[0]
        assert torch.equal(mine[1], other[1]) and mine[1].requires_grad == other[1].requires_grad, mine[0]
    assert [str(module) for module in ours.modules()] == [str(module) for module in theirs.modules()]
    assert ours.peft_model.peft_config == theirs.peft_model.peft_config
    assert ours.peft_model.active_adapters == theirs.peft_model.active_adapters
    for (_, mine), (_, other) in zip(ours.routed_layers(), theirs.routed_layers(), strict=True):
        for name in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "active_adapters"):
            assert getattr(mine, name) == getattr(other, name), name
