"""A mixture is a model of Transformers: the Auto classes, pipelines and trainers take it as one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from dylora_moe import DyLoRAMoE, DyLoRAMoEConfig, UsageError

from ..support.data import chat_tokenizer
from ..support.scripts import copy_of
from ..support.tiny import random_ids, tiny_base, tiny_mixture

IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, a mixture on it, and its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_base().save_pretrained(folder / "base")
    model = tiny_mixture()
    model.base.config._name_or_path = str(folder / "base")
    model.save_pretrained(folder / "run" / "checkpoint-5")
    return folder, model.eval()


def logits_of(model, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


# ---- loading and saving ----


def test_importing_the_package_is_all_that_the_auto_classes_need(saved):
    folder, _ = saved
    code = f"""
import sys, dylora_moe
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(folder / "run" / "checkpoint-5")!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "DyLoRAMoE", done.stderr


def test_auto_classes_load_what_was_saved(saved):
    folder, model = saved
    checkpoint = folder / "run" / "checkpoint-5"
    config = AutoConfig.from_pretrained(checkpoint)
    assert isinstance(config, DyLoRAMoEConfig)
    assert (config.num_experts, config.hidden_size, config.vocab_size) == (3, 32, 97)
    assert config.router_aux_loss_coef == model.router.config.balance_coefficient
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map="cpu")
    assert isinstance(loaded, DyLoRAMoE) and isinstance(loaded, PreTrainedModel) and not loaded.training
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not torch.equal(logits_of(loaded), logits_of(DyLoRAMoE(tiny_base(), 3)))


def test_a_run_folder_stands_for_its_newest_checkpoint(saved):
    folder, model = saved
    assert DyLoRAMoE.from_pretrained(folder / "run", revision="main", subfolder="")  # as others call it
    loaded = DyLoRAMoE.from_pretrained(folder / "run", attn_implementation="eager", dtype=torch.float64)
    assert loaded.config._attn_implementation == loaded.base.config._attn_implementation == "eager"
    assert loaded.dtype == torch.float64
    torch.testing.assert_close(logits_of(loaded).float(), logits_of(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subfolder": "x"}, "no option subfolder"),
        ({"device_map": {"a": "cpu", "b": "cuda"}}, "one device, device_map names 2"),
        ({"revision": "v1"}, "is a local folder"),
        ({"base": tiny_base(), "dtype": "float64"}, "dtype: of a base model that is to be loaded, but base= gives one"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, words, saved):
    with pytest.raises(UsageError, match=words):
        DyLoRAMoE.from_pretrained(saved[0] / "run", **options)


def test_a_base_and_a_mixture_are_not_taken_for_each_other(saved):
    folder, _ = saved
    with pytest.raises(UsageError, match=r"is a model \(llama\), not a checkpoint of a mixture"):
        DyLoRAMoE.from_pretrained(folder / "base")
    with pytest.raises(UsageError, match="is a checkpoint of a mixture, not a base model"):
        DyLoRAMoE.from_base(str(folder / "run" / "checkpoint-5"))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(folder / "run" / "checkpoint-5")


def test_the_trainer_saves_a_checkpoint(saved, tmp_path):
    _, model = saved
    trainer = Trainer(model, TrainingArguments(tmp_path / "run", report_to=[]))
    trainer.save_model(str(tmp_path / "model"))
    assert torch.equal(logits_of(DyLoRAMoE.from_pretrained(tmp_path / "model")), logits_of(model))


# ---- what Transformers asks of a model ----


def test_the_config_of_the_base_stays_as_it_is():
    base = tiny_base()
    base.config._name_or_path = "org/base"
    before = base.config.to_dict() | {"_": (base.config._name_or_path, base.config._attn_implementation)}
    model = DyLoRAMoE(base, 2)
    assert base.config.to_dict() | {"_": (base.config._name_or_path, base.config._attn_implementation)} == before
    assert model.config.name_or_path == model.name_or_path == "org/base"


def test_it_answers_as_its_base():
    model, base = tiny_mixture(), tiny_base()
    assert DyLoRAMoE.can_generate() and model.dtype == torch.float32
    assert model.get_output_embeddings() is model.base.lm_head
    assert model.base_model is model.base.model and model.get_decoder() is model.base.model
    assert model.config.max_position_embeddings == base.config.max_position_embeddings
    model.config.pad_token_id = 7
    assert model.base.config.pad_token_id == 7
    model.generation_config = GenerationConfig(max_new_tokens=3)
    assert model.base.generation_config.max_new_tokens == 3
    assert model.generate(IDS, do_sample=False).shape[1] == IDS.shape[1] + 3
    model.tie_weights()
    model.add_model_tags(["a"])
    assert model.model_tags == ["a"]
    assert model.resize_token_embeddings(97) is model.get_input_embeddings()
    with pytest.raises(UsageError, match="stays at 97 tokens, and cannot become 98"):
        model.resize_token_embeddings(98)
    with pytest.raises(UsageError, match="is frozen"):
        model.set_input_embeddings(torch.nn.Embedding(97, 32))


def test_trainable_parameters_are_counted_as_peft_does(capsys):
    model = tiny_mixture(experts=1)
    trained, total = model.get_nb_trainable_parameters()
    assert (trained, total - sum(p.numel() for p in model.router.parameters())) == (
        model.peft_model.get_nb_trainable_parameters()
    )
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,} || all params: {total:,} || trainable%: ")


def test_pipeline_generates_what_the_model_generates():
    tokenizer, model = chat_tokenizer(), tiny_mixture()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "A B"
    found = generator(text, max_new_tokens=5, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    wanted = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)[0]
    assert found == wanted.tolist()


def test_it_assists_another_model_and_its_scores_can_be_read():
    model, other = tiny_mixture(), tiny_base(seed=1)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = other.generate(IDS[:1], **options)
    assert torch.equal(other.generate(IDS[:1], assistant_model=model, **options), expected)
    assert torch.equal(other.generate(IDS[:1], assistant_model=model.collapse(), **options), expected)
    out = model.generate(IDS, output_scores=True, return_dict_in_generate=True, **options)
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert scores.shape == (2, 8) and (scores <= 0).all()


def test_adapters_of_transformers_are_refused():
    for method in ("add_adapter", "load_adapter"):
        with pytest.raises(UsageError, match="a mixture has experts instead of adapters"):
            getattr(tiny_mixture(), method)("anything")


def test_the_config_is_honoured_when_a_mixture_is_loaded(saved):
    folder, _ = saved
    path = folder / "run" / "checkpoint-5"
    options = {"attn_implementation": "eager", "use_cache": False, "output_hidden_states": True}
    for given in (options, {"config": AutoConfig.from_pretrained(path, **options)}):
        model = AutoModelForCausalLM.from_pretrained(path, **given)
        assert model.base.config._attn_implementation == "eager"
        found = model(IDS)
        assert found.past_key_values is None and len(found.hidden_states) == 4
    model = AutoModelForCausalLM.from_pretrained(path, config=AutoConfig.from_pretrained(path))
    assert model.base.config._attn_implementation == "sdpa" and model(IDS).hidden_states is None
    with pytest.raises(UsageError, match="attention_dropout cannot be changed when a mixture is loaded"):
        AutoModelForCausalLM.from_pretrained(path, attention_dropout=0.5)


def test_the_config_of_a_multimodal_base_may_be_handed_on(tmp_path):
    text = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    DyLoRAMoE.from_base(tmp_path / "base", 2).save_pretrained(tmp_path / "mixture")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", use_cache=False)
    assert model.base.config.get_text_config().use_cache is False
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", config=model.config)
    assert again.base.config.get_text_config().use_cache is False


def test_a_stock_trainer_gathers_logits_and_shifts_labels(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    model, options = tiny_mixture(), {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0}
    made = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows, eval_dataset=rows)
    assert made.predict(rows).predictions.shape == (2, 12, 97)
    smoothed = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **options)
    made = Trainer(model.eval(), smoothed, train_dataset=rows)
    made.train()
    logits = model.eval()(IDS).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), label_smoothing=0.1).item()
    assert made.state.log_history[0]["loss"] == pytest.approx(wanted, rel=0.02)


def test_router_logits_are_returned_as_mixtral_does():
    model = tiny_mixture()
    logits = model(IDS, output_router_logits=True).router_logits[0]
    assert logits.shape == (IDS.numel(), 3)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(IDS.numel()))
    torch.testing.assert_close(model.base_model(IDS, output_router_logits=True).router_logits[0], logits)
    assert "router_logits" not in model(IDS)
    model.config.output_router_logits = True
    torch.testing.assert_close(model(IDS).router_logits[0], logits)


def test_one_expert_has_no_load_balancing_loss():
    """TRL would ask for router logits, of which there are none."""
    model = tiny_mixture(experts=1)
    assert (model.config.num_experts, model.config.router_aux_loss_coef) == (1, 0.0)
    model.add_expert()
    assert (model.config.num_experts, model.config.router_aux_loss_coef) == (2, 0.01)


def test_a_part_is_not_trained_without_the_router():
    """A trainer that is given `peft_model` would train the experts, and never the router."""
    model = tiny_mixture().train()
    with pytest.raises(UsageError, match="not its peft_model or base"):
        model.peft_model(input_ids=IDS)
    model(IDS, labels=IDS).loss.backward()
    assert model.router.prior.grad.abs().sum() > 0
    model.train_only([0])
    model.peft_model(input_ids=IDS)
    model.eval()
    model.peft_model(input_ids=IDS)


def template_of(folder) -> str:
    return AutoTokenizer.from_pretrained(folder, padding_side="left").chat_template


def test_the_tokenizer_of_a_checkpoint_is_its_own_or_that_of_its_run_or_base(saved, tmp_path):
    _, model = saved
    model.fresh_base().save_pretrained(tmp_path / "base")
    chat_tokenizer("base").save_pretrained(tmp_path / "base")
    chat_tokenizer("beside").save_pretrained(tmp_path)
    before, model.base.config._name_or_path = model.base.config._name_or_path, str(tmp_path / "base")
    try:
        edited, trained = (model.save_pretrained(tmp_path / name) for name in ("edited", "checkpoint-5"))
    finally:
        model.base.config._name_or_path = before
    # What is beside a folder is only known to be its tokenizer if the folder is a checkpoint of a run.
    assert (template_of(edited), template_of(trained)) == ("base", "beside")
    found, base = (AutoTokenizer.from_pretrained(folder) for folder in (edited, tmp_path / "base"))
    assert (type(found), found("A <|im_end|>").input_ids) == (type(base), base("A <|im_end|>").input_ids)
    assert pipeline("text-generation", model=str(edited)).tokenizer.chat_template == "base"
    chat_tokenizer("own").save_pretrained(edited)
    assert template_of(edited) == "own"
    (edited / "tokenizer_config.json").unlink()
    assert template_of(edited) == "own"
    DyLoRAMoE.from_pretrained(edited)


def test_a_tokenizer_that_is_not_there_is_told(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(UsageError, match=r"There is no tokenizer in .*base: expected one of tokenizer.json"):
        AutoTokenizer.from_pretrained(folder / "run" / "checkpoint-5")
    broken = copy_of(folder / "run" / "checkpoint-5", tmp_path)
    content = (broken / "config.json").read_text()
    (broken / "config.json").write_text(content.replace('"format_version"', '"format"'))
    with pytest.raises(UsageError, match=r"config.json is not sound: `dylora-moe verify` lists"):
        AutoTokenizer.from_pretrained(broken)
