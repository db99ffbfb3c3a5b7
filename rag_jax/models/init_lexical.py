"""A start from which an encoder trained from scratch already finds passages that share rare words with the question.

A mean of random token vectors, each weighted by its inverse document frequency, is a random projection of TF-IDF
(Johnson and Lindenstrauss 1984): inner products are nearly those of the sparse vectors. A LayerNorm gives every token
the same length, so the weight is kept as a share of it: token v starts as w_v * code_v + sqrt(1 - w_v^2) * filler, with
one filler for all, which the last LayerNorm's scale takes out. The layers start near the identity, positions near zero.
Everything is trained on from there; the architecture is the ordinary one.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

FILLER = 2  # dimensions of the embedding that hold the filler
QUIET = 0.1  # of what the layers and the positions add at the start

Tree = dict[str, Any]


def inverse_document_frequency(ids_NL: np.ndarray, length_N: np.ndarray, vocab_size: int, sample: int = 100_000) -> Any:
    """log(N / n_v) / log(N) [V], between 0 (in every passage) and 1 (in one or none), from at most `sample` passages
    evenly spread.
    """
    rows = np.unique(np.linspace(0, len(length_N) - 1, min(sample, len(length_N))).astype(np.int64))
    seen_V = np.zeros(vocab_size, np.int64)
    for row in rows:
        seen_V[np.unique(ids_NL[row][: length_N[row]])] += 1
    n = max(len(rows), 2)
    return np.log(n / np.clip(seen_V, 1, n)) / np.log(n)


def lexical_start(params: Tree, weight_V: np.ndarray) -> Tree:
    """The parameters of a Bert with norm="pre", unboxed, with the start written in; weight_V as above.

    ValueError for an encoder without a last LayerNorm.
    """
    if "final_norm" not in params:
        raise ValueError("init='lexical' needs norm='pre': its last LayerNorm takes the filler out")
    code_VD = params["word"]["embedding"].at[:, :FILLER].set(0.0)
    width = code_VD.shape[1]

    def standard(x: jax.Array) -> jax.Array:  # what LayerNorm makes of it, so that LayerNorm leaves it alone
        x = (x - x[:, FILLER:].mean(-1, keepdims=True)).at[:, :FILLER].set(0.0)
        return x * jnp.sqrt(width / jnp.square(x).sum(-1, keepdims=True))

    filler_D = jnp.zeros(width).at[:FILLER].set(jnp.array([1.0, -1.0]) * (width / FILLER) ** 0.5)
    weight_V1 = jnp.asarray(weight_V, jnp.float32)[:, None]
    word = weight_V1 * standard(code_VD) + jnp.sqrt(1.0 - jnp.square(weight_V1)) * filler_D

    def quiet(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[0] in ("position", "token_type") or names[-2] in ("out", "outer"):
            return QUIET * leaf
        return leaf

    params = jax.tree_util.tree_map_with_path(quiet, nn.unbox(params))
    scale = params["final_norm"]["scale"].at[:FILLER].set(0.0)
    return params | {"word": {"embedding": word}, "final_norm": params["final_norm"] | {"scale": scale}}
