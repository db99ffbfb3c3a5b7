"""The initialised induction head of a generator: it attends one back, copies, and keeps names and shapes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models import init_copying
from rag_jax.models.bart import POSITION_OFFSET, Bart, BartConfig

CONFIG = BartConfig(
    vocab_size=300,
    width=64,
    encoder_layers=2,
    decoder_layers=2,
    heads=4,
    hidden=64,
    positions=96,
    dropout=0.0,
    norm="pre",
    init="copy",
    logit_scale=64**-0.5,
)
IDS = np.random.default_rng(0).permuted(np.tile(np.arange(10, 300), (8, 1)), axis=1)[:, :60]  # no token twice


@pytest.fixture(scope="module")
def boxed():
    ids, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    return Bart(CONFIG).init(jax.random.key(0), ids, mask, ids)["params"]


@pytest.fixture(scope="module")
def started(boxed):
    return nn.unbox(init_copying.induction_start(boxed, CONFIG.heads, POSITION_OFFSET))


def test_names_and_shapes_stay(boxed):
    new = init_copying.induction_start(boxed, CONFIG.heads, POSITION_OFFSET)
    assert nn.get_partition_spec(new) == nn.get_partition_spec(boxed)
    assert jax.tree.map(jnp.shape, nn.unbox(new)) == jax.tree.map(jnp.shape, nn.unbox(boxed))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nn.unbox(new))]
    assert len(set(buffers)) == len(buffers)  # a step that donates its state must not be given one buffer twice


def test_the_first_head_looks_one_back(started):
    size = CONFIG.width // CONFIG.heads
    positions = started["encoder"]["position"]["embedding"][POSITION_OFFSET : POSITION_OFFSET + 40]
    look = started["encoder"]["layer_0"]["self_attention"]
    query = positions @ look["query"]["kernel"][:, :size]
    key = positions @ look["key"]["kernel"][:, :size]
    weights = jax.nn.softmax(query @ key.T * size**-0.5, axis=-1)
    assert (np.asarray(weights[5:]).argmax(1) == np.arange(4, 39)).all()
    assert np.diag(np.asarray(weights), -1)[5:].min() > 0.75


def continued(params) -> tuple[float, float]:
    """After source[20:30], how often source[21:31] comes next, and with what log-probability."""
    logits = Bart(CONFIG).apply(
        {"params": params}, jnp.asarray(IDS), jnp.ones(IDS.shape, bool), jnp.asarray(IDS[:, 20:30])
    )
    wanted = IDS[:, 21:31]
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), wanted[..., None], -1)
    return float((np.asarray(logits).argmax(-1) == wanted).mean()), float(logp.mean())


def test_it_copies_before_any_training(boxed, started):
    share, logp = continued(started)
    plain_share, plain_logp = continued(nn.unbox(boxed))
    assert plain_share < 0.05 < 0.1 < share
    assert logp > plain_logp + 0.3


def test_what_cannot_have_the_heads(boxed):
    with pytest.raises(ValueError, match="2 heads or more"):
        init_copying.induction_start(boxed, 1, POSITION_OFFSET)
