"""Many layers of one form as one loop over their stacked parameters.

The program has one layer, so that its size and compile time hardly grow with depth. Parameters stay a tree of single
layers, which is what checkpoints, optimisers and indexes know; a step stacks them, which costs one copy of the layers'
parameters. XLA does not undo rematerialisation in a loop, as its CPU backend does without one. On a CPU, a loop without
rematerialisation takes nearly twice the time (docs/what_did_not_work.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rag_jax.models.layers import Remat, saved_by
from rag_jax.system import sharding

SHORTEST = 6  # layers; fewer compile quickly


def applies(module: nn.Module, layers: int) -> bool:
    """Whether a module with so many layers runs them as a loop; `init` never does, since it draws them one by one."""
    how, platform = module.config.scan_layers, sharding.platform()
    pays = platform == "tpu" or (platform == "cpu" and module.config.remat != "none")
    return (how == "on" or (how == "auto" and pays)) and layers >= SHORTEST and not module.is_initializing()


def scan(
    module: nn.Module,
    layers: Sequence[nn.Module],
    x: jax.Array,
    call: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    each: Any,
    policy: Remat,
    deterministic: bool,
) -> tuple[jax.Array, Any]:
    """Hidden states after all layers, and what the layers return, stacked [layers, ...].

    module: the owner of the layers, whose `dropout` key is split among them.
    layers: Flax modules that differ in their parameters alone.
    call: (layer, hidden states, one item of `each`) -> hidden states and what to return.
    each: a pytree of arrays [layers, ...]; None for none.
    policy: what the backward pass recomputes.
    """
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer.variables["params"] for layer in layers))
    keys = None if deterministic else jax.random.split(module.make_rng("dropout"), len(layers))
    run = nn.apply(call, layers[0].clone(parent=None, name=None))

    def body(x: jax.Array, given: tuple[Any, Any, Any]) -> tuple[jax.Array, Any]:
        own, key, item = given
        return run({"params": own}, x, item, rngs=None if key is None else {"dropout": key})

    if policy != "none":
        # nothing outside of the loop can be merged with the recomputation, so no barriers are needed
        body = jax.checkpoint(body, policy=saved_by(policy), prevent_cse=False)
    return jax.lax.scan(body, x, (params, keys, each))
