"""Whether a text is a known skill or a new one."""

import numpy as np
import pytest
import torch

from dylora_moe import DyLoRAMoE, NoveltyDetector, SkillLibrary, UsageError
from dylora_moe.skills.features import collect, read_states, windows_of
from dylora_moe.skills.library import Skill
from dylora_moe.skills.novelty import Metric, ledoit_wolf
from dylora_moe.skills.sizes import SampleSizes

from ..support.tiny import random_ids, randomise, tiny_base, tiny_mixture

SIZES = SampleSizes(features=8, states=24)
LENGTH = 60


def ids_of(skill: int, number: int, seed: int = 0) -> np.ndarray:
    """(number, 60) tokens, 20 of which are those of the skill."""
    return np.random.default_rng([skill, seed]).integers(3 + 20 * skill, 23 + 20 * skill, (number, LENGTH), np.int32)


@pytest.fixture(scope="module")
def model() -> DyLoRAMoE:
    return tiny_mixture()


def library_of(model: DyLoRAMoE, *skills: int) -> SkillLibrary:
    library = SkillLibrary()
    for skill in skills:
        found = collect(model, [{"input_ids": row} for row in ids_of(skill, 24)], SIZES)
        library.add(Skill(f"s{skill}", features=found.features, states=found.states))
    return library


def states_of(model: DyLoRAMoE, skill: int, number: int = 4) -> torch.Tensor:
    return read_states(model, list(ids_of(skill, number, seed=1)))


@pytest.mark.parametrize("skills", [(0, 1), (0,)], ids=["two skills", "one"])
def test_what_was_seen_is_known_and_another_skill_is_new(model, skills):
    detector = NoveltyDetector(model, library_of(model, *skills))
    for skill in skills:
        verdict = detector.judge(states_of(model, skill))
        assert verdict.known and verdict.skill == f"s{skill}" and verdict.distance <= verdict.threshold
    verdict = detector.judge(states_of(model, 3))
    assert not verdict.known and verdict.distance > verdict.threshold


def test_documents_are_told_apart_and_each_is_allowed_more_than_a_whole_text(model):
    detector = NoveltyDetector(model, library_of(model, 0, 1))
    documents = [ids_of(skill, 1, seed=2)[0].tolist() for skill in (0, 3, 1)]
    found = detector.judge_documents([*documents, [3, 4, 5]])
    assert [verdict and verdict.known for verdict in found] == [True, False, True, None]
    assert (found[0].skill, found[2].skill) == ("s0", "s1")
    whole = detector.judge(read_states(model, [np.array(documents[0], np.int32)]))
    assert found[0].distance == whole.distance and found[0].threshold == pytest.approx(1.1 * whole.threshold)


def test_the_distance_from_the_fitting_windows_would_reject_what_is_known(model):
    """Why thresholds are cross-validated: a skill's own windows are much nearer to their mean than new ones of it."""
    states = [skill.states.rows().double() for skill in library_of(model, 0, 1)]
    metric = Metric(states)
    fitted = metric.distances(states[0])[:, 0].quantile(0.9)
    unseen = metric.distances(states_of(model, 0, 12).double())[:, 0].quantile(0.5)
    assert unseen > fitted


def test_a_covariance_of_few_rows_is_shrunk_and_one_of_many_is_not():
    rows = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = rows * torch.tensor([3.0, 1, 1, 1, 1, 1])
    wide = [ledoit_wolf(part - part.mean(0)).diagonal() for part in (rows[:5], rows)]
    ratios = [diagonal[0] / diagonal[1:].mean() for diagonal in wide]
    assert ratios[1] == pytest.approx(9, rel=0.1)
    few = torch.cov(rows[:5].T).diagonal()
    assert ratios[0] < few[0] / few[1:].mean()


def test_states_do_not_depend_on_experts_and_leave_out_the_first_token(model):
    ids = ids_of(0, 1)
    found = read_states(model, ids)
    assert torch.equal(read_states(randomise(tiny_mixture(), seed=8), ids), found)
    hidden = tiny_base().model(torch.tensor(ids).long()).last_hidden_state[0]
    assert torch.allclose(found[0], hidden[1:].mean(0), atol=1e-5)
    assert not torch.allclose(found[0], hidden.mean(0), atol=1e-5)


def test_windows():
    assert [len(window) for window in windows_of(np.arange(300))] == [128, 128, 44]
    assert [len(window) for window in windows_of(np.arange(280))] == [128, 128]
    assert [len(window) for window in windows_of(np.arange(20))] == [20]
    assert windows_of(np.arange(1)) == []


def test_what_cannot_be_judged_is_refused(model):
    library = SkillLibrary()
    library.add(Skill("x"))
    with pytest.raises(UsageError, match="at least 8 windows of text, of 128 tokens each, found 0 windows of x; train"):
        NoveltyDetector(model, library)
    library = library_of(model, 0)
    library.add(Skill("few", states=library["s0"].states.smallest(7)))
    assert NoveltyDetector(model, library).left_out == ["few"]
    with pytest.raises(UsageError, match="less than two tokens"):
        NoveltyDetector(model, library_of(model, 0, 1)).judge(torch.empty(0, 32))
    with pytest.raises(UsageError, match="have 31 numbers, those of the skills have 32"):
        NoveltyDetector(model, library_of(model, 0, 1)).judge(torch.zeros(4, 31))
    with torch.device("meta"):
        base = tiny_base()
    with pytest.raises(UsageError, match="has no weights"):
        read_states(DyLoRAMoE(base, 2), [random_ids(9).numpy()])
