"""What a mixture learns: held-out loss of specialised and grown mixtures, and of what could be used instead.

python -m benchmarks.learning                               a quarter of an hour on two cores
python -m benchmarks.learning --long --work FOLDER --json benchmarks/results/learning-long.json    four hours

With --work, what has been measured is kept in that folder: the same command goes on after an interruption, and --parts
measures some methods now and others later. With --refit, the experts of the kept mixtures are routed and measured again
after a change of the router: experts do not depend on it.

Every method sees the same rows of real text once, with the same batches, learning rate and number of steps. A mixture
of N experts of rank r is compared with one LoRA of rank N r, so that both have the same number of parameters. A LoRA of
rank r (--parts small) shows how much of a difference is that of the size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from torch.nn import functional as F

from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import fresh_base

from . import common, lora_training, models, texts
from .common import Result
from .lora_training import Recipe, Task, Trained, write_data

BASE, JOINT, TURN = "base model", "one LoRA, everything at once", "one LoRA, skill after skill"
SMALL = "one LoRA of one expert's size, everything at once"
UNIFORM, ARROW = "grown experts, uniform weights", "grown experts, PEFT Arrow"
LINEAR, TIES = "grown experts, merged (linear)", "grown experts, merged (TIES)"
DENSE = "grown mixture, routed to all experts"
GROWN, GROWN_OWN = "grown mixture, routed", "grown mixture, each skill's own expert"
OURS, OURS_OWN = "specialised mixture, routed", "specialised mixture, each skill's own expert"
METHODS = (BASE, JOINT, SMALL, TURN, OURS_OWN, OURS, GROWN_OWN, GROWN, DENSE, UNIFORM, ARROW, LINEAR, TIES)
MIXTURES = ("specialised", "grown")
PARTS = ("base", "joint", "specialised", "grown", "turn", "small")  # in the order in which they are measured
USUAL = PARTS[:-1]
FIRST = 2  # skills of a grown mixture that are trained together before the others come
Losses = dict[str, float]  # mean held-out loss by skill
Logits = Callable[[torch.Tensor, int], torch.Tensor]  # (ids (B, T), the skill that they are of) -> (B, T, V)
DENSITY = 0.5  # of TIES
FOUND = "found.json"  # in the folder of a seed
CHUNK = 512  # tokens that are measured at once
ROUTER = "the router"
AFTER = (0, 4, 8)  # tokens after which a perfect router would know the skill
EDGES = (0, 8, 32)  # where the parts of a row begin whose losses are compared
PAIRS = "two skills"


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Args:
        held: rows of each skill that are measured, by their length.
        kinds: of text.
    """

    recipe: Recipe
    held: dict[int, int]
    kinds: tuple[str, ...]


KINDS = tuple(texts.SOURCES)
SHORT = Sizes(Recipe(steps=16, rows=2), {128: 6, 384: 2}, KINDS)
LONG = Sizes(Recipe(steps=200, rows=2), {128: 12, 384: 6}, KINDS)
QUICK = Sizes(Recipe(steps=8, rank=2, rows=2, length=32, rate=1e-2), {32: 4, 96: 1}, ("python", "reference", "c"))


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("learning", __doc__, measure, argv, flags)


def flags(parser: argparse.ArgumentParser) -> None:
    models.add_model_flags(parser)
    parser.add_argument("--long", action="store_true", help="1,000 steps for each method: hours")
    parser.add_argument("--steps", type=int, help="steps for each skill (16; --long 200)")
    parser.add_argument("--work", type=Path, help="where to keep what has been trained and measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=USUAL, help="what is measured (all but small)")
    parser.add_argument("--refit", action="store_true", help="measure the mixtures of --work with the present router")
    parser.add_argument("--seeds", type=int, default=1, help="how often everything is trained (%(default)s)")


def measure(args: argparse.Namespace, result: Result) -> None:
    result.settings |= {"threads": common.fix_threads(), "date": time.strftime("%Y-%m-%d")}
    sizes = QUICK if args.quick else LONG if args.long else SHORT
    if args.steps:
        sizes = replace(sizes, recipe=replace(sizes.recipe, steps=args.steps))
    found, missing = texts.available(sizes.kinds)
    for line in missing:
        print(line)
    if args.refit and not args.work:
        raise SystemExit("--refit needs the --work folder with the mixtures")
    with ExitStack() as stack:
        folder = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dylora_benchmark_")))
        # Before anything is written into the folder: it may be of another size.
        kept = [read_found(folder / f"runs{number}", repr(sizes)) for number in range(args.seeds)]
        base, tokenizer = models.saved_base(args, folder / "base", result.settings)
        held = {
            length: {kind: texts.rows(found[kind].held_out, tokenizer, length, count) for kind in found}
            for length, count in sizes.held.items()
        }
        seeds = []
        for number, measured in enumerate(kept):
            data = write_data(folder / f"data{number}", found, tokenizer, sizes.recipe, number)
            task = Task(base, tokenizer, folder / "base", *data, sizes.recipe, number)
            seeds.append(Seed(task, held, folder / f"runs{number}", measured, args.long))
            seeds[-1].run(args.parts, args.refit)
        result.settings["work"] = args.work is not None
    report(seeds, sizes, result)


# ---- one seed ----


@dataclass
class Found:
    """What one seed has found.

    Attributes:
        sizes: what it was found with.
        losses: by length of the rows (in digits, as JSON has it), method and skill.
        stages: of the grown mixture: the skills so far, and their routed losses on the shortest rows.
        pairs: of rows of two skills, by mixture: mean loss when routed, and under each token's own expert.
        lost: by how many per cent the loss of the grown mixture is above that of each skill's own expert, by what names
            the expert (the router, or so many tokens) and part of the rows.
        changed: the largest change of an expert's tensors and of its logits in stages after its own.
        missed: the skills that were taken for known ones.
        parts: of `PARTS`, that are done.
    """

    sizes: str
    losses: dict[str, dict[str, Losses]] = field(default_factory=dict)
    stages: list[Losses] = field(default_factory=list)
    pairs: dict[str, tuple[float, float]] = field(default_factory=dict)
    lost: dict[str, Losses] = field(default_factory=dict)
    changed: tuple[float, float] = (0.0, 0.0)
    missed: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)


def read_found(folder: Path, sizes: str) -> Found:
    """Return what an interrupted benchmark has left in a folder. Raises SystemExit if it had other sizes."""
    path = folder / FOUND
    found = Found(**json.loads(path.read_text())) if path.exists() else Found(sizes)
    if found.sizes != sizes:
        raise SystemExit(f"{path}: expected {sizes}, found {found.sizes}; choose another --work folder")
    return found


class Seed:
    """Trains and measures everything with one seed.

    Args:
        held: the held-out rows of each skill, by their length.
        folder: for the runs, and for `FOUND`, from which an interrupted benchmark goes on.
        found: what has been measured before.
        long: whether to measure what routing costs, too.
    """

    def __init__(self, task: Task, held: dict[int, dict[str, torch.Tensor]], folder: Path, found: Found, long: bool):
        self.task, self.held, self.folder, self.found, self.long = task, held, folder, found, long
        self.skills = task.skills

    @property
    def short(self) -> int:
        return min(self.held)

    def run(self, parts: Sequence[str], refit: bool) -> None:
        measures = (self._base, self._joint, self._specialised, self._grown, self._turn, self._small)
        for part, measure_it in zip(PARTS, measures, strict=True):
            if part not in parts or part in self.found.parts:
                continue
            measure_it()
            self.found.parts.append(part)
            self._keep()
        if refit:
            for part, refit_it in zip(MIXTURES, (self._refit_specialised, self._refit_grown), strict=True):
                if part in parts:
                    refit_it()
                    self._keep()

    def _keep(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FOUND).write_text(json.dumps(vars(self.found)))

    def _base(self) -> None:
        base = fresh_base(self.task.base)
        self._measure(BASE, lambda ids, _: base(ids, use_cache=False).logits)

    def _joint(self) -> None:
        self._measure(JOINT, expert_logits(lora_training.jointly(self.task, len(self.skills)), 0))

    def _small(self) -> None:
        self._measure(SMALL, expert_logits(lora_training.jointly(self.task, 1), 0))

    def _turn(self) -> None:
        self._measure(TURN, expert_logits(lora_training.in_turn(self.task), 0))

    def _specialised(self) -> None:
        folder = self._fresh("specialised")
        self._measure_mixture(lora_training.specialised(self.task, folder, say), OURS, OURS_OWN)

    def _refit_specialised(self) -> None:
        for trained in lora_training.refitted(self.task, self.folder / "specialised"):
            self._measure_mixture(trained, OURS, OURS_OWN)

    def _refit_grown(self) -> None:
        self.found.stages = []
        for trained in lora_training.refitted(self.task, self.folder / "grown"):
            self._measure_stage(trained.model)
        self._measure_grown(trained)

    def _grown(self) -> None:
        grown = self._grow()
        self._measure_grown(grown)
        with uniform(grown.model):
            self._measure(UNIFORM, expert_logits(grown.model))
        self._measure_peers(models.export_experts(grown.model, self._fresh("experts")))

    def _measure_grown(self, grown: Trained) -> None:
        self._measure_mixture(grown, GROWN, GROWN_OWN)
        if self.long:
            self._measure_lost(grown)
        with models.dense(grown.model):
            self._measure(DENSE, expert_logits(grown.model))

    def _fresh(self, name: str) -> Path:
        """A folder without what an interrupted benchmark has left in it."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def _grow(self) -> Trained:
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        for trained in lora_training.grown(self.task, self._fresh("grown"), FIRST, say):
            model = trained.model
            before += [self._state(model, expert) for expert in range(len(before), model.num_experts)]
            self._measure_stage(model)
        self.found.missed = [name for name in self.skills if name not in trained.experts]
        after = [self._state(model, expert) for expert in range(model.num_experts)]
        pairs = list(zip(before, after, strict=True))
        self.found.changed = tuple(max(float((old[i] - new[i]).abs().max()) for old, new in pairs) for i in (0, 1))
        return trained

    def _state(self, model: DyLoRAMoE, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors of an expert, and what it computes for a row."""
        ids = next(iter(self.held[self.short].values()))[:1]
        with torch.no_grad():
            tensors = torch.cat([p.flatten().clone() for p in model.expert_tensors(expert).values()])
            return tensors, expert_logits(model, expert)(ids, 0)

    # ---- measuring ----

    @property
    def methods(self) -> list[str]:
        """Those that have been measured."""
        return list(self.losses(self.short))

    def losses(self, length: int) -> dict[str, Losses]:
        """By method and skill, in the order of the tables."""
        return dict(sorted(self.found.losses[str(length)].items(), key=lambda item: METHODS.index(item[0])))

    def _measure(self, name: str, logits: Logits) -> None:
        for length, rows in self.held.items():
            of_skills = {k: mean_loss(logits, rows[k], i) for i, k in enumerate(self.skills)}
            self.found.losses.setdefault(str(length), {})[name] = of_skills
        means = ", ".join(f"{mean(self.losses(length)[name]):.4f}" for length in self.held)
        print(f"{time.strftime('%H:%M:%S')}  seed {self.task.seed}: {name}: {means}", flush=True)

    def _measure_mixture(self, trained: Trained, routed: str, own: str) -> None:
        model, experts = trained.model, [trained.experts.get(name) for name in self.skills]
        self._measure(own, lambda ids, skill: expert_logits(model, experts[skill])(ids, skill))
        self._measure(routed, expert_logits(model))
        half = self.short // 2
        found = []
        for first, second, ids in self._two_skills():
            who = (None, experts[first], experts[second])
            ours, of_first, of_second = (token_losses(expert_logits(model, expert), ids, 0) for expert in who)
            oracle = torch.cat([of_first[:, : half - 1], of_second[:, half - 1 :]], 1)
            found.append((ours.mean(), oracle.mean()))
        self.found.pairs[routed] = tuple(torch.tensor(found).mean(0).tolist())

    def _measure_stage(self, model: DyLoRAMoE) -> None:
        known = self.skills[: FIRST + len(self.found.stages)]
        losses = {name: mean_loss(expert_logits(model), self.held[self.short][name], 0) for name in known}
        self.found.stages.append(losses)

    def _measure_lost(self, trained: Trained) -> None:
        """What is lost to each skill's own expert, also where the right expert gets all weight after some tokens.

        Until then all experts have the same weight, and in rows of two skills that of the first one has it. No router
        that reads a text from its beginning can know the skill earlier than its tokens tell it.
        """
        model, experts = trained.model, [trained.experts.get(name) for name in self.skills]
        if None in experts:  # of a skill that was taken for a known one
            return
        own = self._curves(lambda skill: expert_logits(model, experts[skill]))
        self._measure_told(ROUTER, model, experts, own, None)
        with models.dense(model):
            for after in AFTER:
                self._measure_told(str(after), model, experts, own, after)

    def _measure_told(
        self, name: str, model: DyLoRAMoE, experts: list[int], own: dict[int, torch.Tensor], after: int | None
    ) -> None:
        lost = self.found.lost[name] = {}
        curves = self._curves(lambda skill: told_logits(model, [experts[skill]], after))
        for length, curve in curves.items():
            lost[f"{length} tokens"] = above(curve, own[length])
        for start, end in zip(EDGES, [*EDGES[1:], self.short], strict=True):
            lost[f"{start + 1} to {end}"] = above(curves[self.short][start:end], own[self.short][start:end])
        pairs = [
            token_losses(told_logits(model, [experts[i] for i in both], after), ids, 0).mean()
            for *both, ids in self._two_skills()
        ]
        lost[PAIRS] = above(torch.stack(pairs), torch.tensor(self.found.pairs[GROWN][1]))

    def _curves(self, logits: Callable[[int], Logits]) -> dict[int, torch.Tensor]:
        """By length of the rows: the mean loss (T - 1) of each token but the first, over all skills."""
        skills = range(len(self.skills))
        return {
            length: torch.stack(
                [token_losses(logits(skill), rows[self.skills[skill]], skill).mean(0) for skill in skills]
            ).mean(0)
            for length, rows in self.held.items()
        }

    def _two_skills(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield two skills and rows that begin with the first one and end with the second one."""
        rows, half = self.held[self.short], self.short // 2
        for first, second in enumerate([*range(1, len(self.skills)), 0]):
            yield first, second, torch.cat([rows[self.skills[i]][:, :half] for i in (first, second)], 1)

    def _measure_peers(self, adapters: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT about itself
            arrow = create_arrow_model(fresh_base(self.task.base), adapters, ArrowConfig(top_k=min(3, len(adapters))))
            self._measure(ARROW, peft_logits(arrow))
            merged = PeftModel.from_pretrained(fresh_base(self.task.base), adapters[0], adapter_name="0")
            for index, path in enumerate(adapters[1:], start=1):
                merged.load_adapter(path, str(index))
            names, count = [str(index) for index in range(len(adapters))], len(adapters)
            for method, kind, weight in (
                (LINEAR, "linear", 1 / count**2),
                (TIES, "ties", 1.0),
            ):  # the means of A and of B
                options = {"density": DENSITY} if kind == "ties" else {}
                merged.add_weighted_adapter(names, [weight] * count, kind, combination_type=kind, **options)
                merged.set_adapter(kind)
                self._measure(method, peft_logits(merged))


def say(line: str) -> None:
    """Of what train.py says, only what it makes of the data."""
    if line.startswith("skill: "):
        print(line, flush=True)


def expert_logits(model: DyLoRAMoE, expert: int | None = None) -> Logits:
    return lambda ids, _: model(ids, expert=expert, use_cache=False).logits


def told_logits(model: DyLoRAMoE, experts: Sequence[int], after: int | None) -> Logits:
    """Logits where the right expert has all weight, of a model that is `models.dense`; None: where the router decides.

    Args:
        experts: of the parts of a row, all of the same length.
        after: the tokens of a part until which the weights are what they were before; at first, all the same.
    """
    if after is None:
        return expert_logits(model)

    def logits(ids: torch.Tensor, _: int) -> torch.Tensor:
        weights = torch.full((ids.shape[1], model.num_experts), 1 / model.num_experts)
        for part, expert in enumerate(experts):
            begin = part * ids.shape[1] // len(experts) + after
            weights[begin:] = F.one_hot(torch.tensor(expert), model.num_experts).float()
        forced = weights.log()
        with patch.object(model.router, "logits", lambda sums, _: forced.expand(len(sums), -1, -1)):
            return model(ids, use_cache=False).logits

    return logits


def peft_logits(model: PeftModel) -> Logits:
    model.eval()
    return lambda ids, _: model(input_ids=ids, use_cache=False).logits


@contextmanager
def uniform(model: DyLoRAMoE) -> Iterator[None]:
    """Inside, every expert has the same weight for every token."""
    kept = {name: value.clone() for name, value in model.router.state_dict().items()}
    with models.dense(model), torch.no_grad():
        for parameter in model.router.parameters():
            parameter.zero_()
        yield
    model.router.load_state_dict(kept)


@torch.no_grad()
def token_losses(logits: Logits, rows: torch.Tensor, skill: int) -> torch.Tensor:
    """Rows (R, T) of a skill -> the loss (R, T - 1) of each token but the first, in nats."""
    found = []
    for ids in rows.split(max(1, CHUNK // rows.shape[1])):
        scores = logits(ids, skill)[:, :-1].transpose(1, 2).float()  # (B, V, T - 1)
        found.append(F.cross_entropy(scores, ids[:, 1:], reduction="none"))
    return torch.cat(found)


def mean_loss(logits: Logits, rows: torch.Tensor, skill: int) -> float:
    return token_losses(logits, rows, skill).mean().item()


def mean(losses: Losses) -> float:
    return statistics.fmean(losses.values())


# ---- what is printed ----


def report(seeds: list[Seed], sizes: Sizes, result: Result) -> None:
    skills = seeds[0].skills
    steps = sizes.recipe.steps * len(skills)
    batch = f"{sizes.recipe.rows} rows of {sizes.recipe.length} tokens"
    result.settings |= {"steps": steps, "skills": skills, "rank": sizes.recipe.rank, "rate": sizes.recipe.rate}
    reference = next(name for name in (GROWN_OWN, OURS_OWN, *METHODS) if name in seeds[0].methods)
    for length in seeds[0].held:
        title = f"Held-out loss on rows of {length} tokens, after {steps} steps of {batch}"
        note = f"Nats per token, mean of the seeds. Relative: the mean of the skills, to: {reference}."
        table = result.table(f"loss-{length}", title, ["", *skills, "mean", "relative"], note)
        for name in seeds[0].methods:
            of_skills = [statistics.fmean(seed.losses(length)[name][skill] for seed in seeds) for skill in skills]
            relative = spread(seeds, length, name, reference)
            table.add(name, *(f"{loss:.3f}" for loss in of_skills), f"{statistics.fmean(of_skills):.3f}", relative)
    claims(seeds, 0.0 if result.settings["long"] else 1.0, result)
    if GROWN in seeds[0].methods:
        growth(seeds, result)
        lost(seeds, result)
        checks(seeds, result)


def growth(seeds: list[Seed], result: Result) -> None:
    """The forgetting matrix of the first seed: what a skill's routed loss has changed by since it was learned."""
    stages, skills = seeds[0].found.stages, seeds[0].skills
    table = result.table("growth", "Routed loss since a skill was learned", ["after", *skills], "Of the first seed.")
    for losses in stages:
        cells = [f"{losses[k] / learned(stages, k) - 1:+.2%}" if k in losses else "" for k in skills]
        table.add(list(losses)[-1], *cells)


def lost(seeds: list[Seed], result: Result) -> None:
    """What the router loses, and what one would lose that knew the skill as soon as its tokens can tell it."""
    found = [seed.found.lost for seed in seeds if seed.found.lost]
    if not found:
        return
    columns = list(found[0][ROUTER])
    title = "Loss of the grown mixture above that of each skill's own expert"
    note = (
        f"The ranges are of the tokens of rows of {seeds[0].short}. Two skills: rows of which each half is of another."
    )
    table = result.table("lost", title, ["the right expert is known", *columns], note)
    for name in found[0]:
        cells = [f"{statistics.fmean(of_seed[name][column] for of_seed in found):+.2f} %" for column in columns]
        known = {ROUTER: "as the router finds out", "0": "from the start"}.get(name, f"after {name} tokens")
        table.add(known, *cells)


def learned(stages: list[Losses], skill: str) -> float:
    return next(losses[skill] for losses in stages if skill in losses)


def above(losses: torch.Tensor, others: torch.Tensor) -> float:
    """By how many per cent the mean of some losses is above that of others."""
    return (losses.mean() / others.mean() - 1).item() * 100


def above_other(seed: Seed, length: int, name: str, other: str) -> float:
    """By how many per cent the mean loss of a method is above that of another."""
    return (mean(seed.losses(length)[name]) / mean(seed.losses(length)[other]) - 1) * 100


def spread(seeds: list[Seed], length: int, name: str, other: str) -> str:
    values = [above_other(seed, length, name, other) for seed in seeds]
    middle = f"{statistics.fmean(values):+.2f} %"
    return middle if len(values) == 1 else f"{middle} ({min(values):+.2f} to {max(values):+.2f})"


def claims(seeds: list[Seed], above_joint: float, result: Result) -> None:
    """Each is the worst of the seeds. `above_joint`: the limit, in per cent, beside the one LoRA."""
    lengths, methods = list(seeds[0].held), seeds[0].methods

    def worst(text: str, limit: float, values: Sequence[float]) -> None:
        result.claim(text, max(values), limit, "%")

    if GROWN in methods:
        for length, limit in zip(lengths, (0.3, 0.0), strict=False):
            values = [above_other(seed, length, GROWN, GROWN_OWN) for seed in seeds]
            worst(f"grown mixture, {length} tokens, above each skill's own expert", limit, values)
        for other in (ARROW, LINEAR, TIES, UNIFORM, TURN):
            if other in methods:
                worst(
                    f"grown mixture, above: {other}",
                    0.0,
                    [above_other(seed, lengths[0], GROWN, other) for seed in seeds],
                )
        stages = [seed.found.stages for seed in seeds]
        rises = [(found[-1][k] / learned(found, k) - 1) * 100 for found in stages for k in found[-1]]
        worst("the skill that lost most in later stages", 0.5, rises)
    for name in (GROWN, OURS):
        if name not in methods:
            continue
        if JOINT in methods:
            worst(
                f"{name}, above: {JOINT}", above_joint, [above_other(seed, lengths[0], name, JOINT) for seed in seeds]
            )
        pairs = [seed.found.pairs[name] for seed in seeds]
        worst(f"{name}, rows of two skills, above each token's own expert", 2.0, [(a / b - 1) * 100 for a, b in pairs])


def checks(seeds: list[Seed], result: Result) -> None:
    for part, what in enumerate(("tensors", "logits")):
        off = max(seed.found.changed[part] for seed in seeds)
        result.check(f"{what} of the grown experts, since each was trained", off, 0.0)
    missed = sorted({name for seed in seeds for name in seed.found.missed})
    result.claim(f"new skills taken for known ones{': ' * bool(missed)}{', '.join(missed)}", len(missed), 0, "skills")


if __name__ == "__main__":
    raise SystemExit(main())
