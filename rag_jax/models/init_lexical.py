"""Initialisation of an encoder that, even untrained, finds passages that share rare words with the question.

The mean of random token vectors, weighted by inverse document frequency, is a random projection of TF-IDF (Johnson and
Lindenstrauss 1984): its inner products are nearly those of the sparse vectors. But LayerNorm gives every token vector
the same length. So a weight w_v is kept as a share of that length: token v starts as w_v * code_v + sqrt(1 - w_v^2) *
filler, with one filler for all tokens, which the scale of the last LayerNorm sets to 0. The layers start near the
identity, and positions near zero. All weights are trained further; the architecture does not change.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

FILLER = 2  # dimensions of the embedding that hold the filler
QUIET = 0.1  # factor of what layers, positions and token types add at the start

Tree = dict[str, Any]


def inverse_document_frequency(ids_NL: np.ndarray, length_N: np.ndarray, vocab_size: int, sample: int = 100_000) -> Any:
    """Inverse document frequencies log(N / n_v) / log(N) [V], between 0 and 1.

    n_v is the number of passages with token v, among N; a token of all passages has 0, one of a single or no passage 1.

    ids_NL, length_N: tokens of the passages, and how many each has.
    sample: passages that are counted at most, evenly spread over the corpus.
    """
    rows = np.unique(np.linspace(0, len(length_N) - 1, min(sample, len(length_N))).astype(np.int64))
    seen_V = np.zeros(vocab_size, np.int64)
    for row in rows:
        seen_V[np.unique(ids_NL[row][: length_N[row]])] += 1
    n = max(len(rows), 2)
    return np.log(n / np.clip(seen_V, 1, n)) / np.log(n)


def lexical_start(params: Tree, weight_V: np.ndarray) -> Tree:
    """Parameters of a Bert with norm="pre", unboxed, with the lexical initialisation written in.

    weight_V: weights w_v of the tokens, from `inverse_document_frequency`.

    ValueError for an encoder without a last LayerNorm.
    """
    if "final_norm" not in params:
        raise ValueError("init='lexical' needs norm='pre': its last LayerNorm takes the filler out")
    code_VD = params["word"]["embedding"].at[:, :FILLER].set(0.0)
    width = code_VD.shape[1]

    def standard(x: jax.Array) -> jax.Array:  # normalised as by LayerNorm, which then leaves it unchanged
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
