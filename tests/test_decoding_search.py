"""Greedy and beam search over tables of conditional probabilities, against enumeration and a plain search."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rag_jax.decoding import search as decoding_search

BOS, PAD, EOS = 0, 1, 2
ROWS = 3


def tables(vocabulary, length, seed=0, eos_bonus=0.0):
    """Random tables log p(token | row, tokens after bos): for every position an array [ROWS, V^t, V]."""
    rng = np.random.default_rng(seed)
    made = []
    for t in range(length - 1):
        logits = rng.normal(0, 1.5, (ROWS, vocabulary**t, vocabulary))
        logits[..., EOS] += eos_bonus
        made.append(np.log(oracles.softmax(logits)).astype(np.float32))
    return made


def next_logp(table, row):
    """Log-probabilities of the next token as a function of the tokens so far."""

    def look_up(tokens):
        vocabulary, code = table[0].shape[-1], 0
        for token in tokens[1:]:
            code = code * vocabulary + token
        return table[len(tokens) - 1][row, code]

    return look_up


def as_step(table, calls=None):
    """The tables as a step; its cache is the row and a code of the prefix, wrong unless it moves with its beam."""
    vocabulary = table[0].shape[-1]
    widest = table[-1].shape[1]
    padded = jnp.stack([jnp.pad(t, ((0, 0), (0, widest - t.shape[1]), (0, 0))) for t in table])

    def step(tokens, cache):
        position = cache["t"]
        if calls is not None:
            jax.debug.callback(lambda p: calls.append(int(p)), position)
        code = jnp.where(position == 0, 0, cache["code"] * vocabulary + tokens)
        logp = padded[position, cache["row"], code]

        def kept(beam, token, _logp):
            return jnp.take_along_axis(decoding_search.take(logp, beam), token[..., None], -1)[..., 0]

        return logp, {"row": cache["row"], "code": code, "t": position + 1}, kept

    return step


def reorder(cache, beams):
    return cache | {"code": jnp.take_along_axis(cache["code"], beams, 1)}


def search(table, options, calls=None, rows=ROWS, **more):
    row = jnp.repeat(jnp.arange(rows)[:, None], options.lanes, axis=1)
    cache = {"row": row, "code": jnp.zeros_like(row), "t": jnp.int32(0)}
    return decoding_search.search(as_step(table, calls), cache, rows, options, reorder, **more)


jitted_search = jax.jit(search, static_argnums=(1, 3))


def options_for(table, beams, length_penalty=1.0, **more):
    """Options that return all beams and stop only when nothing can improve, unless changed."""
    beams = max(beams, 1)
    base = {"num_beams": beams, "num_return_sequences": beams, "early_stopping": "never"}
    special = {"start_id": BOS, "eos_id": EOS, "pad_id": PAD, "max_length": len(table) + 1}
    return decoding_search.DecodingOptions(**base | special | {"length_penalty": length_penalty} | more)


def run(table, beams, length_penalty=1.0, calls=None, rows=ROWS, **more):
    """Runs the search, greedy for 0 beams; calls: collects the position of every step."""
    options = options_for(table, beams, length_penalty, **more)
    if calls is None:
        return jitted_search(table, options, None, rows)
    found = jax.jit(lambda t: search(t, options, calls, rows))(table)
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
    assert len(ends) > 1  # some rows have ended while others are still open


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
        assert (found.scores[row, n:] == decoding_search.NEVER).all()  # there are no more sequences


@pytest.mark.parametrize(
    ("beams", "penalty", "eos_bonus"),
    [(2, 1.0, 2.0), (3, 0.0, 0.0), (3, 2.0, 1.0), (4, -0.5, 1.0)],
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
            logp = found.scores[row] * decoding_search.lengths(found.sequences[row], (EOS,)) ** penalty
            np.testing.assert_allclose(logp, [logp for *_, logp in expected], rtol=1e-5)


def test_search_stops_when_nothing_can_improve():
    length = 6
    sure, unsure = tables(4, length, eos_bonus=12.0), tables(4, length, eos_bonus=-12.0)
    mixed = [np.concatenate([a[:1], b[1:]]) for a, b in zip(sure, unsure, strict=True)]
    for beams, steps in ((1, 1), (2, 2)):  # two beams: eos, and another token with eos
        short, long = [], []
        alone = run(sure, beams, 0.0, short, rows=1)
        beside = run(mixed, beams, 0.0, long)
        assert (len(short), len(long)) == (steps, length - 1)
        # open rows change nothing for a row that has ended
        np.testing.assert_array_equal(alone.sequences[0], beside.sequences[0])
        np.testing.assert_array_equal(alone.scores[0], beside.scores[0])


def test_length_penalty_prefers_long_answers():
    """p("eos") = 0.4, p("3 eos") = 0.6 * 0.6: the sum of log-probabilities prefers the first, their mean the second."""
    first, second = np.full((ROWS, 1, 4), 1e-9), np.full((ROWS, 4, 4), 1e-9)
    first[:, 0, [EOS, 3]] = 0.4, 0.6
    second[:, :, [EOS, 3]] = 0.6, 0.4
    table = [np.log(first).astype(np.float32), np.log(second).astype(np.float32)]
    assert run(table, 2, 0.0).sequences[0, 0].tolist() == [BOS, EOS, PAD]
    assert run(table, 2, 1.0).sequences[0, 0].tolist() == [BOS, 3, EOS]


def test_early_stopping_is_whether_a_long_answer_may_still_overtake():
    """p("eos") = 0.4 and p("1 eos") = 0.3 at first; after "3" (0.1) all tokens are certain, and the mean rises."""
    sure = [np.full((ROWS, 4**t, 4), 1e-9) for t in range(5)]
    sure[0][..., [EOS, 1, 3]] = 0.4, 0.3, 0.1
    for t, table in enumerate(sure[1:], 1):
        table[..., 3] = 1.0
        table[:, np.arange(4**t) // 4 ** (t - 1) == 1] = [1e-9, 1e-9, 1.0, 1e-9]  # after 1 comes eos
    table = [np.log(table).astype(np.float32) for table in sure]
    for early, expected in (("never", [BOS, 3, 3, 3, 3, 3]), (True, [BOS, 1, EOS, PAD, PAD, PAD])):
        found = run(table, 2, early_stopping=early)
        assert found.sequences[0, 0].tolist() == expected
    assert found.sequences[0, 1].tolist() == [BOS, EOS, PAD, PAD, PAD, PAD]


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_kept_goes_with_its_tokens(beams):
    table = tables(5, 6, seed=3)
    found = run(table, beams, 0.5)
    for row in range(ROWS):
        look_up = next_logp(table, row)
        for n in range(beams):
            tokens, count = (
                found.sequences[row, n].tolist(),
                int(decoding_search.lengths(found.sequences, (EOS,))[row, n]),
            )
            logp = [look_up(tuple(tokens[:t]))[tokens[t]] for t in range(1, count + 1)]
            np.testing.assert_allclose(found.kept[row, n, :count], logp, rtol=1e-6)
            np.testing.assert_allclose(found.scores[row, n], sum(logp) / count**0.5, rtol=1e-5)


def every(table, row):
    """(score, padded tokens) of all sequences, best first, without length penalty."""
    look_up, length = next_logp(table, row), len(table) + 1
    ranked = []
    for tokens in oracles.sequences(table[0].shape[-1], length - 1, EOS):
        logp = sum(look_up((BOS, *tokens[:t]))[token] for t, token in enumerate(tokens))
        ranked.append((float(logp), oracles.pad((BOS, *tokens), length, PAD)))
    return sorted(ranked, reverse=True)


RULES = {
    "min_length": ({"min_length": 3}, lambda y: EOS not in y[:3]),
    "bad_words": ({"bad_words": ((3,), (0, 1))}, lambda y: 3 not in y and (0, 1) not in pairwise(y)),
    "no_repeat": ({"no_repeat_ngram_size": 2}, lambda y: len(set(pairwise(y))) == len(y) - 1),
    "forced_bos": ({"forced_bos_id": 3}, lambda y: y[1] == 3),
    "forced_eos": ({"forced_eos_id": EOS}, lambda y: EOS in y),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_leave_what_they_allow(rule):
    """With as many beams as sequences, the result is the best sequence that the rule allows."""
    options, obeys = RULES[rule]
    table = tables(4, 4, seed=1)
    found = run(table, 64, 0.0, **options)
    forced = rule.startswith("forced")  # a forced token costs nothing
    for row in range(ROWS):
        look_up, best = next_logp(table, row), []
        for _, tokens in every(table, row):
            said = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
            if obeys(tuple(said)):
                free = {1} if rule == "forced_bos" else {3} if rule == "forced_eos" else set()
                logp = [look_up(tuple(said[:t]))[said[t]] for t in range(1, len(said)) if t not in free]
                best.append((float(sum(logp)), tokens))
        best.sort(reverse=True)
        np.testing.assert_allclose(found.scores[row, 0], best[0][0], rtol=1e-5)
        assert found.sequences[row, 0].tolist() == best[0][1]
        assert forced or obeys(
            tuple(found.sequences[row, 0].tolist()[: int(decoding_search.lengths(found.sequences, (EOS,))[row, 0]) + 1])
        )


def test_repetition_is_penalised():
    table = tables(5, 6, seed=2)
    found = run(table, 1, repetition_penalty=1.7)
    changed = False
    for row in range(ROWS):
        look_up, tokens = next_logp(table, row), (BOS,)
        while len(tokens) == 1 or (len(tokens) < 6 and tokens[-1] != EOS):
            scores = np.array(look_up(tokens), np.float64)
            for token in set(tokens):
                scores[token] *= 1.7  # all scores are negative
            tokens = (*tokens, int(scores.argmax()))
        assert found.sequences[row, 0].tolist() == oracles.pad(tokens, 6, PAD)
        changed |= found.sequences[row, 0].tolist() != run(table, 1).sequences[row, 0].tolist()
    assert changed


@pytest.mark.parametrize("beams", [1, 3, 8])
def test_only_allowed_outputs_are_found(beams):
    table = tables(5, 5, seed=4)
    allowed = [(3, 4), (3, 0, 1), (4,), (0, 3, 3)]
    tree = decoding_search.prefix_tree(allowed, EOS)
    options = options_for(table, beams, 0.0, num_return_sequences=min(beams, 4))
    found = jax.jit(lambda tree: search(table, options, tree=tree))(tree)
    for row in range(ROWS):
        ranked = []
        for y in allowed:
            y = (BOS, *y, EOS)
            ranked.append((sum(next_logp(table, row)(y[:t])[y[t]] for t in range(1, len(y))), oracles.pad(y, 5, PAD)))
        ranked.sort(reverse=True)
        outputs = found.sequences[row].tolist()
        assert all(y in [tokens for _, tokens in ranked] for y in outputs)
        if beams == 8:  # more than there are sequences
            assert outputs == [tokens for _, tokens in ranked]
            np.testing.assert_allclose(found.scores[row], [score for score, _ in ranked], rtol=1e-5)


def test_samples_follow_the_distribution():
    table, rows = tables(4, 3, seed=5), 1
    options = options_for(table, 1, do_sample=True, num_return_sequences=4000)
    found = jax.jit(lambda key: search(table, options, None, rows, key=key))(jax.random.key(0))
    counts = {}
    for y in map(tuple, found.sequences[0].tolist()):
        counts[y] = counts.get(y, 0) + 1
    for logp, tokens in every([t[:1] for t in table], 0):
        p = np.exp(logp)
        assert abs(counts.get(tuple(tokens), 0) / 4000 - p) < 4 * np.sqrt(p * (1 - p) / 4000) + 1e-3
    again = jax.jit(lambda key: search(table, options, None, rows, key=key))(jax.random.key(1))
    assert (again.sequences != found.sequences).any()


def test_top_k_and_top_p_and_temperature_narrow_the_samples():
    table = tables(6, 2, seed=6)
    p = np.exp(table[0][0, 0])
    order = np.argsort(-p)

    def drawn(**options):
        wanted = options_for(table, 1, do_sample=True, num_return_sequences=2000, **options)
        found = jax.jit(lambda key: search(table, wanted, None, 1, key=key))(jax.random.key(0))
        return np.bincount(found.sequences[0, :, 1], minlength=6) / 2000

    assert set(np.flatnonzero(drawn(top_k=2))) == set(order[:2])
    enough = 0.7 * p[order[0]] + 0.3 * (p[order[0]] + p[order[1]])  # between the best token's share and the best two's
    assert set(np.flatnonzero(drawn(top_p=float(enough)))) == set(order[:2])
    assert set(np.flatnonzero(drawn(top_p=float(p[order[0]] * 0.5)))) == {order[0]}
    warm = p**0.5 / (p**0.5).sum()
    np.testing.assert_allclose(drawn(temperature=2.0), warm, atol=0.05)


def test_beams_may_be_drawn():
    """Sampling beams is without replacement: as many beams as sequences find all of them; fewer beams vary by key."""
    table = tables(3, 3, seed=7)
    options = options_for(table, 9, 0.0, do_sample=True)
    found = jax.jit(lambda key: search(table, options, key=key))(jax.random.key(0))
    assert found.sequences[0].tolist()[0] == every(table, 0)[0][1]
    few = options_for(table, 2, 0.0, do_sample=True)
    draws = {
        tuple(jax.jit(lambda k: search(table, few, key=k))(jax.random.key(i)).sequences[0, 0].tolist())
        for i in range(8)
    }
    assert len(draws) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_beams": 0}, {"max_length": 1}, {"early_stopping": "always"}, {"bad_words": ((),)}, {"temperature": 0.0},
        {"repetition_penalty": 0.0}, {"no_repeat_ngram_size": -1}, {"top_k": -1}, {"top_p": 0.0}, {"min_length": -1},
        {"num_return_sequences": 0}, {"num_return_sequences": 3, "num_beams": 2},
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        decoding_search.DecodingOptions(**wrong)


def test_allowed_outputs_must_make_sense():
    for outputs, message in (
        ([], "no allowed outputs"),
        ([()], "must have tokens"),
        ([(3, EOS, 4)], "at its end only"),
    ):
        with pytest.raises(ValueError, match=message):
            decoding_search.prefix_tree(outputs, EOS)
    with pytest.raises(ValueError, match="needs a key"):
        search(tables(3, 3), decoding_search.DecodingOptions(do_sample=True))


def test_lengths_count_to_the_first_eos():
    sequences = jnp.array([[EOS, 3, EOS, PAD], [BOS, 3, PAD, 3], [BOS, EOS, PAD, PAD], [BOS, 3, 3, EOS]])
    assert decoding_search.lengths(sequences, (EOS,)).tolist() == [2, 3, 1, 3]


@pytest.mark.parametrize(("beams", "vocabulary"), [(4, 1000), (4, 128 * 9), (1, 700), (4, 20), (3, 5000)])
def test_the_best_are_the_best_of_all(beams, vocabulary):
    """In blocks of the vocabulary or not; among equal scores, and among impossible tokens, the first ones."""
    rng = np.random.default_rng(vocabulary)
    count = 2 * beams
    for levels, never in ((10, 0.0), (60_000, 0.0), (10, 0.999), (1, 1.0)):
        scores = rng.integers(0, levels, (ROWS, beams, vocabulary)).astype(np.float32) * 2.0 ** -round(
            np.log2(levels) - 3
        )
        scores[rng.random(scores.shape) < never] = -np.inf
        live = rng.integers(-8, 0, (ROWS, beams)).astype(np.float32)
        wanted = (scores + live[..., None]).reshape(ROWS, -1)
        order = np.argsort(-wanted, axis=-1, kind="stable")[:, :count]
        best, beam, token, said = decoding_search.best_of(jnp.asarray(scores), jnp.asarray(live), count, True)
        np.testing.assert_array_equal(best, np.take_along_axis(wanted, order, 1))
        np.testing.assert_array_equal(np.asarray(beam) * vocabulary + np.asarray(token), order)
        np.testing.assert_array_equal(said, np.take_along_axis(scores.reshape(ROWS, -1), order, 1))
        if never < 1:
            logp = np.log(oracles.softmax(scores.astype(np.float64))) + live[..., None]
            best, *_ = decoding_search.best_of(jnp.asarray(scores), jnp.asarray(live), count, False)
            np.testing.assert_allclose(best, -np.sort(-logp.reshape(ROWS, -1))[:, :count], atol=2e-5)
