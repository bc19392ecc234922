"""Two gloo processes: one checkpoint, one writer; both stop, fail and resume together, with a sharded base too."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import test_checkpoint_minimal
import test_checkpoint_save_load
import train

from ..support.runs import arguments, assert_same, newest, states, steps

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch` says it
# One tensor for all layers, and in evaluation two batches for the first rank and one for the other.
COMBINED = "--weights random --dtype bfloat16 --gradient-checkpointing --grad-accum 2 --batch-size 1 --max-steps 3"
SCENARIOS = {  # name -> (run folder, more flags, what is spoiled, exit code); FSDP2 where "sharded" is in the name
    "whole": ("whole", ["--eval-steps", "6"], None, 0),
    "stopped": ("run", ["--eval-steps", "6"], "stop", 143),
    "resumed": ("run", ["--eval-steps", "6", "--resume"], None, 0),
    "interrupted": ("ctrl-c", [], "ctrl-c", 130),
    "drifted": ("drift", [], "drift", 2),
    "router drifted": ("router", [], "router drift", 2),
    "NaN": ("nan", [], "NaN on rank 1", 2),
    "no generators": ("generators", [], "no generators on rank 1", 2),
    "full disk": ("full", [], "full disk", 2),
    "no data": ("nothing", [], "no data on rank 1", 2),
    "not a model": ("nowhere", ["--model", "./nowhere"], None, 2),
    "sharded": ("sharded", ["--eval-steps", "6"], "count shards", 0),
    "sharded, stopped": ("sharded-run", ["--eval-steps", "6"], "stop", 143),
    "sharded, resumed": ("sharded-run", ["--eval-steps", "6", "--resume"], None, 0),
    "combined": ("combined", COMBINED.split(), None, 0),
    "combined, sharded": ("combined-sharded", COMBINED.split(), None, 0),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """The folder of the runs, and what each rank got out of each scenario; all in one launch of two processes.

    Where several processes run the tests, the first one launches it, and the others wait for what it finds.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((folder / f"{rank}.json").exists() for rank in (0, 1)):
            launch(folder)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return folder, {name: [rank[i] for rank in ranks] for i, name in enumerate(SCENARIOS)}


def launch(folder: Path) -> None:
    """Run all scenarios in two processes, which write `<rank>.json` when they are done."""
    todo = [
        {
            "argv": arguments(folder / run, "--batch-size", "4", *more),
            "spoil": spoil,
            "environment": FSDP2 if "sharded" in name else {},
        }
        for name, (run, more, spoil, _) in SCENARIOS.items()
    ]
    (folder / "scenarios.json").write_text(json.dumps(todo))
    worker = [str(ROOT / "tests/support/ranks_worker.py"), str(folder / "scenarios.json"), str(folder)]
    done = subprocess.run([*TORCHRUN, *worker], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_ranks_end_alike(two, name):
    assert [rank["code"] for rank in two[1][name]] == [SCENARIOS[name][3]] * 2, two[1][name]


def test_one_rank_writes_and_speaks(two):
    folder, results = two
    assert steps(folder / "whole") == [4, 8, 12]
    assert [rank["saves"] for rank in results["whole"]] == [3, 0]
    names = {path.name for path in newest(folder / "whole").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "manifest.json"} <= names
    assert states(newest(folder / "whole")) == ["mature", "mature"]
    assert "held-out loss" in results["whole"][0]["out"]
    assert results["whole"][1]["out"] == ""


def test_the_checkpoint_validates(two, capsys):
    checkpoint = str(newest(two[0] / "whole"))
    for script in (test_checkpoint_minimal, test_checkpoint_save_load):
        assert script.main(["--checkpoint", checkpoint]) == 0
        assert "ALL TESTS PASSED" in capsys.readouterr().out


def test_a_signal_to_one_rank_stops_both_and_resuming_is_exact(two):
    folder, results = two
    assert "stopped by SIGTERM at step 7" in results["stopped"][0]["out"]
    assert "go on with: <launcher> train.py" in results["stopped"][0]["out"]
    assert steps(folder / "run") == [4, 7, 8, 12]
    for step in (4, 8, 12):
        assert_same(folder / "whole" / f"checkpoint-{step}", folder / "run" / f"checkpoint-{step}")


def test_an_echo_of_ctrl_c_is_not_a_second_one(two):
    assert steps(two[0] / "ctrl-c") == [4, 7]


def test_a_failure_on_one_rank_is_told_on_both(two):
    folder, results = two
    for name, text in (
        ("drifted", "the ranks have drifted apart, nothing was saved"),
        ("router drifted", "the ranks have drifted apart, nothing was saved"),
        ("NaN", "training has diverged at step 8, nothing was saved"),
        ("no generators", "the generators cannot be read here"),
        ("full disk", "No space left on device"),
        ("no data", "the data cannot be read here"),
        ("not a model", "There is no file or folder './nowhere'"),
    ):
        for rank in results[name]:
            assert text in rank["err"], name
            assert "Traceback" not in rank["err"]
    assert "rank 0: " in results["full disk"][1]["err"]
    assert "rank 1: " in results["no data"][0]["err"]
    assert "rank 1: " in results["NaN"][0]["err"]
    for run in ("drift", "router", "nan"):
        assert steps(folder / run) == [4]
    assert steps(folder / "full") == steps(folder / "generators") == []
    assert list((folder / "full").glob("*checkpoint*")) == []
    assert not (folder / "nothing").exists()
    assert not (folder / "nowhere").exists()


def test_a_sharded_base_is_held_in_parts(two):
    for rank in two[1]["sharded"]:
        counts = json.loads(rank["out"].partition("counted: ")[2].partition("\n")[0])
        assert counts["base"] == counts["sharded"]
        assert counts["held"] == counts["base"] // 2  # every first dimension is even
        assert counts["whole"] == counts["trained"] + counts["router"]


@pytest.mark.parametrize("run", ["sharded", "sharded-run"])
def test_a_sharded_base_gives_the_same_checkpoints(two, run):
    """And stopped and resumed as well; so what validates the one validates the other."""
    folder, _ = two
    for step in (4, 8, 12):
        assert_same(folder / "whole" / f"checkpoint-{step}", folder / run / f"checkpoint-{step}")


def test_sharding_goes_with_checkpointing_accumulation_and_random_weights(two):
    folder, _ = two
    assert_same(newest(folder / "combined"), newest(folder / "combined-sharded"))


def test_another_number_of_processes(two, tmp_path, capsys):
    folder, _ = two
    words = ["--eval-steps", "6", "--batch-size", "4", "--resume", str(folder / "whole" / "checkpoint-8")]
    assert train.main(arguments(tmp_path / "one", *words)) == 2
    assert "was written by 2 process(es), this run has 1" in capsys.readouterr().err
    assert train.main(arguments(tmp_path / "one", *words, "--accept-changes")) == 2
    assert not (tmp_path / "one").exists()
    assert train.main(arguments(tmp_path / "one", *words, "--resume-weights-only")) == 0
    assert steps(tmp_path / "one") == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_hands_a_signal_on(tmp_path, number):
    words = ["train.py", "--demo", "--max-steps", "3000", "--save-steps", "0", "--output-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*TORCHRUN, *words], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.startswith("step   10"):
            break
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"stopped by {number.name} at step" in out
    assert len(steps(tmp_path / "run")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--multi_gpu", "--use_fsdp --fsdp_version 2"])
def test_accelerate_launch(tmp_path, kind):
    words = f"{kind} --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words.split()]
    words = ["train.py", *arguments(tmp_path / "run")]  # says --device cpu
    done = subprocess.run(
        [*launch, *words],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("FSDP2: each of 2 processes keeps" in done.stdout) == ("fsdp" in kind)
    assert steps(tmp_path / "run") == [4, 8, 12]
    assert (newest(tmp_path / "run") / "rng_state_1.pth").exists()
