"""Experts that are removed and merged, and skills that are renamed: a new checkpoint, and the old one as it was."""

from __future__ import annotations

import pytest
import torch

from dylora_moe import DyLoRAMoE, MoELoraConfig, SkillLibrary, UsageError
from dylora_moe.checkpoint.verify import find_problems, open_checkpoint
from dylora_moe.checkpoint.write import save_checkpoint
from dylora_moe.constants import expert_name
from dylora_moe.editing.edit import renumbered
from dylora_moe.editing.experts import merge, remove, rename
from dylora_moe.mixture.targets import replace_config
from dylora_moe.skills.library import Skill
from dylora_moe.skills.samples import Sample
from dylora_moe.stages.measure import routing_weights
from dylora_moe.stages.merging import experts_of, rebuilt

from ..support.edits import base_name, checkpoint, joint, logits, old_model, skills, text_of
from ..support.runs import contents
from ..support.tiny import randomise


@pytest.fixture(autouse=True)
def the_old_one_stays():
    folders = (checkpoint(), joint())
    before = [contents(folder) for folder in folders]
    yield
    assert [contents(folder) for folder in folders] == before


def file_of(folder, expert):
    name = expert_name(expert)
    return (folder / "peft_adapters" / name / name / "adapter_model.safetensors").read_bytes()


def weights_of(model, ids):
    """The probability of each expert at each token."""
    return torch.cat([routing_weights(model, {"input_ids": row}) for row in ids])


@pytest.fixture(scope="module")
def removed(tmp_path_factory):
    """What the removal of expert_1 has made."""
    return remove(checkpoint(), tmp_path_factory.mktemp("removed") / "new", [1])


def test_the_others_keep_their_bits(removed):
    made = removed
    assert find_problems(made.folder) == []
    assert made.numbering == {0: 0, 1: None, 2: 1}
    assert made.states == ["mature", "mature"]
    assert file_of(made.folder, 0) == file_of(checkpoint(), 0)
    assert file_of(made.folder, 1) == file_of(checkpoint(), 2) != file_of(checkpoint(), 1)
    old, new = old_model(), DyLoRAMoE.from_checkpoint(made.folder)
    for before, after in ((0, 0), (2, 1)):
        assert torch.equal(logits(new, after), logits(old, before))
    assert not torch.equal(logits(new, 1), logits(old, 1))
    assert skills(made.folder) == {"one": (0, 1.0), "three": (1, 3.0)}
    assert open_checkpoint(made.folder).config.step == 7
    assert open_checkpoint(made.folder).config.probe


def test_the_router_gives_each_what_it_gave_among_those_that_are_left(removed):
    new = DyLoRAMoE.from_checkpoint(removed.folder)
    ids = [text_of(1, seed=1)[0], text_of(2, seed=1)[0]]
    before, after = weights_of(old_model(), ids), weights_of(new, ids)
    left = before[:, [0, 2]] / before[:, [0, 2]].sum(1, keepdim=True)
    assert (after - left).abs().max() < 1e-6
    assert (after - before[:, :2]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("experts", "new", "problem"),
    [
        ([0, 1, 2], "new", "no expert would be left"),
        ([3], "new", "has no expert_3, only expert_0 to expert_2"),
        ([1, 1], "new", "expert_1 is named twice"),
        ([1], "taken", "exists already: name a new folder"),
        ([1], checkpoint() / "inside", "is inside the checkpoint"),
    ],
)
def test_what_cannot_be_removed(experts, new, problem, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match=problem):
        remove(checkpoint(), tmp_path / new, experts)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def update_of(model, expert, path):
    layer = dict(model.routed_layers())[path]
    name = expert_name(expert)
    return layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight


def test_two_become_one(tmp_path):
    made = merge(checkpoint(), tmp_path / "new", [2, 0], rank=8)
    assert find_problems(made.folder) == []
    assert made.numbering == {0: 0, 1: 1, 2: 0}
    assert made.notes == ["expert_0, expert_2 are one expert of rank 8, which holds 100.0% of their mean"]
    old, new = old_model(), DyLoRAMoE.from_checkpoint(made.folder)
    for path, _ in old.routed_layers():
        mean = (update_of(old, 0, path) + update_of(old, 2, path)) / 2
        assert (update_of(new, 0, path) - mean).abs().max() < 1e-5
        assert (update_of(new, 0, path) - update_of(old, 0, path)).abs().max() > 1e-2
    assert file_of(made.folder, 1) == file_of(checkpoint(), 1)
    assert skills(made.folder) == {"one": (0, None), "two": (1, 2.0), "three": (0, None)}
    for skill, expert in ((0, 0), (1, 1), (2, 0)):  # the router was fitted again
        assert weights_of(new, text_of(skill, seed=1)[:1])[-20:, expert].mean() > 0.8


def test_what_cannot_be_merged(tmp_path):
    for folder, experts, problem in (
        (checkpoint(), [1], "expected two experts or more to merge, got 1"),
        (joint(), [0, 1], "expert_1 was never trained"),
    ):
        with pytest.raises(UsageError, match=problem):
            merge(folder, tmp_path / "new", experts)
    assert list(tmp_path.iterdir()) == []


def test_a_router_that_cannot_be_fitted_is_said_so(tmp_path):
    model = randomise(DyLoRAMoE.from_base(base_name(), 3, lora=MoELoraConfig(r=4, lora_dropout=0.0)))
    folder = model.save_checkpoint(tmp_path / "joint")
    with pytest.raises(UsageError, match="joint cannot be merged in this way: no skill is known of 2 of its 2 experts"):
        merge(folder, tmp_path / "new", [0, 1])
    assert not (tmp_path / "new").exists()
    made = merge(folder, tmp_path / "new", [0, 1, 2])  # one expert needs no router
    assert (made.states, open_checkpoint(made.folder).config.experts[0].r) == (["immature"], 4)
    assert 0.3 < float(made.notes[0].split("holds ")[1].split("%")[0]) / 100 < 0.9


def test_a_skill_gets_another_name_and_nothing_else_changes(tmp_path):
    made = rename(checkpoint(), tmp_path / "new", "two", "zwei")
    assert skills(made.folder) == {"one": (0, 1.0), "zwei": (1, 2.0), "three": (2, 3.0)}
    there, here = contents(checkpoint()), contents(made.folder)
    assert {name for name in there.keys() | here.keys() if there.get(name) != here.get(name)} == {
        "skill_library.safetensors",
        "manifest.json",
    }


@pytest.mark.parametrize(
    ("name", "to", "problem"),
    [("four", "x", "there is no skill 'four'"), ("one", "two", "'two' already"), ("one", "x" * 33, "1 to 32 bytes")],
)
def test_what_cannot_be_renamed(name, to, problem, tmp_path):
    with pytest.raises(UsageError, match=problem):
        rename(checkpoint(), tmp_path / "new", name, to)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_skills_has_none_to_rename(tmp_path):
    save_checkpoint(tmp_path / "old", old_model())
    with pytest.raises(UsageError, match="there is no skill 'one'; the library has none"):
        rename(tmp_path / "old", tmp_path / "new", "one", "two")
    assert not (tmp_path / "new").exists()


def test_the_samples_of_a_skill_fit_the_experts_that_are_left():
    """A skill may have a tenth of the largest expert's bytes, which may be removed."""
    model = old_model()
    small = experts_of(model)[0]
    wide, narrow = rebuilt(model, [small]), rebuilt(model, [small])
    wide.add_expert(replace_config(small.config, r=64))
    library = SkillLibrary()
    library.add(Skill("many", 0, features=Sample.of(torch.arange(200), torch.randn(200, 32), torch.ones(200))))
    assert len(renumbered(library, {0: 0}, wide)["many"].features) == 200
    assert len(renumbered(library, {0: 0}, narrow)["many"].features) == 64
