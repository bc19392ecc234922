"""The benchmarks run in their smallest size, and their re-checks can fail. What they measure is not tested."""

from __future__ import annotations

import argparse
import json
import os
import sys

import psutil
import pytest
import torch

from benchmarks import (
    checkpoint,
    child,
    common,
    gateway,
    generate,
    learning,
    loop,
    models,
    novelty,
    report,
    routing,
    scaling,
    scripts,
)
from benchmarks import texts as benchmark_texts
from benchmarks.common import Case, Claim, Result, Timing


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    """Other tests go on with the number of threads that they had."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(scope="module")
def ours():
    base = models.random_base(models.tiny_config(), torch.float32, "cpu")
    return models.build_ours(base, 3, r=4)


def result() -> Result:
    return Result("test", {}, machine={})


def test_describe_says_what_a_measurement_ran_on():
    facts = common.describe()
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 1 << 20
    assert facts["torch"] and facts["transformers"] and facts["cpu"]


# ---- every benchmark runs ----


@pytest.mark.parametrize(
    "benchmark",
    [
        *(pytest.param(module, id=module.__name__) for module in (routing, generate, checkpoint, scaling)),
        *(pytest.param(module, id=module.__name__, marks=pytest.mark.slow) for module in (novelty, learning, gateway)),
    ],
)
def test_benchmark_runs_in_its_smallest_size(benchmark, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert benchmark.main(["--quick", "--json", str(path)]) == common.RIGHT
    found = json.loads(path.read_text())
    assert found["tables"] and all(table["rows"] for table in found["tables"])
    assert found["checks"] and not found["problems"]
    assert "checked: " in capsys.readouterr().out
    for table in found["tables"]:
        assert f"**{table['title']}**" in report.markdown(table)


def test_scripts_are_timed_as_children(monkeypatch, capsys):
    """With a script that only writes a report: the real ones take seconds each."""
    passed = child.Child(2.0, 200 << 20, 0, "", good_report())
    monkeypatch.setattr(scripts.child, "run_script", lambda *_: passed)
    monkeypatch.setattr(scripts, "IMPORT_LINE", "pass")
    monkeypatch.setattr(scripts, "PARENT_LIMIT", 1 << 40)  # the process that runs the tests is large
    assert scripts.main(["--only", "quick", "--rounds", "1"]) == common.RIGHT
    assert "quick" in capsys.readouterr().out
    monkeypatch.setattr(scripts.child, "run_script", lambda *_: child.Child(2.0, 1, 1, "no disk", None))
    assert scripts.main(["--only", "quick", "--rounds", "1"]) == common.WRONG
    assert "exit code 1" in capsys.readouterr().err


# ---- the re-checks can fail ----


def test_loop_sees_a_wrong_value_and_a_wrong_choice(ours):
    ids = models.random_ids(ours.base, 1, 8)
    for sparse, mark in ((False, ours.mark_immature), (True, ours.mark_mature)):
        mark()
        assert loop.value_difference(ours, ids, sparse) < 1e-5
        assert loop.value_difference(ours, ids, not sparse) > 1e-4
    layer = next(layer for _, layer in ours.routed_layers())
    ours.mark_immature()
    handle = layer.register_forward_hook(lambda module, args, output: output * 1.01)
    try:
        assert loop.value_difference(ours, ids, False) > 1e-4
    finally:
        handle.remove()


def test_loop_sees_a_wrong_gradient(ours):
    ids = models.random_ids(ours.base, 1, 8)
    ours.mark_immature()
    right = loop.gradient_difference(ours, ids)
    assert max(right.values()) < 1e-4 and set(right) == {"experts", "router"}
    handle = ours.router.gate.weight.register_hook(lambda gradient: gradient * 1.1)
    try:
        assert loop.gradient_difference(ours, ids)["router"] > 0.05
    finally:
        handle.remove()
    ours.router.gate.weight.requires_grad_(False)
    try:
        assert loop.gradient_difference(ours, ids)["router"] == float("inf")
    finally:
        ours.router.gate.weight.requires_grad_(True)


def test_routing_refuses_a_peer_that_does_nothing(ours):
    idle = models.random_base(models.tiny_config(), torch.float32, "cpu")
    found = result()
    routing.check(ours, {models.X_LORA: idle}, ours.base, 3, found)
    assert [models.X_LORA in problem for problem in found.problems] == [True]


def test_generation_that_ignores_the_padding_is_seen(ours):
    ours.eval().mark_mature()
    ids, mask = generate.padded_batch(base_with_padding(ours), 8)
    assert generate.padding_difference(ours, (ids, mask), 2) < 1e-4
    wrong = torch.ones_like(mask)
    wrong_logits = generate._with_logits(ours, (ids, wrong), 2)[1]
    right_logits = generate._with_logits(ours, (ids, mask), 2)[1]
    assert (wrong_logits - right_logits).abs().max() > 1e-4


def base_with_padding(ours):
    ours.generation_config.eos_token_id, ours.generation_config.pad_token_id = None, 0
    return ours.base


def test_learning_measures_the_models_own_loss_and_mixes_evenly_only_where_it_says(ours):
    ids = models.random_ids(ours.base, 3, 20)
    ours.eval().mark_immature()
    of_model = ours(ids, labels=ids, expert=1).loss.item()
    assert learning.mean_loss(learning.expert_logits(ours, 1), ids, 0) == pytest.approx(of_model, rel=1e-5)
    assert learning.mean_loss(learning.expert_logits(ours, 0), ids, 0) != pytest.approx(of_model, rel=1e-5)
    routed = learning.token_losses(learning.expert_logits(ours), ids, 0)
    with learning.uniform(ours):
        even = learning.token_losses(learning.expert_logits(ours), ids, 0)
    assert not torch.allclose(even, routed, atol=1e-5)
    assert torch.equal(learning.token_losses(learning.expert_logits(ours), ids, 0), routed)


def test_the_right_expert_is_named_after_some_tokens(ours):
    ids = models.random_ids(ours.base, 2, 12)
    ours.eval().mark_mature()
    experts = [learning.expert_logits(ours, expert)(ids, 0) for expert in (0, 1)]
    with learning.uniform(ours):
        even = learning.expert_logits(ours)(ids, 0)
    with models.dense(ours):
        at_once, late, never = (learning.told_logits(ours, [1], after)(ids, 0) for after in (0, 4, 12))
        halves = learning.told_logits(ours, [0, 1], 0)(ids, 0)
    torch.testing.assert_close(at_once, experts[1])
    torch.testing.assert_close(never, even)
    torch.testing.assert_close(late[:, :4], even[:, :4])
    assert not torch.allclose(late[:, 4:], even[:, 4:], atol=1e-5)
    torch.testing.assert_close(halves[:, :6], experts[0][:, :6])
    assert not torch.allclose(halves[:, 6:], experts[0][:, 6:], atol=1e-5)
    routed = learning.expert_logits(ours)(ids, 0)
    assert torch.equal(learning.told_logits(ours, [0], None)(ids, 0), routed)


def test_held_out_documents_are_not_trained_on(monkeypatch):
    documents = [(f"file{i}", f"{i} " * 600 + "\n") for i in range(20)] + [("file3", "another piece of it " * 90)]
    monkeypatch.setitem(benchmark_texts.SOURCES, "made", lambda: iter(documents))
    found = benchmark_texts.corpus("made")
    assert len(found.train) + len(found.held_out) == 21 and 4 <= len(found.held_out) <= 5
    assert not set(found.train) & set(found.held_out)
    by_name = [{name for name, text in documents if text in part} for part in (found.train, found.held_out)]
    assert not by_name[0] & by_name[1]
    monkeypatch.setitem(benchmark_texts.PLACES, "made", "this test")
    assert benchmark_texts.available(["made"]) == ({}, ["made is missing: it is read from this test"])


def test_checkpoint_counts_tensors_that_differ(ours):
    other = models.build_ours(models.random_base(models.tiny_config(), torch.float32, "cpu"), 3, r=4, seed=1)
    assert checkpoint.different_tensors(ours, other) > 0
    assert checkpoint.different_tensors(ours, ours) == 0


def good_report() -> dict:
    check = {"name": "consistency", "passed": True, "problems": [], "measures": {"max_abs_diff": 0.0, "spoiled": {}}}
    return {"passed": True, "checks": [check], "total_bytes": 1, "peak_memory_bytes": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passed": False}, "did not pass"),
        ({"checks": []}, "did not pass"),
        ({"measures": {"max_abs_diff": 1e-7}}, "logits differ"),
        ({"measures": {"spoiled": {"router": 0.0}}}, "spoiling router"),
    ],
)
def test_a_script_that_passed_for_nothing_is_a_problem(change, said):
    made = good_report()
    assert child.problems("full", child.Child(1.0, 1, 0, "", made)) == []
    made["checks"] = [check | {k: v for k, v in change.items() if k == "measures"} for check in made["checks"]]
    made |= {key: value for key, value in change.items() if key != "measures"}
    assert any(said in problem for problem in child.problems("full", child.Child(1.0, 1, 0, "", made)))


def test_child_measures_time_memory_and_exit_code():
    code = "import sys; data = bytearray(60 << 20); print('made'); sys.exit(3)"
    made = child.run([sys.executable, "-c", code])
    assert (made.code, made.output.strip()) == (3, "made")
    assert made.peak_bytes > 60 << 20 and made.seconds > 0


def test_child_that_takes_too_long_is_ended():
    made = child.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    assert made.code == child.TIMED_OUT and made.seconds < 30


# ---- what they share ----


def test_ratio_is_taken_within_each_round():
    slow_machine, ours = Timing((1.0, 10.0, 1.0)), Timing((2.0, 20.0, 2.0))
    assert ours.ratio(slow_machine) == 2 and ours.ratio_spread(slow_machine) == (2, 2)


def test_cases_take_turns_and_what_comes_before_is_not_timed():
    order = []
    cases = {name: Case(lambda n=name: order.append(n), before=lambda: order.append("-")) for name in "abc"}
    timings = common.interleaved(cases, rounds=20, warmups=1)
    assert order[::2] == ["-"] * 63 and len(timings["a"].samples) == 20
    rounds = ["".join(order[1::2][i : i + 3]) for i in range(0, 63, 3)]
    assert all(sorted(names) == list("abc") for names in rounds)
    assert len(set(rounds)) == 6  # each order came: no case always follows the same one
    assert common.interleaved({"a": Case(lambda: 7.0)}, rounds=1)["a"].samples == (7.0,)


def test_slow_case_takes_part_in_the_first_rounds_only_and_is_held_against_those():
    seconds = iter((1.0, 2.0, 30.0))
    cases = {"slow": Case(lambda: 4.0, rounds=2), "fast": Case(lambda: next(seconds))}
    timings = common.interleaved(cases, rounds=3, warmups=0)
    assert timings["slow"].samples == (4.0, 4.0)
    assert timings["slow"].ratio(timings["fast"]) == 3 and timings["fast"].ratio(timings["slow"]) == 0.375


def test_wrong_answer_decides_the_exit_code_and_a_slow_one_does_not(capsys):
    def slow(args, found):
        found.claim("time", 3.0, 1.0)

    def wrong(args, found):
        found.check("logits", float("nan"), 1e-5)

    assert common.run("x", "", slow, []) == common.RIGHT
    assert "✗ time: 3.00 x, limit ≤ 1 x" in capsys.readouterr().out
    assert common.run("x", "", wrong, []) == common.WRONG
    assert "WRONG ANSWER: logits: differs by nan" in capsys.readouterr().err
    assert Claim("", 1.0, 1.0).met and not Claim("", 0.9, 1.0, at_least=True).met


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere it is not known")
def test_others_are_what_neither_we_nor_our_children_did_nor_was_idle(monkeypatch):
    spent = psutil.cpu_times()._replace(user=10, nice=1, system=2, idle=900, iowait=50, irq=0.5, softirq=0.5, steal=3)
    monkeypatch.setattr(psutil, "cpu_times", lambda: spent)
    monkeypatch.setattr(common.os, "times", lambda: os.times_result((4, 1, 2, 1, 12345)))
    assert common.seconds_of_others() == 17 - 8


def test_page_says_where_others_kept_the_machine_busy():
    busy = result()
    busy.machine = {"cpu": "a processor", "cores": 2, "memory_bytes": 1 << 30}
    for others, said in ((None, False), (0.1, False), (0.5, True)):
        busy.others = others
        assert ("other processes kept 0.5 cores busy" in report.conditions(busy.to_json())) == said


def test_flops_of_top_2_do_not_grow_with_the_experts(ours):
    gate = 2 * ours.base.config.hidden_size
    four, many = models.flops(ours.base, 8, 2, 4)[0], models.flops(ours.base, 8, 2, 64)[0]
    assert many - four == gate * 60
    assert models.flops(ours.base, 8, 4, 4)[0] > four


def test_page_is_what_the_results_say(capsys):
    assert report.main(["--check"]) == report.RIGHT, capsys.readouterr().out


def test_page_is_made_of_the_results_and_only_between_the_marks():
    table = {"name": "t", "title": "T", "columns": ["", "x"], "rows": [["a", "1"]], "note": "n"}
    page = "before 1\n<!-- r/t -->\nold 2\n<!-- end -->\nafter 3\n<!-- r/other -->\n<!-- end -->\n"
    made = report.rendered(page, {"r": {"tables": [table]}})
    assert "old 2" not in made and "| a | 1 |" in made and report.NOT_YET in made
    assert made.startswith("before 1\n") and "\nafter 3\n" in made
    assert report.rendered(made, {"r": {"tables": [table]}}) == made


def test_parameters_of_a_70b_llama():
    assert scaling.parameter_count(child.LLAMA_70B) == pytest.approx(68.98e9, rel=1e-3)


def test_quick_base_is_what_the_flags_say():
    settings: dict = {}
    models.base_of(argparse.Namespace(device="cpu", dtype=None, quick=True, model=None), settings)
    assert settings["weights"] == "random" and settings["dtype"] == "float32"
    assert settings["model"] == "tiny Llama"


def test_plots_are_drawn_from_series(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    lines = {models.PLAIN: [1.0, 1.0], models.ARROW: [1.5, 2.0], models.OURS: [1.1, 1.2], "floor, top-2": [1.0, 1.0]}
    growth = {"x": [1, 2], "label": "experts", "lines": lines}
    results = {
        "routing": {"benchmark": "routing", "series": {"training": growth, "evaluation": growth}},
        "generate": {"benchmark": "generate", "series": {"generate": {"x": ["batch 1"], "lines": lines}}},
        "scaling": {"benchmark": "scaling", "series": {"experts": growth}},
        "checkpoint": {"benchmark": "checkpoint", "series": {}},
    }
    drawn = plots.draw(results, tmp_path)
    assert sorted(path.name for path in drawn) == ["generate.png", "routing.png", "scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
