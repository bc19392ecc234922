"""What is collected from blocks, and the router that is fitted to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from dylora_moe import DyLoRAMoE, SkillLibrary, UsageError
from dylora_moe.base.preserve import seeded
from dylora_moe.mixture.router import Tokens, forgetting_sums, normalised
from dylora_moe.skills.features import PLACES, collect
from dylora_moe.skills.fit import fit_router
from dylora_moe.skills.library import Skill
from dylora_moe.skills.samples import Sample
from dylora_moe.skills.sizes import SampleSizes

from ..support.tiny import ARCHITECTURES, random_ids, randomise, tiny_base, tiny_mixture

SIZES = SampleSizes(features=40, states=8)
LENGTH = 60


def rows_of(skill: int, number: int, seed: int = 0) -> np.ndarray:
    """(number, 60) tokens; each skill has 30 tokens, 10 of which it shares with the next one."""
    return np.random.default_rng([skill, seed]).integers(3 + 20 * skill, 33 + 20 * skill, (number, LENGTH))


def blocks_of(skill: int, number: int = 30, seed: int = 0) -> list[dict]:
    return [{"input_ids": row.tolist()} for row in rows_of(skill, number, seed)]


def sums_of(model: DyLoRAMoE, ids: torch.Tensor) -> torch.Tensor:
    """What the router reads after each token, (T, D + 1): the sum, and how many tokens it counts."""
    embeddings = normalised(model.get_input_embeddings()(ids[None]).detach())
    begins = torch.arange(len(ids))[None] == 0
    return forgetting_sums(embeddings, Tokens(~begins, begins), model.router.config.decay)[0]


def equal(one: Sample, other: Sample) -> bool:
    return all(map(torch.equal, one.tensors(), other.tensors()))


def three_skills(model: DyLoRAMoE, order: tuple[int, ...] = (0, 1, 2), parts: int = 1) -> SkillLibrary:
    library = SkillLibrary()
    for skill in order:
        blocks = blocks_of(skill)
        for part in range(parts):
            found = collect(model, blocks[part::parts], SIZES)
            library.update(Skill(f"s{skill}", skill, features=found.features, states=found.states), SIZES)
    return library


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_features_are_what_the_router_reads_and_neither_depends_on_experts(kind):
    model = tiny_mixture(kind)
    ids = random_ids(40)
    found = collect(model, [{"input_ids": ids.tolist()}], SIZES)
    assert (found.tokens, len(found.states)) == (40, 1)
    expected = sums_of(model, ids)[[16, 32]]
    order = found.features.counts.argsort()
    assert torch.equal(found.features.counts[order], expected[:, -1])
    assert torch.allclose(found.features.rows()[order], expected[:, :-1], atol=expected.abs().max() / 200)
    again = collect(randomise(model, seed=8), [{"input_ids": ids.tolist()}], SIZES)
    assert equal(again.features, found.features) and equal(again.states, found.states)


@pytest.mark.parametrize(
    ("length", "places"),
    [
        (2, [(0, 1)]),
        (12, [(0, 11)]),  # a short document has one feature, after its last token
        (17, [(0, 16)]),
        (257 + 16, [(0, place) for place in PLACES]),  # 16 tokens more are too few for another piece
        (2 * 257 + 40, [*((start, place) for start in (0, 257) for place in PLACES), (514, 16), (514, 32)]),
    ],
)
def test_features_come_from_all_of_a_document(length, places):
    model = tiny_mixture()
    ids = torch.tensor(np.random.default_rng(3).integers(3, 90, length))
    found = collect(model, [{"input_ids": ids.tolist()}], SIZES)
    expected = torch.stack([sums_of(model, ids[start:])[place] for start, place in places])
    assert len(found.features) == len(places)
    assert torch.allclose(found.features.rows().sum(0), expected[:, :-1].sum(0), atol=expected.abs().max() / 10)
    assert torch.equal(found.features.counts.sort().values, expected[:, -1].sort().values)


def test_documents_of_a_block_are_kept_apart_and_padding_is_left_out():
    model = tiny_mixture()
    one, two = random_ids(2, 12).tolist()
    alone = collect(model, [{"input_ids": row} for row in (one, two)], SIZES)
    packed = {"input_ids": one + two + [0] * 6, "position_ids": [*range(12), *range(12), *range(6)]}
    packed |= {"labels": [-100, *one[1:], -100, *two[1:], *[-100] * 6]}
    found = collect(model, [packed], SIZES)
    assert found.tokens == 24 and equal(found.features, alone.features)
    padded = [{"input_ids": row + [0] * 6, "attention_mask": [1] * 12 + [0] * 6} for row in (one, two)]
    found = collect(model, Dataset.from_list(padded), SIZES)
    assert found.tokens == 24 and equal(found.features, alone.features) and equal(found.states, alone.states)
    unmarked = collect(model, [{"input_ids": one + two}], SIZES)
    assert not equal(unmarked.features, alone.features)


def test_order_and_parts_change_no_bit_of_samples_and_router():
    routers = []
    for order, parts in (((0, 1, 2), 1), ((2, 0, 1), 1), ((0, 1, 2), 3)):
        model = tiny_mixture()
        library = three_skills(model, order, parts)
        fit_router(model.router, library)
        routers.append([*model.router.state_dict().values(), *library["s1"].features.tensors()])
    for other in routers[1:]:
        assert all(map(torch.equal, routers[0], other))
    assert len(library["s1"].features) == SIZES.features  # fewer than there are


def test_a_fitted_router_knows_held_out_rows_and_one_fitted_to_mixed_up_skills_does_not():
    model = tiny_mixture(experts=3)
    library, mixed = three_skills(model), SkillLibrary()
    for skill in library:  # for each expert, the text of another one
        mixed.add(Skill(skill.name, skill.expert, features=library[f"s{(skill.expert + 1) % 3}"].features))

    def own(skills: SkillLibrary) -> list[float]:
        """The probability of each skill's own expert after 32 tokens of its held-out rows."""
        fit_router(model.router, skills)
        found = []
        for skill in range(3):
            rows = torch.tensor(rows_of(skill, 20, seed=1))
            begins = torch.zeros(rows.shape, dtype=torch.bool)
            begins[:, 0] = True
            sums = model.router.sums(model.get_input_embeddings()(rows), Tokens(~begins, begins))
            found.append(model.router.logits(sums).softmax(-1)[:, 32:, skill].mean().item())
        return found

    assert min(own(library)) > 0.8
    assert max(own(mixed)) < 0.4


def test_two_skills_of_one_expert_and_a_temperature():
    model = tiny_mixture(experts=2)
    library = SkillLibrary()
    for skill, expert in enumerate((0, 1, 0)):
        found = collect(model, blocks_of(skill), SIZES)
        library.add(Skill(f"s{skill}", expert, features=found.features))
    fit_router(model.router, library)
    ids = torch.tensor(rows_of(2, 1, seed=1))
    weights = model.router.logits(_sums(model, ids)).softmax(-1)[0, -1]
    assert weights[0] > 0.8
    with seeded(0):
        hotter = tiny_mixture(experts=2, router=type(model.router.config)(temperature=2.0))
    fit_router(hotter.router, library)
    assert torch.allclose(hotter.router.logits(_sums(model, ids, hotter)).softmax(-1)[0, -1], weights, atol=1e-5)


def _sums(model: DyLoRAMoE, ids: torch.Tensor, other: DyLoRAMoE | None = None) -> torch.Tensor:
    begins = torch.zeros(ids.shape, dtype=torch.bool)
    begins[:, 0] = True
    return (other or model).router.sums(model.get_input_embeddings()(ids), Tokens(~begins, begins))


def test_what_cannot_be_fitted_is_refused_by_name():
    model = tiny_mixture(experts=3)
    before = {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    library = three_skills(model)
    library.remove("s1")
    with pytest.raises(UsageError, match=r"no skill with text is known of expert_1; add one by SkillLibrary\.update"):
        fit_router(model.router, library)
    with pytest.raises(UsageError, match="s2: skills of experts beyond 1"):
        fit_router(tiny_mixture(experts=2).router, library)
    twice = SkillLibrary()
    for i in range(2):
        twice.add(replace(library["s0"], name=f"the same {i}", expert=i))
    with pytest.raises(UsageError, match="all skills have the same text, so that nothing tells them apart"):
        fit_router(tiny_mixture(experts=2).router, twice)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.router.state_dict().items())


def test_collecting_leaves_mode_generator_and_gradients_alone():
    model = tiny_mixture().train()
    state, required = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    collect(model, blocks_of(0, 2), SIZES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == required


def test_what_cannot_be_collected_is_refused():
    with pytest.raises(UsageError, match="no text"):
        collect(tiny_mixture(), [{"input_ids": [3, 4], "attention_mask": [0, 0]}], SIZES)
    with torch.device("meta"):
        base = tiny_base()
    with pytest.raises(UsageError, match="has no weights"):
        collect(DyLoRAMoE(base, 2), blocks_of(0, 1), SIZES)
