"""A start from which a small generator learns to copy at once: one induction head (Olsson et al. 2022), written into the weights.

Copying a name of several tokens takes two attention heads that must find each other: one in the encoder that tells each position
which token stands before it, and one in the decoder that looks, after writing token y, for the position whose predecessor is y
and writes what stands there. From random weights, their forming takes thousands of steps. Here they are there at the start:

- tokens and positions live in different dimensions of the embedding: the first C (the width of a head) are the positions';
- encoder layer 0, head 0 looks one position back (sinusoids turned by one position) and adds a code of that token;
- decoder layer 0, all cross-attention heads but the last look for the code of the token just written, and copy.

Everything is trained on from there; the architecture is the ordinary one (compare the mimetic initialisation of Trockman and
Kolter 2023, which starts attention from products near the identity).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BASE = 100.0  # slowest sinusoid: about 6 * BASE positions
SHARPNESS = 3.2  # of the head that looks one back: about 95% of its weight on that position
MATCH = 0.7  # of the query and the key that look for the code: a match scores about 7 more than any other token
COPY = 2.0  # how much louder the copied token is than the one just written, which the residual stream carries along

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


def induction_start(params: Tree, heads: int, offset: int) -> Tree:
    """The parameters of a Bart with the two heads written in. Arrays only: plain, unboxed; works under jit.

    Needs a head width that is even; with fewer than two heads the last head is used for copying too.
    """
    width = params["shared"]["embedding"].shape[1]
    size = width // heads
    rows = params["encoder"]["position"]["embedding"].shape[0]
    table, rotation = _positions(rows, size, offset)
    position = jnp.zeros((rows, width)).at[:, :size].set(jnp.asarray(table, jnp.float32))
    before = params["encoder"]["layer_0"]["self_attention"]
    cross = params["decoder"]["layer_0"]["cross_attention"]
    # value and output of the head that looks back: a code [D, C] of the token, and where it is written [C, D]
    code = before["value"]["kernel"][:, :size].at[:size].set(0.0)
    written = before["out"]["kernel"][:size] * (width / size) ** 0.5  # lecun_normal of [D, D], as if from C inputs
    look = jnp.zeros((width, size)).at[:size].set(SHARPNESS * jnp.eye(size))
    turned = jnp.zeros((width, size)).at[:size].set(SHARPNESS * jnp.asarray(rotation, jnp.float32))
    copying = range(max(heads - 1, 1))
    query, key = cross["query"]["kernel"], cross["key"]["kernel"]
    value, out = cross["value"]["kernel"], cross["out"]["kernel"]
    for head in copying:
        columns = slice(head * size, (head + 1) * size)
        query = query.at[:, columns].set(MATCH * code)
        key = key.at[:, columns].set(MATCH * written.T * size / width)
        # together the copying heads carry the token's own dimensions, a part each
        part = jnp.zeros((width, size)).at[(head + 1) * size : (head + 2) * size].set(jnp.eye(size))
        value = value.at[:, columns].set(part if heads > 1 else value[:, columns])
        out = out.at[columns].set(COPY * part.T if heads > 1 else COPY * value[:, columns].T)
    return jax.tree.map(
        lambda x: x,
        {
            **params,
            "shared": {"embedding": params["shared"]["embedding"].at[:, :size].set(0.0)},
            "encoder": {
                **params["encoder"],
                "position": {"embedding": position},
                "layer_0": {
                    **params["encoder"]["layer_0"],
                    "self_attention": {
                        **before,
                        "query": _kernel(before["query"], before["query"]["kernel"].at[:, :size].set(look)),
                        "key": _kernel(before["key"], before["key"]["kernel"].at[:, :size].set(turned)),
                        "value": _kernel(before["value"], before["value"]["kernel"].at[:, :size].set(code)),
                        "out": _kernel(before["out"], before["out"]["kernel"].at[:size].set(written)),
                    },
                },
            },
            "decoder": {
                **params["decoder"],
                "position": {"embedding": jnp.array(position)},
                "layer_0": {
                    **params["decoder"]["layer_0"],
                    "cross_attention": {
                        "query": _kernel(cross["query"], query),
                        "key": _kernel(cross["key"], key),
                        "value": _kernel(cross["value"], value),
                        "out": _kernel(cross["out"], out),
                    },
                },
            },
        },
    )


def _kernel(dense: Tree, kernel: jax.Array) -> Tree:
    return {**dense, "kernel": kernel}
