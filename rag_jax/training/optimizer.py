"""AdamW or Adafactor with a learning-rate schedule, per-group learning rates and frozen groups.

A group is a top-level key of the parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import optax

from rag_jax.errors import InputError
from rag_jax.ops import low_bit_adam

GROUPS = ("question_encoder", "context_encoder", "generator")


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimiser of a stage.

    learning_rate: at its peak, after the warm-up.
    schedule: of the learning rate from the warm-up to the last step of the stage.
    final: learning rate at the end of `linear` and `cosine`, as a share of learning_rate.
    warmup_steps: updates in which the learning rate rises linearly from 0.
    b1, b2, eps: of AdamW; Adafactor does not read them.
    weight_decay: decoupled (AdamW); biases and LayerNorms are not decayed; 0: none.
    clip_norm: gradients are scaled to this global norm at most; 0: no clipping.
    groups: multiplier of the learning rate of each parameter group. 0, and a group that is not named, is frozen: it has
      no gradient and no optimiser state.
    kind: `adafactor` (Shazeer and Stern 2018) keeps a second moment for each row and column of a matrix and no first
      moment; its learning rate is not relative to the scale of the parameters.
    moments: type in which AdamW stores its two moments, see ops/low_bit_adam.py.
    """

    learning_rate: float = 3e-5
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    final: float = 0.0
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    groups: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1.0))
    kind: Literal["adamw", "adafactor"] = "adamw"
    moments: Literal["float32", "bfloat16", "int8"] = "float32"


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step of the stage: linear warm-up, then constant, or falling to the final rate at `steps`.

    InputError where the warm-up is not shorter than the stage.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps and warmup > 0:
        raise InputError(f"warmup_steps={warmup} must be fewer than the stage's steps={steps}")
    rest = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * config.final, steps - warmup),
        "cosine": optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final),
    }[config.schedule]
    if not warmup:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])


def is_frozen(config: OptimizerConfig, group: str) -> bool:
    return not config.groups.get(group, 0.0)


def check(config: OptimizerConfig) -> None:
    """InputError for a group that no model has, and for moments that Adafactor does not have."""
    if config.kind == "adafactor" and config.moments != "float32":
        raise InputError(f"moments={config.moments!r} is for kind='adamw'; adafactor has no moments to make smaller")
    unknown = set(config.groups) - set(GROUPS)
    if unknown:
        raise InputError(f"unknown parameter groups {sorted(unknown)}; known: {', '.join(GROUPS)}")


def split(config: OptimizerConfig, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) groups of the parameters."""
    check(config)
    frozen = {k: v for k, v in params.items() if is_frozen(config, k)}
    return {k: v for k, v in params.items() if k not in frozen}, frozen


def statistics(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transformation that normalises gradients by their second moments."""
    if config.kind == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if config.moments == "float32":
        return optax.scale_by_adam(config.b1, config.b2, config.eps)
    return low_bit_adam.scale_by_adam(config.b1, config.b2, config.eps, config.moments)


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation for the trainable groups of a stage of `steps` updates."""

    def decays(params: Any) -> Any:  # biases and LayerNorms have one axis
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def scale_groups(updates: Any, _state: Any, _params: Any = None) -> tuple[Any, Any]:
        scaled = {k: jax.tree.map(lambda u, m=config.groups[k]: u * m, v) for k, v in updates.items()}
        return scaled, _state

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        statistics(config),
        optax.add_decayed_weights(config.weight_decay, decays) if config.weight_decay else optax.identity(),
        optax.GradientTransformation(lambda _: optax.EmptyState(), scale_groups),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )
