"""The finished student: a diffusers folder that stock tools open, its LoRA file where it has one, its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

USAGE = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")
image = pipe(prompt="{prompt}", num_inference_steps={steps}, {call}).images[0]
```"""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def model_card(
    *,
    teacher: str,
    license: str | None,
    steps: int,
    times: list[float],
    call: dict[str, Any],
    guidance: float,
    rewards: str,
    updates: int,
    normalize: str,
    folder: str,
    prompt: str,
    results: str | None,
) -> ModelCard:
    """The card that goes into the student's folder. `results`: measured numbers and their protocol, as Markdown."""
    on_hub = teacher.count("/") == 1 and not Path(teacher).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license,
        base_model=teacher if on_hub else None,
        tags=["fewstep", "distillation", "few-step"],
    )
    method = {"group": "GNDM (group-normalised distribution matching)", "sample": "DMD"}.get(
        normalize, f"distribution matching, scale `{normalize}`"
    )
    grid = f"[{', '.join(f'{t:g}' for t in times)}]"
    told = ", ".join(f"{key}={value!r}" for key, value in call.items())
    text = f"""---
{data.to_yaml()}
---

# {steps}-step student of {teacher}

Distilled with fewstep by {method}: {updates} updates, teacher guidance {guidance:g}, {rewards}. The guidance is distilled in: call
the pipeline as below.

![rows: prompts; columns: teacher, teacher at {steps} steps, student](samples.png)

## Use

{USAGE.format(folder=folder, prompt=prompt, steps=steps, call=told)}

The scheduler in this folder carries the grid the student was trained on, timesteps {grid}; with another number of steps
or another scheduler it is no longer the model that was measured.

## Numbers

{results or "Not measured (`evaluate: false`)."}
"""
    return ModelCard(text)
