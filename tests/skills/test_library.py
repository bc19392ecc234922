"""The skill library: what is kept of each skill, and its file."""

import pytest
import torch

from dylora_moe import CheckpointError, SkillLibrary, UsageError
from dylora_moe.skills.library import Skill
from dylora_moe.skills.samples import Sample
from dylora_moe.skills.sizes import LEAST_FEATURES, LEAST_STATES, ROW_BYTES, SampleSizes, sample_sizes

SIZES = SampleSizes(features=8, states=3)


def sample(start: int, rows: int, width: int = 6) -> Sample:
    generator = torch.Generator().manual_seed(start)
    keys = torch.arange(start, start + rows)
    return Sample.of(keys, torch.randn(rows, width, generator=generator), torch.full((rows,), 2.5))


def equal(one: Sample, other: Sample) -> bool:
    return all(map(torch.equal, one.tensors(), other.tensors()))


def library() -> SkillLibrary:
    skills = SkillLibrary()
    skills.add(Skill("python", 1, tokens=100, loss=1.7, features=sample(0, 5), states=sample(9, 3)))
    skills.add(Skill("Ærøskøbing 日本"))
    return skills


def test_saved_and_loaded_to_the_bit(tmp_path):
    skills = library()
    skills.save(tmp_path / "skills.safetensors")
    loaded = SkillLibrary.load(tmp_path / "skills.safetensors")
    assert loaded.names == skills.names
    for name in skills.names:
        one, other = skills[name], loaded[name]
        assert (one.expert, one.tokens, one.loss) == (other.expert, other.tokens, other.loss)
        assert equal(one.features, other.features) and equal(one.states, other.states)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "skills.safetensors").read_bytes()
    SkillLibrary().save(tmp_path / "again.safetensors")
    assert len(SkillLibrary.load(tmp_path / "again.safetensors")) == 0
    assert (tmp_path / "again.safetensors").stat().st_size < 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "skills.safetensors"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    library().save(tmp_path / "skills.safetensors")
    before = (tmp_path / "skills.safetensors").read_bytes()

    def fail(path, data):
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dylora_moe.store.whole_files.write_new", fail)
    with pytest.raises(UsageError, match=r"cannot write .*skills\.safetensors: No space left"):
        SkillLibrary().save(tmp_path / "skills.safetensors")
    assert (tmp_path / "skills.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_two_parts_leave_what_the_whole_leaves():
    parts = [Skill("a", 0, tokens=3, features=sample(start, 6), states=sample(start, 2)) for start in (0, 20, 40)]
    orders = [parts, parts[::-1], [parts[1], parts[0], parts[2]]]
    found = []
    for order in orders:
        skills = SkillLibrary()
        for part in order:
            skills.update(part, SIZES)
        found.append(skills["a"])
    for skill in found:
        assert (skill.tokens, len(skill.features), len(skill.states)) == (9, 8, 3)
        assert equal(skill.features, found[0].features) and equal(skill.states, found[0].states)
    assert found[0].features.keys.tolist() == [0, 1, 2, 3, 4, 5, 20, 21]
    skills.update(parts[0], SIZES)  # what was there already changes nothing
    assert equal(skills["a"].features, found[0].features)


def test_an_update_keeps_what_it_does_not_know():
    skills = library()
    skills.update(Skill("python", tokens=1), SIZES)
    assert (skills["python"].expert, skills["python"].tokens, round(skills["python"].loss, 4)) == (1, 101, 1.7)
    skills.update(Skill("python", 2, loss=1.5), SIZES)
    assert (skills["python"].expert, skills["python"].loss) == (2, 1.5)
    skills.remove("python")
    assert skills.names == ["Ærøskøbing 日本"]


def test_quantised_rows_are_near_to_the_rows():
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * 30
    rows[0] = 0
    found = Sample.of(torch.arange(9), rows, torch.ones(9)).rows()
    assert (found - rows).abs().max() <= rows.abs().max() / 254 * 1.01
    assert not found[0].any()


@pytest.mark.parametrize(
    "options",
    [{"name": ""}, {"name": "x" * 33}, {"name": "a\0b"}, {"name": "\ud800"}, {"expert": -1}, {"tokens": -1}]
    + [{"loss": loss} for loss in (-0.5, float("nan"), float("inf"))],
)
def test_skills_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError, match="a skill's"):
        Skill(**{"name": "x"} | options)


def test_a_skill_of_another_base_or_of_a_name_that_is_taken_is_refused():
    skills = library()
    with pytest.raises(UsageError, match=r"features of skill 'x' have 7 .* 'python' have 6"):
        skills.add(Skill("x", features=sample(0, 2, width=7)))
    with pytest.raises(UsageError, match="have 7"):
        skills.update(Skill("python", states=sample(0, 2, width=7)), SIZES)
    with pytest.raises(UsageError, match="a skill 'python' already"):
        skills.add(Skill("python"))
    for method in (skills.remove, skills.__getitem__):
        with pytest.raises(UsageError, match="no skill 'y'; the library has python"):
            method("y")
    assert len(skills) == 2


@pytest.mark.parametrize("expert_bytes", [1 << 17, 1 << 20, 15 << 20])
def test_a_skill_takes_at_most_a_tenth_of_its_expert(expert_bytes):
    sizes, width = sample_sizes(expert_bytes, 64), 64
    assert (width + ROW_BYTES) * sum(sizes) <= expert_bytes / 10
    assert sample_sizes(1, width) == (LEAST_FEATURES, LEAST_STATES)


@pytest.mark.parametrize("content", [b"", b"not a tensor file"])
def test_a_file_that_is_something_else_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "skills.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"skills\.safetensors .*\n.*is not a skill library"):
        SkillLibrary.load(path)


def test_a_file_that_is_not_there_is_not_called_a_wrong_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"skills\.safetensors .*\n.*cannot be read \(No such file"):
        SkillLibrary.load(tmp_path / "skills.safetensors")
