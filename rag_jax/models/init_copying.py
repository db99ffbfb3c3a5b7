"""Initialisation of a small Bart with an induction head (Olsson et al. 2022), so that it learns to copy quickly.

Copying a name of several tokens takes two attention heads that work together. One in the encoder tells each position
which token precedes it. One in the decoder, after writing token y, looks for the position whose predecessor is y and
writes the token there. From random weights such heads take thousands of steps to form. Here the weights contain them
from the start:

- tokens and positions use different dimensions of the embedding: the first C (the width of a head) are for positions;
- encoder layer 0, head 0 attends one position back (its keys are sinusoids rotated by one position) and adds a code of
  the token there;
- all cross-attention heads but one of the last decoder layer look for the code of the token just written, and copy.
  They are in the last layer so that the same heads can choose where to begin copying, by what the layers below gather
  from the question.

All weights are trained further; the architecture does not change. (Compare the mimetic initialisation of Trockman and
Kolter 2023, which starts attention from products near the identity.)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.models.bart import POSITION_OFFSET, BartConfig

BASE = 100.0  # slowest sinusoid: about 6 * BASE positions
SHARPNESS = 3.2  # scale of query and key of the head that looks one back: about 95% of its weight on that position
NEIGHBOURHOODS = ((-3, 1.0), (3, 1.0))  # (shift, sharpness) of the heads that gather the words before and after
MATCH = 2.5  # scale of query and key of the copying heads, so that a matching code wins over the other tokens
COPY = 4.0  # scale of the copied token, to outweigh the token just written, which the residual stream also carries

Tree = dict[str, Any]


def _positions(rows: int, width: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Sinusoids [rows, width] of unit variance, and the rotation [width, width] with row[p] @ rotation = row[p + 1]."""
    rates = BASE ** -(np.arange(width // 2) / (width // 2))
    angles = (np.arange(rows)[:, None] - offset) * rates
    table = np.sqrt(2.0) * np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(rows, width)
    rotation = np.zeros((width, width))
    for i, rate in enumerate(rates):
        sin, cos = np.sin(rate), np.cos(rate)
        rotation[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[cos, -sin], [sin, cos]]
    return table, rotation


def start(params: Tree, config: BartConfig) -> Tree:
    """Freshly drawn parameters with the induction head written in if the configuration has init="copy"."""
    return induction_start(params, config.heads, POSITION_OFFSET) if config.init == "copy" else params


def induction_start(boxed: Tree, heads: int, offset: int) -> Tree:
    """Parameters of a Bart with the induction head written in.

    boxed: the parameters, boxed with their logical axis names or not; so is the result.
    heads: attention heads of a layer.
    offset: row of position 0 in the position tables.

    ValueError for fewer than two heads, an odd head width, or no layers.
    """
    params = nn.unbox(boxed)
    width = params["shared"]["embedding"].shape[1]
    size = width // heads
    if heads < 2 or size % 2 or "layer_0" not in params["encoder"] or "layer_0" not in params["decoder"]:
        raise ValueError(
            f"init='copy' needs 2 heads or more of even width and a layer on each side; got {heads} of {size}"
        )
    rows = params["encoder"]["position"]["embedding"].shape[0]
    table, rotation = _positions(rows, size, offset)
    position = jnp.zeros((rows, width)).at[:, :size].set(jnp.asarray(table, jnp.float32))
    back = params["encoder"]["layer_0"]["self_attention"]
    # the head that looks one back reads a code [D, C] of the token there (its value projection) and writes it into the
    # residual stream by [C, D] (its output projection)
    code = back["value"]["kernel"][:, :size].at[:size].set(0.0)
    written = back["out"]["kernel"][:size] * (width / size) ** 0.5  # scaled for D inputs when drawn, used with C
    looking = {name: back[name]["kernel"] for name in ("query", "key", "value", "out")}
    looking["value"] = looking["value"].at[:, :size].set(code)
    looking["out"] = looking["out"].at[:size].set(written)
    for head, (shift, sharpness) in enumerate(((-1, SHARPNESS), *NEIGHBOURHOODS)[: heads - 1]):
        mine = slice(head * size, (head + 1) * size)
        turned = np.linalg.matrix_power(rotation if shift < 0 else rotation.T, abs(shift))
        for name, matrix in (("query", np.eye(size)), ("key", turned)):
            rows_only = jnp.zeros((width, size)).at[:size].set(sharpness * jnp.asarray(matrix, jnp.float32))
            looking[name] = looking[name].at[:, mine].set(rows_only)
    last = f"layer_{sum(name.startswith('layer_') for name in params['decoder']) - 1}"
    cross = params["decoder"][last]["cross_attention"]
    kernels = {name: cross[name]["kernel"] for name in ("query", "key", "value", "out")}
    for head in range(heads - 1):
        mine = slice(head * size, (head + 1) * size)
        # each copying head copies C dimensions of a token; together they copy all token dimensions
        part = jnp.zeros((width, size)).at[(head + 1) * size : (head + 2) * size].set(jnp.eye(size))
        kernels["query"] = kernels["query"].at[:, mine].set(MATCH * code)
        kernels["key"] = kernels["key"].at[:, mine].set(MATCH * written.T * size / width)
        kernels["value"] = kernels["value"].at[:, mine].set(part)
        kernels["out"] = kernels["out"].at[mine].set(COPY * part.T)
    first, layer = ("encoder", "layer_0", "self_attention"), ("decoder", last, "cross_attention")
    new: dict[tuple, jax.Array] = {
        ("shared", "embedding"): params["shared"]["embedding"].at[:, :size].set(0.0),
        ("encoder", "position", "embedding"): position,
        # a copy: the two tables must not share a buffer, or it would be donated twice
        ("decoder", "position", "embedding"): jnp.array(position),
        **{(*first, name, "kernel"): kernel for name, kernel in looking.items()},
        **{(*layer, name, "kernel"): kernel for name, kernel in kernels.items()},
    }

    def replace(path: tuple, leaf: Any) -> Any:
        value = new.get(tuple(key.key for key in path if hasattr(key, "key")))
        boxed_leaf = isinstance(leaf, nn.meta.AxisMetadata)
        return leaf if value is None else leaf.replace_boxed(value) if boxed_leaf else jnp.array(value)

    return jax.tree_util.tree_map_with_path(replace, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
