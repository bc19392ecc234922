"""The skill library and the novelty detector."""

import itertools
import os
from pathlib import Path

import pytest
import torch

from dylora_moe import CheckpointError, DyLoRAMoE, NoveltyDetector, SkillLibrary, UsageError
from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_base, load_tokenizer
from dylora_moe.skills.library import EMBEDDING_DIM
from dylora_moe.skills.novelty import Whitening

from ..support.tiny import ARCHITECTURES, random_ids, randomise, tiny_base, tiny_mixture

INCLUDE = Path("/usr/include")


def unit(index):
    return torch.eye(EMBEDDING_DIM)[index]


def library():
    skills = SkillLibrary()
    skills.add("python", unit(0) * 3, expert=1)
    skills.add("prose", unit(1))
    return skills


def test_nearest():
    found = library().nearest(0.8 * unit(0) + 0.6 * unit(1), k=5)
    assert [(s.name, s.expert, round(s.similarity, 4)) for s in found] == [("python", 1, 0.8), ("prose", None, 0.6)]
    assert SkillLibrary().nearest(unit(0)) == []


def test_adding_a_name_again_replaces_it():
    skills = library()
    skills.add("python", unit(5))
    assert len(skills) == 2
    assert skills.expert_of("python") is None
    assert skills.nearest(unit(5))[0].similarity == pytest.approx(1)


def test_saved_and_loaded_to_the_bit(tmp_path):
    skills = library()
    skills.add("Ærøskøbing 日本", torch.randn(EMBEDDING_DIM), expert=0)
    skills.save(tmp_path / "skills.safetensors")
    loaded = SkillLibrary.load(tmp_path / "skills.safetensors")
    assert (loaded.names, loaded.experts) == (skills.names, skills.experts)
    assert torch.equal(loaded.embeddings, skills.embeddings)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "skills.safetensors").read_bytes()
    SkillLibrary().save(tmp_path / "empty.safetensors")
    assert len(SkillLibrary.load(tmp_path / "empty.safetensors")) == 0


def test_a_skill_takes_a_fixed_small_size(tmp_path):
    sizes = []
    for count in (1, 2, 3):
        skills = SkillLibrary()
        for index in range(count):
            skills.add("x" * (1 + 15 * index), unit(index))
        skills.save(tmp_path / "skills.safetensors")
        sizes.append((tmp_path / "skills.safetensors").stat().st_size)
    assert max(b - a for a, b in itertools.pairwise(sizes)) < 400


@pytest.mark.parametrize(
    "name, embedding, expert",
    [
        ("", unit(0), None),
        ("x" * 33, unit(0), None),
        ("a\0b", unit(0), None),
        ("x", torch.zeros(EMBEDDING_DIM), None),
        ("x", unit(0) * float("nan"), None),
        ("x", torch.ones(3), None),
        ("x", unit(0), -1),
    ],
)
def test_skills_that_make_no_sense_are_refused(name, embedding, expert):
    skills = library()
    with pytest.raises(UsageError):
        skills.add(name, embedding, expert)
    assert skills.names == ["python", "prose"]


@pytest.mark.parametrize("content", [b"", b"not a tensor file"])
def test_a_file_that_is_something_else_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "skills.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"skills\.safetensors .*\n.*is not a skill library"):
        SkillLibrary.load(path)


def test_a_file_that_is_not_there_is_not_called_a_wrong_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"skills\.safetensors .*\n.*cannot be read \(No such file"):
        SkillLibrary.load(tmp_path / "skills.safetensors")


def test_novelty():
    detector = NoveltyDetector(library(), threshold=0.7)
    assert not detector.is_novel(unit(0) + 0.5 * unit(1))
    assert detector.is_novel(unit(7))
    assert NoveltyDetector(SkillLibrary()).is_novel(unit(0))
    with pytest.raises(UsageError, match="novelty threshold"):
        NoveltyDetector(library(), threshold=2)


def test_whitening_spreads_the_states_alike():
    states = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 5, 5, 5, 5]) + 7
    whitening = Whitening(states)
    white = torch.stack([whitening(state) for state in states])
    assert white.mean(0).abs().max() < 1e-3
    assert white.var(0).max() / white.var(0).min() < 1.1 < states.var(0).max() / states.var(0).min()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_embedding_is_of_the_base_and_of_the_attended_tokens(kind):
    model, ids = tiny_mixture(kind), random_ids(2, 9)
    found = NoveltyDetector.embed(model, ids)
    assert found.shape == (EMBEDDING_DIM,) and found.dtype == torch.float32
    assert found.norm() == pytest.approx(1, abs=1e-5)
    assert torch.equal(NoveltyDetector.embed(randomise(model, seed=8), ids), found)
    assert torch.allclose(NoveltyDetector.embed(tiny_mixture(kind, 2), ids), found, atol=1e-5)
    padded, mask = (torch.nn.functional.pad(t, (0, 3)) for t in (ids, torch.ones_like(ids)))
    assert torch.allclose(NoveltyDetector.embed(model, padded, mask), found, atol=1e-4)
    assert torch.isfinite(NoveltyDetector.embed(model, ids[:1, :1])).all()


def test_embedding_leaves_mode_and_generator_alone():
    model = tiny_mixture().train()
    state = torch.get_rng_state()
    NoveltyDetector.embed(model, random_ids(1, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_what_cannot_be_embedded_is_refused():
    with pytest.raises(UsageError, match="no token"):
        NoveltyDetector.embed(tiny_mixture(), random_ids(1, 4), torch.zeros(1, 4, dtype=torch.int64))
    with torch.device("meta"):
        base = tiny_base()
    with pytest.raises(UsageError, match="needs the weights"):
        NoveltyDetector.embed(DyLoRAMoE(base, 2), random_ids(1, 4))


# ---- real weights, real texts ----


def texts_of_three_kinds():
    from pydoc_data.topics import topics

    library = Path(os.__file__).parent
    python = [
        (library / f"{name}.py").read_text()[4000:6000] for name in ("argparse", "ast", "tarfile", "csv", "heapq")
    ]
    prose = [topics[name][:2000] for name in sorted(topics) if len(topics[name]) > 3000][:5]
    headers = ("stdio", "stdlib", "string", "math", "unistd")
    c = [(INCLUDE / f"{name}.h").read_text(errors="ignore")[3000:5000] for name in headers]
    return {"python": python, "prose": prose, "c": c}


@pytest.mark.real
def test_real_texts_are_nearest_to_their_own_kind_and_a_kind_that_is_not_known_is_novel(smollm_gguf):
    if not (INCLUDE / "stdio.h").exists():
        pytest.skip("needs C headers in /usr/include")
    source, weights = find_base(smollm_gguf)
    model = DyLoRAMoE(load_base(source, weights, dtype="float32"), 2)
    tokenizer = load_tokenizer(source)

    def embed(texts):
        rows = [tokenizer(text).input_ids[:256] for text in texts]
        ids, mask = torch.zeros(2, len(rows), 256, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        return NoveltyDetector.embed(model, ids, mask)

    kinds = texts_of_three_kinds()
    known = {kind: embed(texts[:3]) for kind, texts in kinds.items()}
    asked = {kind: embed(texts[3:]) for kind, texts in kinds.items()}
    for kind, embedding in asked.items():
        skills = SkillLibrary()
        for name, skill in known.items():
            skills.add(name, skill)
        print(kind, [(s.name, round(s.similarity, 3)) for s in skills.nearest(embedding, k=3)])
        assert skills.nearest(embedding)[0].name == kind
        assert not NoveltyDetector(skills).is_novel(embedding)
        others = SkillLibrary()
        for name in known.keys() - {kind}:
            others.add(name, known[name])
        assert NoveltyDetector(others).is_novel(embedding)
