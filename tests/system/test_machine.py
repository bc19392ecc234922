"""Memory and disk: every limit counts, and too little is one clear error before anything is allocated."""

import sys

import pytest

from dylora_moe.checkpoint.probe import arithmetic
from dylora_moe.errors import UsageError
from dylora_moe.system import machine

GB = 1 << 30


class Memory:
    available = 10 * GB
    total = 16 * GB


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 10 GB available whose /proc/self and /sys/fs/cgroup are folders of the test."""
    import psutil

    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    groups.mkdir()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(machine, "PROC_SELF", proc)
    monkeypatch.setattr(machine, "CGROUP", groups)
    monkeypatch.setattr(machine, "_free_address_space", list)
    return proc, groups


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_limits_the_machine_decides(system):
    assert machine.available_memory() == 10 * GB


def test_cgroup_v2_limit_of_a_parent_binds(system):
    proc, groups = system
    write(proc, cgroup="0::/a/b")
    write(groups / "a" / "b", memory__max="max", memory__current=GB)
    write(groups / "a", memory__max=4 * GB, memory__current=3 * GB, memory__stat=f"anon 1\ninactive_file {GB}")
    assert machine.available_memory() == 2 * GB


def test_cgroup_v2_in_a_container_whose_path_is_the_hosts(system):
    proc, groups = system
    write(proc, cgroup="0::/docker/0123")
    write(groups, memory__max=3 * GB, memory__current=GB)
    assert machine.available_memory() == 2 * GB


def test_cgroup_v1(system):
    proc, groups = system
    write(proc, cgroup="5:cpu:/x\n4:memory:/x")
    write(groups / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GB)
    write(groups / "memory" / "x", memory__limit_in_bytes=5 * GB, memory__usage_in_bytes=2 * GB)
    assert machine.available_memory() == 3 * GB


def test_usage_above_the_limit_leaves_nothing(system):
    proc, groups = system
    write(proc, cgroup="0::/")
    write(groups, memory__max=GB, memory__current=2 * GB)
    assert machine.available_memory() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_AS is POSIX")
def test_address_space_limit_counts(system, monkeypatch):
    import resource

    proc, _ = system
    write(proc, status="Name:\tpython\nVmSize:\t 1048576 kB\nVmHWM:\t 2048 kB")
    monkeypatch.undo()
    monkeypatch.setattr(machine, "PROC_SELF", proc)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GB + 5000, GB + 5000))
    assert machine.available_memory() == 5000


def test_peak_memory_is_the_high_water_mark(system):
    proc, _ = system
    write(proc, status="VmPeak:\t 99999 kB\nVmHWM:\t 2048 kB")
    assert machine.peak_memory() == 2048 * 1024


def test_peak_memory_without_proc(system):
    assert 1 << 20 < machine.peak_memory() < 1 << 40


def test_free_disk_of_a_path_that_is_not_there_yet(tmp_path):
    assert machine.free_disk(tmp_path / "not" / "yet") == pytest.approx(machine.free_disk(tmp_path), rel=0.1)


def test_too_little_memory_names_both_numbers_and_the_cheaper_script(system):
    machine.need_memory(10 * GB, "the base model")
    with pytest.raises(UsageError) as error:
        machine.need_memory(12 * GB, "the base model", "python test_checkpoint_minimal.py")
    for part in ("the base model", "12.0 GB", "10.0 GB", "python test_checkpoint_minimal.py"):
        assert part in str(error.value)


def test_too_little_disk_names_both_numbers_and_the_place(tmp_path, monkeypatch):
    machine.need_disk(1, tmp_path, "the checkpoint")
    monkeypatch.setattr(machine, "free_disk", lambda path: 3 << 20)
    with pytest.raises(UsageError) as error:
        machine.need_disk(30 << 20, tmp_path / "run", "the checkpoint", "python test_checkpoint_quick.py")
    for part in ("the checkpoint", "30.0 MB", "3.0 MB", str(tmp_path / "run"), "python test_checkpoint_quick.py"):
        assert part in str(error.value)


def test_products_in_tf32_are_told_whichever_way_they_are_turned_on(monkeypatch):
    import torch

    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    assert arithmetic(torch.device("cuda")).endswith("a GPU")
    for where in (torch.backends, torch.backends.cuda.matmul):
        before = where.fp32_precision
        try:
            where.fp32_precision = "tf32"
            assert arithmetic(torch.device("cuda")).endswith("a GPU, products in TF32")
        finally:
            where.fp32_precision = before
    assert arithmetic(torch.device("cuda")).endswith("a GPU")


@pytest.mark.parametrize("package", ["torch", "transformers", "dylora_moe.checkpoint.probe"])
def test_another_version_may_round_differently(package, monkeypatch):
    import importlib

    import torch

    before = arithmetic(torch.device("cpu"))
    assert arithmetic(torch.device("cpu")) == before
    monkeypatch.setattr(importlib.import_module(package), "__version__", "99")
    after = arithmetic(torch.device("cpu"))
    assert after != before and " 99" in after
