"""Linear extrapolation of what a program with many layers needs from programs with few: every layer adds the same."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rag_jax.training.config import TrainConfig

FIELDS = ("layers", "encoder_layers", "decoder_layers")
Depths = dict[tuple[str, str], int]  # number of layers, by side ("encoder", "generator") and field of its configuration


def depths(cfg: TrainConfig, program: str) -> Depths:
    """Number of layers of every stack that a program of the configuration runs."""
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
    """The configuration with these numbers of layers."""
    model = cfg.model
    for (side, name), count in layers.items():
        model = dataclasses.replace(model, **{side: dataclasses.replace(getattr(model, side), **{name: count})})
    return dataclasses.replace(cfg, model=model)


def shallow(cfg: TrainConfig, program: str, few: int) -> list[tuple[TrainConfig, int]]:
    """Configurations to measure, each with the factor of its difference to the first, see `line`.

    The first has at most `few` layers in every stack, with factor 0. Then there is one for each deeper stack, with one
    more layer there; its factor is the number of layers that the stack lacks in the first.
    """
    full = depths(cfg, program)
    base = {stack: min(few, count) for stack, count in full.items()}
    measured = [(cut(cfg, base), 0)]
    for stack, count in full.items():
        if count > few:
            measured.append((cut(cfg, base | {stack: few + 1}), count - few))
    return measured


def line(values: Sequence[Any], times: Sequence[int]) -> Any:
    """Linear extrapolation values[0] + sum_i times[i] * (values[i] - values[0]), of numbers or mappings of numbers."""
    if any(isinstance(value, dict) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        missing: Any = next(({} for value in values for x in value.values() if isinstance(x, dict)), 0.0)
        return {name: line([value.get(name, missing) for value in values], times) for name in names}
    if any(value is None for value in values):
        return None
    return values[0] + sum(n * (value - values[0]) for value, n in zip(values, times, strict=True))
