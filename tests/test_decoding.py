"""Greedy and beam search over tables of conditional probabilities, against enumeration and a search in lists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rag_jax import decoding

BOS, PAD, EOS = 0, 1, 2
ROWS = 3


def tables(vocabulary, length, seed=0, eos_bonus=0.0):
    """log p(token | row, the tokens after bos), for every prefix: list over positions of [ROWS, V^t, V]."""
    rng = np.random.default_rng(seed)
    made = []
    for t in range(length - 1):
        logits = rng.normal(0, 1.5, (ROWS, vocabulary**t, vocabulary))
        logits[..., EOS] += eos_bonus
        made.append(np.log(oracles.softmax(logits)).astype(np.float32))
    return made


def next_logp(table, row):
    """The tables as a function of the tokens so far."""

    def look_up(tokens):
        vocabulary, code = table[0].shape[-1], 0
        for token in tokens[1:]:
            code = code * vocabulary + token
        return table[len(tokens) - 1][row, code]

    return look_up


def as_step(table, calls=None):
    """The tables as a step: the cache is the row and the code of the prefix, right only if it moves with its beam."""
    vocabulary = table[0].shape[-1]
    widest = table[-1].shape[1]
    padded = jnp.stack([jnp.pad(t, ((0, 0), (0, widest - t.shape[1]), (0, 0))) for t in table])

    def step(tokens, cache, position):
        if calls is not None:
            jax.debug.callback(lambda p: calls.append(int(p)), position)
        code = jnp.where(position == 0, 0, cache["code"] * vocabulary + tokens)
        return padded[position, cache["row"], code], {"row": cache["row"], "code": code}

    return step


def cache_of(beams, rows=ROWS):
    row = jnp.repeat(jnp.arange(rows), beams)
    return {"row": row, "code": jnp.zeros_like(row)}


def search(table, cache, beams, length_penalty, calls=None):
    find = decoding.greedy if beams == 0 else partial(decoding.beam_search, beams=beams)
    return find(
        as_step(table, calls),
        cache,
        len(cache["row"]) // max(beams, 1),
        length=len(table) + 1,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        length_penalty=length_penalty,
    )


jitted_search = jax.jit(search, static_argnums=(2, 3))


def run(table, beams, length_penalty=1.0, calls=None, rows=ROWS):
    """0 beams: greedy. `calls` is given the position of every step that is taken."""
    if calls is None:
        return jitted_search(table, cache_of(max(beams, 1), rows), beams, length_penalty)
    found = jax.jit(lambda t, cache: search(t, cache, beams, length_penalty, calls))(
        table, cache_of(max(beams, 1), rows)
    )
    jax.effects_barrier()
    return found


def test_greedy_is_argmax_step_by_step():
    table = tables(5, 6)
    found = run(table, beams=0)
    ends = set()
    for row in range(ROWS):
        tokens, logp = oracles.greedy(next_logp(table, row), 6, BOS, EOS)
        np.testing.assert_array_equal(found.sequences[row, 0], oracles.pad(tokens, 6, PAD))
        np.testing.assert_allclose(found.scores[row, 0], logp / (len(tokens) - 1), rtol=1e-5)
        ends.add(len(tokens))
    assert len(ends) > 1  # rows that stop and rows that go on, side by side


@pytest.mark.parametrize(("vocabulary", "length", "penalty"), [(3, 4, 1.0), (4, 4, 0.0)])
def test_beams_for_everything_are_enumeration(vocabulary, length, penalty):
    table, beams = tables(vocabulary, length), vocabulary ** (length - 1)
    found = run(table, beams, penalty)
    every = oracles.sequences(vocabulary, length - 1, EOS)
    for row in range(ROWS):
        look_up = next_logp(table, row)
        ranked = []
        for tokens in every:
            logp = sum(look_up((BOS, *tokens[:t]))[token] for t, token in enumerate(tokens))
            ranked.append((logp / len(tokens) ** penalty, oracles.pad((BOS, *tokens), length, PAD)))
        ranked.sort(reverse=True)
        n = len(ranked)
        np.testing.assert_allclose(found.scores[row, :n], [score for score, _ in ranked], rtol=1e-5)
        np.testing.assert_array_equal(found.sequences[row, :n], [tokens for _, tokens in ranked])
        assert (found.scores[row, n:] == decoding.NEVER).all()  # there are no more


@pytest.mark.parametrize(
    ("beams", "penalty", "eos_bonus"),
    [(1, 1.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 0.0), (3, 2.0, 1.0), (3, -0.5, 1.0)],
)
def test_beams_are_those_of_a_search_in_lists_that_never_stops(beams, penalty, eos_bonus):
    length = 6
    for seed in range(3):
        table = tables(4, length, seed, eos_bonus)
        found = run(table, beams, penalty)
        for row in range(ROWS):
            expected = oracles.beam_search(next_logp(table, row), beams, length, BOS, EOS, penalty)
            np.testing.assert_array_equal(
                found.sequences[row], [oracles.pad(tokens, length, PAD) for tokens, *_ in expected]
            )
            np.testing.assert_allclose(found.scores[row], [score for _, score, _ in expected], rtol=1e-5)
            logp = found.scores[row] * decoding.lengths(found.sequences[row], EOS) ** penalty
            np.testing.assert_allclose(logp, [logp for *_, logp in expected], rtol=1e-5)


def test_search_stops_when_nothing_can_improve():
    length = 6
    sure, unsure = tables(4, length, eos_bonus=12.0), tables(4, length, eos_bonus=-12.0)
    mixed = [np.concatenate([a[:1], b[1:]]) for a, b in zip(sure, unsure, strict=True)]
    for beams, steps in ((0, 1), (2, 2)):  # two beams: eos, and another token with eos
        short, long = [], []
        alone = run(sure, beams, 0.0, short, rows=1)
        beside = run(mixed, beams, 0.0, long)
        assert (len(short), len(long)) == (steps, length - 1)
        for a, b in zip(alone, beside, strict=True):  # rows that go on change nothing for the row that is done
            np.testing.assert_array_equal(a[0], b[0])


def test_length_penalty_prefers_long_answers():
    """p("eos") = 0.4, p("3 eos") = 0.6 * 0.6: the sum of log-probabilities prefers the first, the mean the second."""
    first, second = np.full((ROWS, 1, 4), 1e-9), np.full((ROWS, 4, 4), 1e-9)
    first[:, 0, [EOS, 3]] = 0.4, 0.6
    second[:, :, [EOS, 3]] = 0.6, 0.4
    table = [np.log(first).astype(np.float32), np.log(second).astype(np.float32)]
    assert run(table, 2, 0.0).sequences[0, 0].tolist() == [BOS, EOS, PAD]
    assert run(table, 2, 1.0).sequences[0, 0].tolist() == [BOS, 3, EOS]


def test_search_goes_on_while_a_long_answer_may_still_overtake():
    """p("eos") = 0.4 has the better mean at first; after "3" (0.1) all tokens are certain, and the mean rises."""
    length, sure = 6, [np.full((ROWS, 4**t, 4), 1e-9) for t in range(5)]
    sure[0][..., [EOS, 3]] = 0.4, 0.1
    for table in sure[1:]:
        table[..., 3] = 1.0
    found = run([np.log(table).astype(np.float32) for table in sure], 1)
    assert found.sequences[0, 0].tolist() == [BOS, 3, 3, 3, 3, 3]
    np.testing.assert_allclose(found.scores[0, 0], np.log(0.1) / (length - 1), rtol=1e-5)


def test_lengths_count_to_the_first_eos():
    sequences = jnp.array([[EOS, 3, EOS, PAD], [BOS, 3, PAD, 3], [BOS, EOS, PAD, PAD], [BOS, 3, 3, EOS]])
    assert decoding.lengths(sequences, EOS).tolist() == [2, 3, 1, 3]
