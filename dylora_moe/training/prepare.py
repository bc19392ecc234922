"""What a run begins with: the mixture, its data, and what each data set trains."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from ..base.find import find_base
from ..base.load import load_base, load_tokenizer
from ..base.preserve import seeded
from ..base.source import quantized
from ..checkpoint.probe import read_probe, saved_on
from ..checkpoint.read import load_into, load_mixture, named_base, read_skills
from ..checkpoint.verify import SoundCheckpoint, open_checkpoint
from ..constants import IMMATURE
from ..data.blocks import TokenBlocks, load_blocks
from ..data.sources import DataSpec
from ..data.texts import Divide, Trains
from ..distributed import ranks
from ..errors import UsageError
from ..mixture.config import MoELoraConfig, RouterConfig
from ..mixture.model import Mixture
from ..mixture.targets import comma_separated
from ..skills.fit import fit_router
from ..skills.library import SkillLibrary
from ..skills.novelty import NoveltyDetector
from ..stages.batches import known_tokens, why_not_packed
from ..stages.clusters import Clusters
from ..stages.growth import Divided, Judge, check_skills, grow
from ..stages.plan import branch_after, steps_of
from ..stages.setup import Stage, add_skills, first_stage
from ..store.files import FileProblem
from ..system import machine
from ..system.settings import spelled
from . import training_state
from .resume import Start, check, compared_settings
from .settings import JOINT_ONLY, TrainSettings


@dataclass(frozen=True)
class Prepared:
    """What is trained, and on what.

    Attributes:
        stage: what each data set trains.
        compared: the settings that a resumed run must share, and the stage.
        resumes: whether the run that wrote the checkpoint goes on.
        ended: whether that run had come to its end already.
    """

    model: Mixture
    tokenizer: PreTrainedTokenizerBase
    blocks: TokenBlocks
    skills: SkillLibrary
    stage: Stage
    compared: dict[str, Any]
    resumes: bool
    ended: bool


def prepare(settings: TrainSettings, start: Start, device: torch.device) -> Prepared:
    """Load the model and the data. Every rank calls this.

    Args:
        device: where the model is loaded.

    Raises:
        UsageError: If something is not available or does not fit.
        CheckpointError: If the checkpoint to go on from is not sound.
    """
    prepared = _growth(settings, start, device) if settings.grow else _training(settings, start, device)
    if not prepared.resumes:
        skills = ranks.gather(prepared.skills)[0]
        if prepared.stage.trained and settings.route == "specialised" and prepared.model.num_experts > 1:
            fit_router(prepared.model.router, skills)
        prepared = replace(prepared, skills=skills)
    if settings.route == "specialised":
        prepared.model.train_only({each.expert or 0 for each in prepared.stage.trained})
    counts = prepared.model.parameter_counts()
    # Each parameter has its value and two moments, in float32.
    machine.need_disk(12 * (counts["experts"] + counts["router"]), settings.output_dir, "one checkpoint")
    return prepared


# ---- a run of fresh experts ----


def _training(settings: TrainSettings, start: Start, device: torch.device) -> Prepared:
    with ranks.together():
        model, tokenizer = load_model(settings, device)
        specialised = settings.route == "specialised"
        divide = None
        if specialised and settings.num_experts > len(settings.data):
            divide = Clusters(model, settings.num_experts, settings.seed)
        blocks = load_data(settings, model, tokenizer, divide)
    compared = compared_settings(settings, model, blocks)
    with ranks.together():
        if start.folder is None:
            stage = first_stage(blocks, 0, _branch(settings, model, blocks), joint=not specialised)
            skills, ended = SkillLibrary(), False
        else:
            weights_only = start.weights_only
            checkpoint, ended = check(
                start.folder, compared, model, weights_only, accept_changes=settings.accept_changes
            )
            if weights_only or ended:
                load_into(checkpoint, model)
            skills = read_skills(checkpoint)
            stage = first_stage(blocks, start.step, None, joint=not specialised)
            there = {} if weights_only else _run_settings(checkpoint)
            if (saved := _stage_in(there, checkpoint)) is not None:
                same = there.get("data_fingerprint") == compared["data_fingerprint"]  # perhaps in renamed files
                stage = saved if same else saved.for_data(stage)
            if weights_only and specialised:
                stage = stage.for_skills(skills, model.num_experts)
        resumes = start.folder is not None and not start.weights_only
        if not resumes:
            add_skills(model, skills, blocks, stage)
    compared |= {"stage": stage.to_json()}
    return Prepared(model, tokenizer, blocks, skills, stage, compared, resumes, ended)


def _branch(settings: TrainSettings, model: Mixture, blocks: TokenBlocks) -> int | None:
    if settings.route == "joint":
        return None
    return branch_after(model.num_experts, run_steps(settings, len(blocks.train)))


def run_steps(settings: TrainSettings, blocks: int) -> int:
    """Return the number of steps of a run on so many blocks."""
    if settings.max_steps:
        return settings.max_steps
    return steps_of(blocks, settings.epochs or 1, settings.batch_size, settings.grad_accum * ranks.world()[1])


# ---- growth ----


def _growth(settings: TrainSettings, start: Start, device: torch.device) -> Prepared:
    if start.folder is None:
        raise ValueError("growth begins at a checkpoint")
    with ranks.together():
        checkpoint = open_checkpoint(start.folder)
        there = None if start.grows else _stage_in(_run_settings(checkpoint), checkpoint)
        skills = read_skills(checkpoint)
        if there is None:
            if IMMATURE in checkpoint.config.states:
                raise UsageError(
                    f"{start.folder} is of a run that has not ended; let it end with --resume first, "
                    "or grow an earlier checkpoint with --from and another --output-dir"
                )
            check_skills(skills, checkpoint.config.num_experts, str(start.folder))
        model, tokenizer = _load_grown(settings, checkpoint, device)
        judge = Judge(NoveltyDetector(model, skills), settings.update) if there is None else None
        divide = judge or Divided(cast(Stage, there))
        blocks = load_data(settings, model, tokenizer, divide, divide.trains)
        if judge is not None:
            if judge.detector.left_out:
                names = comma_separated(judge.detector.left_out)
                model.notes.append(f"too little text of {names} is known to compare new data with")
            there = grow(model, skills, blocks, judge, first_step=start.step)
            add_skills(model, skills, blocks, there)
    compared = compared_settings(settings, model, blocks)
    ended = False
    if judge is None:
        with ranks.together():
            _, ended = check(start.folder, compared, model, False, accept_changes=settings.accept_changes)
    stage = cast(Stage, there)
    compared |= {"stage": stage.to_json()}
    return Prepared(model, tokenizer, blocks, skills, stage, compared, judge is None, ended)


def _run_settings(checkpoint: SoundCheckpoint) -> dict[str, Any]:
    return training_state.run_settings(training_state.read_trainer_state(checkpoint.folder))


def _stage_in(settings: dict[str, Any], checkpoint: SoundCheckpoint) -> Stage | None:
    """Return the stage that a checkpoint is of, by the settings of its run, if train.py has saved it."""
    found = settings.get("stage")
    try:
        return None if found is None else Stage.from_json(found, checkpoint.config.num_experts, checkpoint.config.step)
    except FileProblem as error:
        raise UsageError(f"{checkpoint.folder}: trainer_state.json: {error}; restore it from a copy") from None


def _load_grown(
    settings: TrainSettings, checkpoint: SoundCheckpoint, device: torch.device
) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """Return the mixture of a checkpoint, and the tokenizer of its base model."""
    name = settings.model or named_base(checkpoint, "--model")
    revision = None if settings.model else checkpoint.config.base_model.revision
    source, _ = find_base(name, weights=settings.weights, token=settings.hf_token, revision=revision)
    options: dict[str, Any] = {"weights": settings.weights, "device": str(device), "token": settings.hf_token}
    options |= {"seed": settings.seed, "label_smoothing": settings.label_smoothing}
    if settings.dtype is not None:
        options["dtype"] = settings.dtype
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was saved on other weights")  # which is refused here
        model: Mixture = load_mixture(checkpoint.folder, settings.model, **options)
    probe = read_probe(checkpoint)
    if probe is not None and not saved_on(probe[1], model) and not settings.accept_changes:
        raise UsageError(
            f"{name}: expected the weights on which {checkpoint.folder} was saved, found others: neither its experts "
            "nor its skills were learned on these; restore them, or accept the change with --accept-changes"
        )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, load_tokenizer(source, token=settings.hf_token)


# ---- the model and the data ----


def load_model(settings: TrainSettings, device: torch.device) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """Return the mixture with fresh experts, and the tokenizer of its base model."""
    source, weights = find_base(settings.base_model, weights=settings.weights, token=settings.hf_token)
    tokenizer = load_tokenizer(source, token=settings.hf_token)
    source = quantized(source, settings.quantize)
    base = load_base(source, weights, dtype=settings.dtype, device=str(device), seed=settings.seed)
    targets = None if settings.targets is None else list(settings.targets)
    lora = MoELoraConfig(
        r=settings.lora_r,
        lora_alpha=cast(int, settings.lora_alpha),  # PEFT computes with a float as well
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    router = RouterConfig(settings.temperature, settings.top_k, settings.balance_coefficient)
    with seeded(settings.seed):
        model = Mixture(base, settings.num_experts, lora=lora, router=router, label_smoothing=settings.label_smoothing)
    model.base_revision = source.revision
    unused = [name for name in JOINT_ONLY if getattr(settings, name) != getattr(type(settings), name)]
    if unused and settings.route == "specialised":
        flags = comma_separated([spelled(name) for name in unused])
        model.notes.append(f"without effect: {flags}; with --route specialised, the router is not trained but fitted")
    if source.note:
        model.notes.append(source.note)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, tokenizer


def load_data(
    settings: TrainSettings,
    model: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    divide: Divide | None = None,
    trains: Trains = lambda index: True,
) -> TokenBlocks:
    """Return the token blocks of --data. If they are not packed, the model gets a note that says why.

    Raises:
        UsageError: If the data cannot be read, or the model does not take it.
    """
    most = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and settings.block_size > most:
        raise UsageError(
            f"--block-size {settings.block_size}: the base model has {most} positions; use at most that many"
        )
    why_not = why_not_packed(model.base)
    blocks = load_blocks(
        [DataSpec.parse(text) for text in settings.data],
        tokenizer,
        block_size=settings.block_size,
        seed=settings.seed,
        packed=why_not is None,
        vocabulary=known_tokens(model.base),
        mixing=settings.mixing,
        eval_specs=[DataSpec.parse(text) for text in settings.eval_data],
        eval_fraction=settings.eval_fraction,
        max_eval_blocks=settings.eval_blocks,
        token=settings.hf_token,
        divide=divide,
        trains=trains,
    )
    if why_not is not None:
        model.notes.append(
            f"{why_not}: each document has a block of its own, and {100 * blocks.padding_share:.0f} % of the blocks is "
            "padding"
        )
    return blocks
