"""The package as it is installed: built as a wheel, and used from an empty folder without the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import dylora_moe

ROOT = Path(__file__).parents[1]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "dylora_moe", *(path.name for path in ROOT.glob("requirements*.txt"))):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = run(command, source)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of a fresh environment with the wheel in it; torch and the like are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    variables = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site = Path(sysconfig.get_path("purelib", vars=variables))
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "-q", "--no-deps", str(wheel)]
    done = run(pip, folder)
    assert done.returncode == 0, done.stderr
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dylora_moe").rglob("*") if path.is_file()}
    assert names == {name for name in here if "__pycache__" not in name}
    assert {"dylora_moe/py.typed", "dylora_moe/base/presets/codegemma-2b.json"} <= names


def test_the_dependencies_are_those_of_requirements_txt(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    needed = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    needed = {line.split("<")[0].split(">")[0] for line in needed if "extra ==" not in line}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert needed == {line.split(">")[0] for line in lines if line and not line.startswith("#")}


def test_the_command_runs_from_an_empty_folder(installed, tmp_path):
    command = str(installed / "dylora-moe")
    done = run([command, "--version"], tmp_path)
    assert (done.returncode, done.stdout) == (0, f"dylora-moe {dylora_moe.__version__}\n"), done.stderr
    done = run([command, "list", "nowhere"], tmp_path)
    assert (done.returncode, done.stderr) == (2, "nowhere: expected a run folder, found nothing.\n")
    (tmp_path / "run").mkdir()
    done = run([command, "list", "run"], tmp_path)
    assert (done.returncode, done.stdout) == (0, "run: no checkpoints\n"), done.stderr
    assert run([str(installed / "python"), "-m", "dylora_moe", "list", "run"], tmp_path).stdout == done.stdout


def test_the_library_works_from_an_empty_folder(installed, tmp_path):
    """A preset is read from the package's own files, a checkpoint is written, and the command verifies it."""
    code = (
        "import dylora_moe; from pathlib import Path; assert 'env' in Path(dylora_moe.__file__).parts; "
        "model = dylora_moe.DyLoRAMoE.from_base('google/codegemma-2b', 2, weights='none'); "
        "assert model.save_checkpoint('checkpoint-1')"
    )
    done = run([str(installed / "python"), "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    done = run([str(installed / "dylora-moe"), "verify", "checkpoint-1"], tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith("✓ checkpoint-1: complete and sound, step 0, 28.2 MB")
