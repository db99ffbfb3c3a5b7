"""What a program of many layers takes, from two of few: each layer adds what the one before it added."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rag_jax.training.config import TrainConfig

FIELDS = ("layers", "encoder_layers", "decoder_layers")
Depths = dict[tuple[str, str], int]  # by side and field of the model


def depths(cfg: TrainConfig, program: str) -> Depths:
    """The layers of every stack that a program of the configuration runs through."""
    stages = {stage.name: stage.objective.groups for stage in cfg.stages}
    reached = stages.get(program, {"context_encoder"} if program == "encode" else set())
    sides = {
        "encoder": bool(reached & {"question_encoder", "context_encoder"}),
        "generator": "generator" in reached,
    }
    models = {side: getattr(cfg.model, side) for side, used in sides.items() if used}
    return {
        (side, name): getattr(model, name)
        for side, model in models.items()
        for name in FIELDS
        if model is not None and hasattr(model, name)
    }


def cut(cfg: TrainConfig, layers: Depths) -> TrainConfig:
    """The configuration with these depths."""
    model = cfg.model
    for (side, name), count in layers.items():
        model = dataclasses.replace(model, **{side: dataclasses.replace(getattr(model, side), **{name: count})})
    return dataclasses.replace(cfg, model=model)


def shallow(cfg: TrainConfig, program: str, few: int) -> list[tuple[TrainConfig, int]]:
    """Configurations to measure: that with at most `few` layers in every stack; then, for each stack that has more,
    the same with one more there, and how many times what this adds is missing.
    """
    full = depths(cfg, program)
    base = {stack: min(few, count) for stack, count in full.items()}
    found = [(cut(cfg, base), 0)]
    for stack, count in full.items():
        if count > few:
            found.append((cut(cfg, base | {stack: few + 1}), count - few))
    return found


def line(values: Sequence[Any], times: Sequence[int]) -> Any:
    """values[0] and, times[i] times, what values[i] is more than that: of numbers, or of mappings of such."""
    if any(isinstance(value, dict) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        missing: Any = next(({} for value in values for x in value.values() if isinstance(x, dict)), 0.0)
        return {name: line([value.get(name, missing) for value in values], times) for name in names}
    if any(value is None for value in values):
        return None
    return values[0] + sum(n * (value - values[0]) for value, n in zip(values, times, strict=True))
