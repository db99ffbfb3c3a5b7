"""cuDNN's attention in programs lowered for a GPU: used where training reads whole texts, in no decoding step."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from rag_jax.models.bart import BartConfig
from rag_jax.models.bert import BertConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.t5 import T5Config
from rag_jax.ops import attention
from rag_jax.rag import Rag, RagConfig
from rag_jax.system import sharding

V, B, K, L, T = 32, 2, 3, 16, 8
SIZE = {"vocab_size": V, "width": 16, "heads": 2, "hidden": 32, "dropout": 0.0, "dtype": "bfloat16"}
GENERATORS = {
    "bart": BartConfig(**SIZE, encoder_layers=1, decoder_layers=1, positions=64),
    "t5": T5Config(**SIZE, head_width=8, encoder_layers=1, decoder_layers=1),
    "lm": LmConfig(**SIZE, layers=2, positions=64, attention_dropout=0.0),
}
TRAINED = {"bart": 3, "t5": 3, "lm": 1}  # encoder, decoder, cross; a decoder-only one reads answers after a prefix


def rag_of(generator: str, variant: str = "token") -> Rag:
    encoder = BertConfig(**{**SIZE, "dtype": "float32"}, layers=1)
    return Rag(RagConfig(variant=variant, encoder=encoder, generator=GENERATORS[generator]))


@functools.cache
def shapes(rag: Rag) -> tuple:
    params = nn.unbox(jax.eval_shape(rag.init, jax.random.key(0)))
    given = [((B, K, L), jnp.int32), ((B, K, L), bool), ((B, K), jnp.float32)]
    return params, *(jax.ShapeDtypeStruct(*one) for one in given)


@pytest.fixture
def for_gpu(monkeypatch: pytest.MonkeyPatch):
    """The number of forward calls of cuDNN's attention in a function lowered for a GPU."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(sharding, "platform", lambda mesh=None: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def count(function, *arguments) -> int:
        jax.clear_caches()
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        return len(re.findall(r"@__cudnn\$fmha\w*\(", text)) - len(re.findall(r"@__cudnn\$fmha\w*Backward\(", text))

    return count


@pytest.mark.parametrize("generator", GENERATORS)
def test_training_takes_it(for_gpu, generator) -> None:
    rag = rag_of(generator)
    params, ids, mask, scores = shapes(rag)
    labels = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def loss(params, *given):
        return rag.nll(params, *given).sum()

    assert for_gpu(jax.grad(loss), params, ids, mask, scores, labels) == TRAINED[generator]


@pytest.mark.parametrize(("variant", "beams"), [("token", 4), ("sequence", 2)])
@pytest.mark.parametrize("generator", GENERATORS)
def test_decoding_steps_do_not(for_gpu, generator, variant, beams) -> None:
    """Only the passages, read once, use it; the last layer of a prefix computes no attention output."""
    rag = rag_of(generator, variant)

    def answer(params, *given):
        return rag.generate(params, *given, num_beams=beams, max_length=9)

    assert for_gpu(answer, *shapes(rag)) == 1


def test_it_is_by_what_a_program_will_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for the mesh's CPU devices on a machine with a GPU, and the block program of an index."""
    query, source = jnp.zeros((1, 2, 4, 64), jnp.bfloat16), (jnp.zeros((1, 2, 64, 8)), jnp.zeros((1, 2, 8, 64)))
    mesh = sharding.make_mesh()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.has_fused(query, [source])
    for within in (sharding.on, sharding.running_on):
        with within(mesh):
            assert not attention.has_fused(query, [source])
            assert sharding.platform() == "cpu"
    with sharding.on(mesh), sharding.running_on(mesh):
        assert sharding.shared()
    with sharding.running_on(mesh):
        assert not sharding.shared()


def test_the_whole_text_is_an_option_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_fused", lambda query, sources: True)
    monkeypatch.setattr(attention, "fused_attention", lambda *given: "fused")
    query = jnp.ones((1, 1, 2, 8))
    source, mask = (query.swapaxes(2, 3), query), jnp.ones((1, 1, 2, 2), bool)
    assert attention.attention(query, [source], mask) == "fused"
    assert attention.attention(query, [source], mask, whole=False).shape == query.shape
