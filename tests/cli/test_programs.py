"""`dylora-moe run`: other programs by their commands and modules, and what lm-eval and `transformers serve` answer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dylora_moe import DyLoRAMoE, MoELoraConfig, RouterConfig
from dylora_moe.base.preserve import seeded
from dylora_moe.cli.main import main
from dylora_moe.errors import DyLoRAMoEError

from ..support.data import chat_tokenizer
from ..support.scripts import ROOT, copy_of
from ..support.tiny import randomise

PROGRAM = """
import json, sys
from dylora_moe.errors import CheckpointError, UsageError
print(json.dumps(sys.argv))
def main():
    print(json.dumps(sys.argv))
    return {"0": None, "3": 3, "bad": "it is bad"}[sys.argv[1]]
if sys.argv[1:] and __name__ == "__main__":
    if sys.argv[1] == "usage":
        raise UsageError("mend it")
    if sys.argv[1] == "checkpoint":
        raise CheckpointError("there", ["router.safetensors: missing"])
    if sys.argv[1] == "bug":
        raise ValueError("a bug of the program")
    sys.exit(4)
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with a module, and an installed package that has a command."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "some_program.py").write_text(PROGRAM)
    installed = tmp_path / "site" / "some_package-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Name: some-package\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[console_scripts]\nsome-command = some_program:main\n")
    for folder in ("site", "here"):
        monkeypatch.syspath_prepend(tmp_path / folder)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["dylora-moe"])
    monkeypatch.delitem(sys.modules, "some_program", raising=False)
    return tmp_path / "here"


def exit_of(*words: str) -> object:
    with pytest.raises(SystemExit) as left:
        main(["run", *words])
    return left.value.code


# ---- any program ----


def test_a_module_gets_every_word_as_it_is_and_its_exit_code_counts(place, capsys):
    words = ["x", "--model_args", "a=1,b_c=2", "--help", "two\nlines", "--", "verify"]
    assert exit_of("some_program", *words) == 4
    assert json.loads(capsys.readouterr().out) == [str(place / "some_program.py"), *words]


@pytest.mark.parametrize(("word", "code"), [("0", None), ("3", 3), ("bad", "it is bad")])
def test_a_command_is_called_as_its_script_does(word, code, place, capsys):
    assert exit_of("some-command", word, "--a_b") == code  # sys.exit prints a text, and exits with 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == ["some-command", word, "--a_b"]


@pytest.mark.parametrize("name", ["some-comand", "some_program.py", "json.nothing", "nothing.at.all", "a b", "json"])
def test_a_program_that_is_not_there_is_one_message(name, place, capsys):
    assert main(["run", name, "x"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"there is no program {name}") and err.count("\n") == 1 and out == ""
    assert ("(did you mean some-command?)" in err) == (name == "some-comand")


def test_what_the_user_can_mend_is_one_message_and_a_bug_is_the_programs(place, capsys):
    for word, told in (("usage", "mend it\n"), ("checkpoint", "there is not a sound checkpoint:\n")):
        assert main(["run", "some_program", word]) == 2
        assert capsys.readouterr().err.startswith(told)
    assert main(["run", "some_program", "bug"]) == 1
    assert capsys.readouterr().err.endswith("ValueError: a bug of the program\n")


def test_only_the_program_imports_torch(place):
    (place / "light.py").write_text("import sys; print(*sorted({'dylora_moe', 'torch', 'numpy'} & set(sys.modules)))")
    command = [sys.executable, "-m", "dylora_moe", "run", "light"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("dylora_moe\n", 0), done.stderr


# ---- lm-eval and transformers serve ----

slow = pytest.mark.slow
needs = {name: importlib.util.find_spec(name) for name in ("lm_eval", "fastapi", "openai")}
TEXTS = ("the router sends", "each token of a text")
CHOICES = ("to an expert", "away")
LENGTH = 8


@pytest.fixture(scope="module")
def mixture() -> DyLoRAMoE:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with seeded(0):
        base = LlamaForCausalLM(
            LlamaConfig(vocab_size=264, **sizes, max_position_embeddings=512, initializer_range=0.1)
        )
    router = RouterConfig(decay=0.5)  # so that the route changes within a few tokens
    model = randomise(DyLoRAMoE(base, 2, lora=MoELoraConfig(r=4, lora_alpha=8), router=router))
    model.mark_mature()
    return model.eval()


@pytest.fixture(scope="module")
def saved(mixture, tmp_path_factory) -> Path:
    """Its checkpoint, beside which is no tokenizer: that is in the folder of the base."""
    folder = tmp_path_factory.mktemp("saved")
    mixture.fresh_base().save_pretrained(folder / "base")
    chat_tokenizer().save_pretrained(folder / "base")
    mixture.base.config._name_or_path = str(folder / "base")
    return mixture.save_checkpoint(folder / "mixture")


def greedy(model: DyLoRAMoE, ids: list[int], **options) -> str:
    answer = model.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False, **options)
    return chat_tokenizer().decode(answer[0, len(ids) :], skip_special_tokens=True)


def log_likelihood(model: DyLoRAMoE, text: str, more: str, **options) -> float:
    before, ids = (chat_tokenizer()(each)["input_ids"] for each in (text, text + more))
    with torch.no_grad():
        found = model(torch.tensor([ids]), **options).logits[0].log_softmax(-1)
    return sum(found[place - 1, ids[place]].item() for place in range(len(before), len(ids)))


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder with two tasks of lm-eval on local data; the cache is there, too."""
    rows = [{"text": text, "choices": list(CHOICES)} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task = files | {"test_split": "test", "doc_to_text": "{{text}}", "target_delimiter": ""}
    choose = {"task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
    write = {"task": "write", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    write["generation_kwargs"] = {"until": ["\0"], "max_gen_toks": LENGTH, "do_sample": False}
    for each, metric in ((choose, "acc"), (write, "exact_match")):
        metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
        (tmp_path / f"{each['task']}.yaml").write_text(yaml.safe_dump(task | each | {"metric_list": metrics}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["dylora-moe"])
    return tmp_path


def by_command(folder: Path, model: str, arguments: str) -> dict[str, list[dict]]:
    """The samples of each task, as the command lm_eval writes them."""
    flags = ["--tasks", "choose,write", "--include_path", str(folder), "--device", "cpu", "--batch_size", "2"]
    words = ["--model", model, "--model_args", arguments, *flags, "--log_samples", "--output_path", str(folder / "out")]
    assert exit_of("lm_eval", *words) is None
    found = {name: next((folder / "out").rglob(f"samples_{name}_*.jsonl")) for name in ("choose", "write")}
    return {name: list(map(json.loads, path.read_text().splitlines())) for name, path in found.items()}


def by_function(folder: Path, model: str, arguments: str) -> dict[str, list[dict]]:
    """As `by_command`, without the seconds in which the command reads all tasks of lm-eval."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = {"tasks": ["choose", "write"], "task_manager": manager, "device": "cpu", "batch_size": 2}
    return lm_eval.simple_evaluate(model, arguments, **options, bootstrap_iters=0)["samples"]


@slow
@pytest.mark.skipif(needs["lm_eval"] is None, reason="needs lm-eval: pip install -r requirements-slow.txt")
def test_lm_eval_computes_what_the_mixture_computes(saved, mixture, tasks):
    runs = [(by_command, "dylora_moe", ",expert=1", {"expert": 1}), (by_function, "hf", "", {})]
    runs += [(by_function, "dylora_moe", more, options) for more, options in (
        ("", {}), (",expert=expert_0", {"expert": 0}))]  # fmt: skip
    found = []
    for run, model, more, options in runs:
        samples = run(tasks, model, f"pretrained={saved}{more}")
        losses = [float(choice[0][0]) for row in samples["choose"] for choice in row["resps"]]
        texts = [row["resps"][0][0] for row in samples["write"]]
        expected = [log_likelihood(mixture, text, choice, **options) for text in TEXTS for choice in CHOICES]
        assert losses == pytest.approx(expected, abs=1e-4)
        assert texts == [greedy(mixture, chat_tokenizer()(text)["input_ids"], **options) for text in TEXTS]
        found.append((losses, texts))
    (one, a), (routed, b), (again, c), (zero, d) = found
    assert routed == pytest.approx(again, abs=1e-5) and b == c and len({str(texts) for texts in (a, b, d)}) == 3
    assert min(abs(x - y) for x, y in zip(zero, one, strict=True)) > 1e-2


@slow
@pytest.mark.skipif(needs["lm_eval"] is None, reason="needs lm-eval: pip install -r requirements-slow.txt")
def test_the_model_of_lm_eval_refuses_what_it_cannot_honour(saved, tmp_path):
    from dylora_moe.cli.harness import REFUSED, MixtureLM

    broken = copy_of(saved, tmp_path)
    (broken / "router.safetensors").unlink()
    for options, told in (
        ({"expert": 2}, "expert must be None or 0 to 1, got 2"),
        ({"expert": "second"}, "expert=second: expected expert_0 to expert_1"),
        ({"backend": "seq2seq"}, "a mixture is a causal LM"),
        (
            {"pretrained": str(broken), "tokenizer": str(saved.parent / "base")},
            "is not a sound checkpoint:\n  - router.safetensors: ",
        ),
        *(({name: "x"}, f"has no {name}=: ") for name in REFUSED),
    ):
        with pytest.raises(DyLoRAMoEError, match=re.escape(told)):
            MixtureLM(**{"pretrained": str(saved), "device": "cpu"} | options)


@slow
@pytest.mark.skipif(
    needs["fastapi"] is None or needs["openai"] is None,
    reason="needs fastapi and openai: pip install -r requirements-slow.txt",
)
def test_transformers_serves_what_the_mixture_says(saved, mixture, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-m", "dylora_moe", "run", "transformers", "serve", str(saved), *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    chat = [{"role": "user", "content": "what is 3?"}]
    body = {"model": str(saved), "messages": chat, "max_tokens": LENGTH, "temperature": 0}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            answer = answered(server, f"{url}/v1/chat/completions", body)
        finally:
            server.terminate()
            server.wait(30)
    ids = chat_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    said = greedy(mixture, ids)
    assert answer["choices"][0]["message"]["content"] == said
    with mixture.disable_experts():
        assert said not in (greedy(mixture, ids), *(greedy(mixture, ids, expert=i) for i in range(2)))


def answered(server: subprocess.Popen, url: str, body: dict) -> dict:
    """What a server answers once it listens."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(600):
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                return json.load(found)
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.2)
    raise AssertionError("no answer")
