"""The model card of a checkpoint: what is in it, what it has learned, and how to load it."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoint.config import CheckpointConfig
from ..constants import MIB
from ..errors import counted, shown
from ..reporting.results import Results, SkillLoss

LOSS = "loss (nats per token, held-out text)"


def model_card(repo_id: str, config: CheckpointConfig, size: int, results: Results | None) -> str:
    """Return the text of README.md.

    Args:
        size: of the checkpoint, in bytes.
        results: of the run that has written the checkpoint; None if there are none.
    """
    base = config.base_model.name or ""
    losses = results.stages[-1].evaluation if results and results.stages else {}
    card = ModelCardData(
        base_model=base or None,
        library_name="dylora-moe",
        pipeline_tag="text-generation",
        tags=["dylora-moe", "lora", "mixture-of-experts", "peft"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name=_cell(name),
                dataset_config=_cell(name),  # without it, all skills would count as one data set
                metric_type="loss",
                metric_name=LOSS,
                metric_value=loss.routed,
            )
            for name, loss in losses.items()
            if loss.routed is not None
        ]
        or None,
    )
    parts = [
        f"---\n{card.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        f"A mixture of {counted(config.num_experts, 'LoRA expert')} on `{_code(base)}`, with a router that picks the "
        "experts from the tokens of a text.",
        _skills(results, losses),
        _experts(config, size),
        _loading(repo_id, base),
        "## Licence and training data\n\nTo be filled in by the owner of this repository.",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    ModelCard(text)  # raises if the metadata does not parse
    return text


def _skills(results: Results | None, losses: dict[str, SkillLoss]) -> str:
    if results is None or not results.skills:
        return ""
    rows = ["| skill | expert | trained on | base | routed | own expert |", "|---|---|---|---|---|---|"]
    for skill in results.skills:
        loss = losses.get(skill.name)
        numbers = [_number(value) for value in ((loss.base, loss.routed, loss.own) if loss else (None, None, None))]
        expert = "all" if skill.expert is None else str(skill.expert)
        rows.append(f"| {_cell(skill.name)} | {expert} | {counted(skill.tokens, 'token')} | {' | '.join(numbers)} |")
    return f"## Skills\n\n{LOSS[0].upper()}{LOSS[1:]}.\n\n" + "\n".join(rows)


def _experts(config: CheckpointConfig, size: int) -> str:
    rows = ["| expert | rank | targets | parameters | state |", "|---|---|---|---|---|"]
    for number, expert in enumerate(config.experts):
        targets = _cell(", ".join(expert.target_modules))
        rows.append(f"| {number} | {expert.r} | {targets} | {expert.parameters:,} | {expert.state} |")
    return f"## Experts\n\n{size / MIB:.1f} MB in all.\n\n" + "\n".join(rows)


def _loading(repo_id: str, base: str) -> str:
    return f"""## Loading

The mixture (`pip install dylora-moe`):

```python
import dylora_moe
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({repo_id!r})
```

One expert alone, in stock PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({_code(base)!r})
model = PeftModel.from_pretrained(base, {repo_id!r}, subfolder="peft_adapters/expert_0/expert_0")
```"""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    """A text as it can stand in a cell of a table."""
    return shown(text).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _code(text: str) -> str:
    return shown(text).replace("`", "'")
