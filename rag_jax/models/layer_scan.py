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

from rag_jax.models.layers import saved_by
from rag_jax.ops.kv_cache import KeyValues, LayerKeyValues
from rag_jax.system import sharding

SHORTEST = 6  # layers; fewer compile quickly


def applies(module: nn.Module, layers: int) -> bool:
    """Whether a module with so many layers runs them as a loop; `init` never does, since it draws them one by one."""
    how, platform = module.config.scan_layers, sharding.platform()
    pays = platform == "tpu" or (platform == "cpu" and module.config.remat != "none")
    return (how == "on" or (how == "auto" and pays)) and layers >= SHORTEST and not module.is_initializing()


def run(
    module: nn.Module,
    layers: Sequence[nn.Module],
    x: jax.Array,
    call: Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, LayerKeyValues | None]],
    deterministic: bool,
    each: KeyValues | None = None,
    cache: KeyValues | None = None,
    slot: jax.Array | int = 0,
) -> tuple[jax.Array, KeyValues | None]:
    """Hidden states after all layers, and the keys and values that the layers return, if they do.

    A loop returns keys and values as two arrays, layers one by one as lists (see KeyValues). With a cache, and with
    lists in `each`, layers run one by one, since a loop would copy them.

    module, layers, deterministic: see `scan`.
    call: (layer, hidden states, (keys, values) of the layer in `each`, (keys, values, slot) of it in `cache`) -> hidden
      states and the layer's (keys, values), or None.
    """
    listed = each is not None and isinstance(each.key, list)
    if cache is None and not listed and applies(module, len(layers)):
        x, own = scan(module, layers, x, call, each, deterministic)
        return x, own and KeyValues(*own)
    keys, values = [], []
    for i, layer in enumerate(layers):
        item, room = each and (each.key[i], each.value[i]), cache and (cache.key[i], cache.value[i], slot)
        x, own = call(layer, x, item, room)
        if own is not None:
            keys.append(own[0])
            values.append(own[1])
    return x, KeyValues(keys, values) if keys else None


def scan(
    module: nn.Module,
    layers: Sequence[nn.Module],
    x: jax.Array,
    call: Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any]],
    each: Any,
    deterministic: bool,
) -> tuple[jax.Array, Any]:
    """`run` as a loop: hidden states, and what the layers return, stacked [layers, ...].

    module: the owner of the layers, whose `dropout` key is split among them.
    layers: Flax modules that differ in their parameters alone.
    each: a pytree of arrays [layers, ...]; None for none.
    """
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer.variables["params"] for layer in layers))
    keys = None if deterministic else jax.random.split(module.make_rng("dropout"), len(layers))
    run_layer = nn.apply(call, layers[0].clone(parent=None, name=None))

    def body(x: jax.Array, given: tuple[Any, Any, Any]) -> tuple[jax.Array, Any]:
        own, key, item = given
        return run_layer({"params": own}, x, item, None, rngs=None if key is None else {"dropout": key})

    if module.config.remat != "none":
        # nothing outside of the loop can be merged with the recomputation, so no barriers are needed
        body = jax.checkpoint(body, policy=saved_by(module.config.remat), prevent_cse=False)
    return jax.lax.scan(body, x, (params, keys, each))
