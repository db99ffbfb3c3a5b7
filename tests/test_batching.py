"""From questions to batches: the content of each array, read back with the tokenizers, and the order of examples."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rag_jax.corpus.directory import Corpus
from rag_jax.data import batching, buckets, mixing
from rag_jax.data import examples as made
from rag_jax.data.batching import BatchOptions
from rag_jax.data.readers import formats, sources
from rag_jax.data.readers.formats import Question
from rag_jax.errors import InputError

QUESTION, TARGET = 32, 20


@pytest.fixture(scope="module")
def corpus(tiny_data):
    return Corpus.open(tiny_data / "corpus")


@pytest.fixture(scope="module")
def questions(tiny_data):
    return formats.read_questions(tiny_data / "world/train.jsonl")


def tokenise(questions, corpus, **changes):
    return made.tokenise(questions, corpus, **{"question_length": QUESTION, "target_length": TARGET} | changes)


def all_pairs(examples):
    return np.arange(len(examples.label))


def with_answer(examples):
    """Pairs (question, answer) whose answer occurs in the gold passage."""
    return np.flatnonzero(examples.answer_P2[:, 1] > 0)


def batches(examples, corpus, *, sample=False, pairs=None, most=0, **changes):
    """Batches of the given pairs, by default all."""
    pairs = all_pairs(examples) if pairs is None else pairs
    units = batching.units_of(examples, pairs, sample, most)
    wanted = {"batch": 8, "seed": 0, "lengths": (QUESTION, TARGET)} | changes
    return batching.question_batches(examples, units, corpus, BatchOptions(**wanted))


@pytest.fixture(scope="module")
def examples(questions, corpus):
    return tokenise(questions, corpus)


def question(i, answers=("Anna",), gold=(), target=None, text="Who?"):
    return Question(str(i), text, tuple(answers), tuple(gold), target, {})


# --- tokenise ---------------------------------------------------------------------------------------------------------


def test_every_array_says_what_the_question_says(questions, corpus, examples):
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    assert len(examples) == len(examples.label) == len(questions) > 100
    assert examples.texts(range(len(questions))) == [q.question for q in questions]
    for i, q in enumerate(questions):
        assert examples.question[i].tolist() == encoder.backend.encode(q.question).ids
        tail = generator.encode_batch([" // " + q.question])[0]
        assert examples.tail[i].tolist() == [*tail, *generator.suffix_ids]
        answer = generator.encode_batch([" " + q.answers[0]])[0]
        assert examples.label[i].tolist() == [*generator.prefix_ids, *answer, *generator.suffix_ids]
        assert [corpus[row].id for row in examples.gold[i]] == list(q.positive_passage_ids)
        assert len(examples.hard[i]) == len(examples.other[i]) == 0


def test_further_right_passages_are_no_negatives(questions, corpus):
    """They follow the positive passage in `gold`, so the contrastive loss leaves them out and recall counts them."""
    first, last = corpus.row(questions[0].positive_passage_ids[0]), len(corpus) - 1
    wrong = {
        "also_relevant_passage_ids": (corpus[last].id,),
        "hard_negative_passage_ids": (corpus[2].id, "nowhere", corpus[first].id, corpus[1].id, corpus[2].id),
        "negative_passage_ids": (corpus[1].id, corpus[last].id, corpus[3].id),
    }
    changed = [dataclasses.replace(questions[0], **wrong), questions[1]]
    assert first > 3
    with_negatives = tokenise(changed, corpus, negatives=True)
    assert with_negatives.gold[0].tolist() == [first, last]
    assert with_negatives.gold[1].tolist() == [corpus.row(questions[1].positive_passage_ids[0])]
    assert [with_negatives.hard[i].tolist() for i in (0, 1)] == [[2, 1], []]
    assert [with_negatives.other[i].tolist() for i in (0, 1)] == [[3], []]
    assert len(tokenise(changed, corpus).hard[0]) == 0


def test_the_span_in_the_gold_passage_is_the_answer(questions, corpus, examples):
    """All answers of the world occur in their passages, whole where the passage was not truncated."""
    found = 0
    for i, (q, (start, stop)) in enumerate(zip(questions, examples.answer_P2, strict=True)):
        if stop:
            found += 1
            row = examples.gold[i][0]
            span = corpus.generator_ids[row][start:stop]
            assert corpus.generator_tokenizer.decode(span) == " " + q.answers[0]
            assert examples.label[i][1 : 1 + stop - start].tolist() == span.tolist()
            assert stop <= corpus.generator_length[row]
    assert 0.6 * len(questions) < found < len(questions)  # passages are truncated, so some answers are lost


@pytest.fixture
def asked(corpus):
    """Questions with one answer, with two, with none, and with a target."""
    gold = [corpus[i].id for i in (3, 1)]
    return [
        question(0, ["Anna", "Anna Aska"], gold),
        question(1, []),
        question(2, ["nobody"], target=" Berta "),
        question(3, [" "]),
        question(4, ["x", " ", "y"], gold[:1]),
    ]


def test_the_first_answer_or_all_of_them(asked, corpus):
    one, each = tokenise(asked, corpus), tokenise(asked, corpus, answers="every")
    texts = [[corpus.generator_tokenizer.decode(row) for row in table.label] for table in (one, each)]
    assert texts == [[" Anna", " Berta", " x"], [" Anna", " Anna Aska", " Berta", " x", " y"]]
    assert len(one) == len(each) == 3
    assert each.question_of(np.arange(5)).tolist() == [0, 0, 1, 2, 2] and one.first_N1.tolist() == [0, 1, 2, 3]
    assert [each.gold[i].tolist() for i in range(3)] == [[3, 1], [], [3]]
    assert one.answer_P2.tolist() == [[0, 0]] * 3
    sampled = tokenise(asked, corpus, answers="sample")
    for name, array in each.arrays().items():
        np.testing.assert_array_equal(array, sampled.arrays()[name])


def test_chunks_make_the_same(questions, corpus, examples, monkeypatch):
    monkeypatch.setattr(made, "CHUNK", 7)
    assert tokenise(iter(questions), corpus).fingerprint() == examples.fingerprint()


def test_two_inputs_one_after_the_other(asked, questions, corpus, examples):
    both = made.joined([tokenise(asked, corpus, answers="every"), examples])
    assert len(both) == 3 + len(questions) and both.input_N.tolist() == [0] * 3 + [1] * len(questions)
    assert both.question_of(np.array([0, 1, 4, 5])).tolist() == [0, 0, 2, 3]
    for name in ("question", "tail", "text", "gold"):
        rows = [getattr(both, name)[3 + i].tolist() for i in range(len(questions))]
        assert rows == [row.tolist() for row in getattr(examples, name)]
    assert both.label[5].tolist() == examples.label[0].tolist()
    np.testing.assert_array_equal(both.answer_P2[5:], examples.answer_P2)


def test_long_questions_keep_beginning_and_end_token_and_long_answers_their_beginning(corpus):
    text = "where does the river of the old mill bend " * 9
    short, whole = (tokenise([question(0, [text], text=text)], corpus, question_length=n) for n in (12, 400))
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    for side, tokenizer in (("question", encoder), ("tail", generator)):
        cut, full = getattr(short, side)[0].tolist(), getattr(whole, side)[0].tolist()
        assert cut == [*full[:11], *tokenizer.suffix_ids] and 12 < len(full) < 400
    label = short.label[0].tolist()
    assert len(label) == TARGET and label[-1] == generator.eos_id and generator.pad_id not in label


def test_an_answer_is_written_as_it_stands_in_its_passage(corpus):
    """After a bracket, or within Chinese text, there is no space before it."""
    generator = corpus.generator_tokenizer
    texts = ["the mill (Bela) by the river", "the mill Bela by the river", "磨坊 在河边 Bela", "nobody"]
    rows = generator.encode_batch(texts)

    class Table:
        generator_tokenizer = generator
        generator_ids = np.array([row + [generator.pad_id] * (60 - len(row)) for row in rows])
        generator_length = np.array(list(map(len, rows)))

    gold = [[0], [1], [2], [3], [], [3]]
    written, spans = made.as_they_stand(["Bela", "Bela", "河边", "Bela", "Bela", ""], gold, Table())
    assert [generator.decode(ids) for ids in written[:5]] == ["Bela", " Bela", "河边", " Bela", " Bela"]
    for ids, row, (start, stop) in zip(written[:3], rows, spans, strict=False):
        assert ids == row[start:stop] and stop > start
    assert (spans[3:] == 0).all()


def test_the_end_of_a_long_dialogue_stays_where_that_is_asked_for(corpus):
    """Line breaks are kept, and the separator precedes the last turns."""
    text = "A: have you seen the old mill?\nB: " + "yes it is by the river " * 9 + "\nA: who built it?"
    short, whole = (
        tokenise([question(0, ["x"], text=text)], corpus, question_length=n, keeps="end") for n in (12, 400)
    )
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    assert short.question[0].tolist() == [encoder.prefix_ids[0], *whole.question[0][-11:]]
    separator = generator.encode_batch([" //"])[0]
    last = whole.tail[0][len(separator) - 12 :].tolist()
    assert short.tail[0].tolist() == [*separator, *last] and last[-1] == generator.eos_id
    assert generator.decode(last).endswith(" built it?")
    assert generator.decode(whole.tail[0]) == " // " + text
    fits = tokenise([question(0, ["x"], text="A: hi\nB: hello")], corpus, keeps="end")
    same = tokenise([question(0, ["x"], text="A: hi\nB: hello")], corpus)
    assert fits.fingerprint() == same.fingerprint() and len(whole.question[0]) < 400


def test_no_examples_have_the_fields_of_some(examples):
    none, some = made.none().arrays(), examples.arrays()
    assert none.keys() == some.keys()
    for name, value in none.items():
        assert value.shape[1:] == some[name].shape[1:] and value.dtype.kind == some[name].dtype.kind.replace(
            "u", value.dtype.kind
        ), name
    assert len(made.none()) == 0 and made.none().fingerprint() != examples.fingerprint()


def test_what_cannot_be_tokenised_is_named(corpus):
    unknown = [question(7, gold=[f"nowhere-{i}"]) for i in range(21)]
    with pytest.raises(InputError, match=r"21 of 21 gold ids are not in the corpus .*'nowhere-0'"):
        tokenise(unknown, corpus)
    with pytest.raises(InputError, match="no question has an answer"):
        tokenise([question(0, []), question(1, ["  "])], corpus)


def test_fingerprint_changes_with_any_array(asked, corpus):
    examples = tokenise(asked, corpus, answers="every")
    arrays = examples.arrays()
    assert examples.fingerprint() == made.Examples.of(arrays).fingerprint()
    of_the_corpus = set()
    for name, value in arrays.items():
        changed = np.append(value, value[-1:], axis=0) if len(value) else np.ones(1, value.dtype)
        other = made.Examples.of(arrays | {name: changed})
        assert other.fingerprint() != examples.fingerprint()
        if other.fingerprint(questions_only=True) == examples.fingerprint(questions_only=True):
            of_the_corpus.add(name.partition(".")[0])
    assert of_the_corpus == {"gold", "hard", "other", "answer_P2"}


@given(st.lists(st.integers(0, 3), max_size=30), st.data())
def test_find_is_that_of_lists(haystack, data):
    """Small alphabets, and ids whose bytes look like another id's when shifted by one: 256 and 1."""
    haystack = [(0, 1, 256, 65537)[i] for i in haystack]
    needle = data.draw(st.lists(st.sampled_from([0, 1, 256, 65537]), max_size=3))
    at = [i for i in range(len(haystack) - len(needle) + 1) if haystack[i : i + len(needle)] == needle]
    assert made.find(needle, np.array(haystack, np.uint32)) == (at[0] if at and needle else -1)


# --- windows and batches ----------------------------------------------------------------------------------------------


@given(st.data(), st.integers(3, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_windows_hold_the_answer(data, widest, seed):
    length = np.array(data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=5)))
    rng = np.random.default_rng(seed)
    start = rng.integers(0, length)
    stop = rng.integers(start, length) + 1
    window = batching.window_around(np.stack([start, stop], 1), length, widest, rng)
    for (left, right), a, b, n in zip(window, start, stop, length, strict=True):
        assert 0 <= left <= a < right and right - left <= widest
        assert b <= right or b - a > -(-widest // 3)  # only answers longer than the narrowest window are cut
        assert right <= n or left == 0  # past the end only if the passage is short


def test_batches_hold_what_the_step_reads(examples, corpus):
    names = {"question_ids", "question_length", "tail_ids", "tail_length", "labels", "gold", "source"}
    assert set(batches(examples, corpus)[0]) == names
    data = batches(examples, corpus, pairs=with_answer(examples), window=24)
    assert set(data[0]) == names | {"window"}
    for batch in (data[i] for i in range(20)):
        for row, (start, stop), label in zip(batch["gold"][:, 0], batch["window"], batch["labels"], strict=True):
            seen = corpus.generator_ids[row][start : min(stop, corpus.generator_length[row])]
            answer = label[1 : label.tolist().index(corpus.generator_tokenizer.eos_id)].tolist()
            assert made.find(answer[:8], seen) >= 0 and len(seen) <= 24  # the narrowest window is 8 wide


def test_rows_of_a_batch_are_padded_examples(examples, corpus):
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    batch = batches(examples, corpus)[3]
    for i, q in enumerate(batch["source"]):
        for name, table, pad in (
            ("question", examples.question, encoder.pad_id),
            ("tail", examples.tail, generator.pad_id),
        ):
            row, n = table[q].tolist(), batch[f"{name}_length"][i]
            assert n == len(row) and batch[f"{name}_ids"][i].tolist() == row + [pad] * (QUESTION - n)
        label = examples.label[q].tolist()
        assert batch["labels"][i].tolist() == label + [generator.pad_id] * (TARGET - len(label))
        assert batch["gold"][i].tolist() == examples.gold[q].tolist()


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def all_batches(examples, corpus, seed=0):
    kept = with_answer(examples)
    yield batches(examples, corpus, pairs=kept, seed=seed, window=16)
    two = made.joined([examples, examples])
    yield batches(two, corpus, seed=seed, weights=(1.0, 3.0), question_widths=(16, 20), target_widths=(8,))
    yield batching.denoise_batches(corpus, batch=8, seed=seed, length=64)


def test_a_batch_is_a_function_of_its_step(examples, corpus):
    again = list(all_batches(examples, corpus))
    other = list(all_batches(examples, corpus, seed=1))
    for k, data in enumerate(all_batches(examples, corpus)):
        for step in (70, 3, 0):
            assert_same(data[step], again[k][step])
            labels = (data[step]["labels"], other[k][step]["labels"])
            assert labels[0].shape != labels[1].shape or (labels[0] != labels[1]).any()


@pytest.mark.parametrize("start", [0, 1, 13])
def test_iterating_from_a_step_is_skipping(examples, corpus, start):
    for data in all_batches(examples, corpus):
        iterator = batching.iterate(data, start)
        for step in range(start, start + 12):
            assert_same(next(iterator), data[step])


def test_own_rows_are_those_of_the_whole_batch(asked, examples, corpus):
    """Each process makes its part of a single process's batch, with all options of batches."""
    own = np.array([1, 2, 6])
    gold = [corpus[i].id for i in range(9)]
    more = [
        dataclasses.replace(question(i, ["a", "b", "c"], gold[:1]), hard_negative_passage_ids=tuple(gold[1:i]))
        for i in [*range(1, 9)] * 30
    ]
    two = made.joined([tokenise(more, corpus, answers="sample", negatives=True), examples])
    settings = {"sample": True, "weights": (0.5, 0.5), "question_widths": (16,), "negatives": 2, "window": 16}
    whole, part = batches(two, corpus, **settings), batches(two, corpus, **settings, own=own)
    for step in range(10):
        one = whole[step]
        for name, value in part[step].items():
            np.testing.assert_array_equal(value, one[name] if name == "share" else one[name][own])


def test_every_example_once_an_epoch_in_another_order(examples, corpus):
    data = batches(examples, corpus, most=24)

    def epoch(e):
        return np.concatenate([data[step]["source"] for step in range(3 * e, 3 * e + 3)]).tolist()

    assert all(sorted(epoch(e)) == list(range(24)) for e in range(3))
    assert epoch(0) != epoch(1) != epoch(2) and epoch(0) != sorted(epoch(0))


def test_fewer_examples_than_a_batch(examples, corpus):
    with pytest.raises(InputError, match="3 training examples are fewer than one batch of 8"):
        batches(examples, corpus, most=3)


# --- several answers --------------------------------------------------------------------------------------------------


def test_one_answer_is_drawn_in_each_epoch(corpus):
    """Each question occurs once an epoch, with one of its answers, and each of its answers equally often."""
    n, epochs = 300, 20
    asked = [question(i, ["a", "b", "c"][: 1 + i % 3]) for i in range(n)]
    data = batches(tokenise(asked, corpus, answers="sample"), corpus, sample=True, batch=n)
    seen = np.zeros((n, 3), int)
    for epoch in range(epochs):
        batch = data[epoch]
        assert sorted(batch["source"].tolist()) == list(range(n))
        texts = [corpus.generator_tokenizer.decode(row).strip() for row in batch["labels"]]
        seen[batch["source"], ["abc".index(text) for text in texts]] += 1
    for count in (1, 2, 3):
        mine = seen[count - 1 :: 3]
        assert (mine[:, count:] == 0).all() and ((mine[:, :count] > 0).sum(1) == count).mean() > 0.99
        share = mine[:, :count].sum(0) / (n / 3 * epochs)
        np.testing.assert_allclose(share, 1 / count, atol=5 / np.sqrt(n / 3 * epochs))


def test_only_usable_answers_are_drawn(corpus):
    asked = [question(i, ["a", "b", "c"]) for i in range(100)]
    pairs = np.array([3 * i + j for i in range(100) for j in ((0, 2) if i % 2 else (1,))])
    data = batches(tokenise(asked, corpus, answers="sample"), corpus, sample=True, pairs=pairs, batch=100)
    drawn = {
        (int(q), corpus.generator_tokenizer.decode(row).strip())
        for step in range(20)
        for q, row in zip(data[step]["source"], data[step]["labels"], strict=True)
    }
    assert drawn == {(i, text) for i in range(100) for text in ("ac" if i % 2 else "b")}


# --- several inputs ---------------------------------------------------------------------------------------------------


def test_inputs_come_in_their_shares(examples, corpus):
    """Weights 3 and 1: six and two in every batch of 8; each input is used up, in a new order, before it repeats."""
    few = tokenise([question(i, text=f"Who is {i}?") for i in range(10)], corpus)
    data = batches(made.joined([examples, few]), corpus, weights=(3.0, 1.0))
    n, sources, shares = len(examples), [], []
    for step in range(25):
        batch = data[step]
        sources.append(batch["source"])
        shares.append(batch["share"])
        np.testing.assert_array_equal(batch["share"], [(batch["source"] < n).mean(), (batch["source"] >= n).mean()])
    np.testing.assert_allclose(shares, np.broadcast_to([0.75, 0.25], (25, 2)))
    second = np.concatenate(sources)
    second = second[second >= n].reshape(5, 10) - n
    assert all(sorted(epoch) == list(range(10)) for epoch in second.tolist())
    assert len({tuple(epoch) for epoch in second.tolist()}) == 5
    first = np.concatenate(sources)
    first = first[first < n]
    assert len(set(first.tolist())) == len(first) == 150  # within its first epoch


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6), st.integers(0, 10**9))
@settings(max_examples=100)
def test_shares_are_kept_everywhere(weights, start):
    """The elements of each set come in order, without gaps, and in proportion to its weight."""
    shares = mixing.Shares(weights)
    at: dict[int, int] = {}
    for k in range(start, start + 200):
        number, i = shares[k]
        assert abs(i - k * weights[number] / sum(weights)) < len(weights)
        assert i == at.get(number, i)
        at[number] = i + 1


@given(st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=9), st.sampled_from([1, -1, 0]))
@settings(max_examples=60)
@example([0.02, 0.02, 0.02, 0.94], 0)
def test_no_set_is_further_from_its_share_than_is_said(weights, order):
    """For n sets: less than one element too many, and less than n - 1 too few."""
    weights = sorted(weights)[::order] if order else weights
    shares, n = mixing.Shares(weights), len(weights)
    count_n, share_n = np.zeros(n, int), np.asarray(weights) / sum(weights)
    for k in range(400):
        number, i = shares[k]
        assert i == count_n[number]
        count_n[number] += 1
        ahead_n = count_n - (k + 1) * share_n
        assert ahead_n.max() < 1 + 1e-6 and ahead_n.min() > -(n - 1) - 1e-6


def test_four_sets_are_up_to_more_than_two_elements_short():
    """Four sets can lag by more than two elements; the order cannot change, since old runs resume with it."""
    shares, count_n = mixing.Shares([0.25, 0.25, 0.25, 0.25]), np.zeros(4)
    late = []
    for k in range(8):
        count_n[shares[k][0]] += 1
        late.append(((k + 1) / 4 - count_n).max())
    assert max(late) == 0.75
    weights = np.array([0.02, 0.02, 0.02, 0.94])
    shares, count_n = mixing.Shares(weights), np.zeros(4)
    for k in range(3):
        count_n[shares[k][0]] += 1
    assert (3 * weights - count_n).max() > 2.8


def test_mixtures_in_words():
    assert sources.weighted("a b.jsonl") == {"a b.jsonl": 1.0}
    assert sources.weighted("2*data/*.jsonl") == {"2*data/*.jsonl": 1.0}  # a single input may have a weight
    assert sources.weighted("0.7*a.jsonl + 3*tfds:squad/v1.1/train?x=y") == {
        "a.jsonl": 0.7,
        "tfds:squad/v1.1/train?x=y": 3,
    }
    for text, message in (
        ("0.5*a + b", "'b' has no weight; write 0.5*b"),
        ("0.5*a + data/*.jsonl", "the weight data/ of '.jsonl' must be a positive number"),
        ("0*a + 1*b", "the weight 0 of 'a' must be a positive number"),
        ("1*a + -1*b", "the weight -1 of 'b'"),
        ("1*a + inf*b", "the weight inf of 'b'"),
        ("1*a + nan*b", "the weight nan of 'b'"),
        ("1*a + 2*a", "'a' stands there twice"),
        ("1*a + ", "'' has no weight; write 0.5*INPUT"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            sources.weighted(text)


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_as_wide_as_its_bucket(examples, corpus):
    longest = np.maximum(examples.question.lengths(), examples.tail.lengths())
    targets, seen, shapes = examples.label.lengths(), [], set()
    narrow, wide = (int(x) for x in np.quantile(longest, [0.3, 0.7]))
    short = int(np.median(targets))
    data = batches(examples, corpus, question_widths=(narrow, wide), target_widths=(short,))
    steps = 100
    for step in range(steps):
        batch = data[step]
        q, t = batch["question_ids"].shape[1], batch["labels"].shape[1]
        assert batch["tail_ids"].shape == batch["question_ids"].shape == (8, q)
        mine = batch["source"]
        assert (longest[mine] <= q).all() and (targets[mine] <= t).all()
        if q == wide:  # none that a narrower one would take, as all buckets are large enough
            assert (longest[mine] > narrow).all()
        shapes.add((q, t))
        seen += mine.tolist()
    assert shapes == {(q, t) for q in (narrow, wide, QUESTION) for t in (short, TARGET)}
    counts = np.bincount(seen, minlength=len(examples))  # each equally often, except for the unfinished epoch
    assert counts.min() >= 8 * steps // len(examples) - 1 and counts.max() <= -(-8 * steps // len(examples)) + 1


@given(st.data())
@settings(max_examples=100)
def test_small_buckets_are_put_together(data):
    n = data.draw(st.integers(1, 60))
    lengths = np.array(data.draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=n, max_size=n)))
    least = data.draw(st.integers(1, n))
    found = buckets.grouped(lengths, (8, 16), (4,), (30, 9), least)
    assert sorted(np.concatenate([b.units for b in found]).tolist()) == list(range(n))
    for bucket in found:
        assert len(bucket.units) >= least
        assert (lengths[bucket.units] <= (bucket.question, bucket.target)).all()
        assert bucket.question in (8, 16, 30) and bucket.target in (4, 9)
    if least == 1:
        for bucket in found:
            widths = lengths[bucket.units]
            assert (np.array([8, 16, 30])[np.searchsorted([8, 16, 30], widths[:, 0])] == bucket.question).all()


def test_a_few_long_ones_do_not_widen_the_others():
    """The bucket of the few long questions is filled up to a batch with the longest of the others."""
    lengths = np.array([(5 + i % 3, 3) for i in range(100)] + [(30, 3)] * 3 + [(9, 9)])
    found = buckets.grouped(lengths, (8, 16), (4,), (30, 9), 8)
    assert [bucket[:2] for bucket in found] == [(8, 4), (30, 9)]
    assert len(found[0].units) == 96 and {100, 101, 102, 103} < set(found[1].units.tolist())
    assert (lengths[np.setdiff1d(found[1].units, [100, 101, 102, 103])] == (7, 3)).all()


# --- negatives of the files -------------------------------------------------------------------------------------------


def test_hard_negatives_are_drawn_before_others(corpus):
    ids = [corpus[i].id for i in range(20)]
    wrong = [((1, 2, 3, 4), (5,)), ((6,), (7, 8)), ((), ()), ((9, 10), ())]
    asked = [
        dataclasses.replace(
            question(i, gold=[ids[0]]),
            hard_negative_passage_ids=tuple(ids[j] for j in hard),
            negative_passage_ids=tuple(ids[j] for j in other),
        )
        for i, (hard, other) in enumerate(wrong * 25)
    ]
    data = batches(tokenise(asked, corpus, negatives=True), corpus, negatives=2, batch=100)
    drawn = [set() for _ in wrong]
    for step in range(5):
        for q, rows in zip(data[step]["source"] % 4, data[step]["negatives"].tolist(), strict=True):
            drawn[q].add(tuple(rows))
    assert drawn[0] == set(itertools.permutations((1, 2, 3, 4), 2))
    assert drawn[1] == {(6, 7), (6, 8)} and drawn[2] == {(-1, -1)} and drawn[3] == {(9, 10), (10, 9)}


# --- denoising --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.sampled_from([0.0, 0.15, 0.3, 0.6]), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_corrupt_keeps_order_and_masks_spans(n, share, seed):
    ids = np.arange(10, 10 + n)
    out = batching.corrupt(ids, 4, np.random.default_rng(seed), share)
    kept = out[out != 4]
    assert (np.diff(kept) > 0).all() and set(kept) <= set(ids.tolist())
    assert n - len(kept) <= round(share * n)
    assert (out == 4).any() == (round(share * n) > 0)
    # between two kept tokens there is a mask just where some are missing
    edges = np.concatenate([[9], np.where(out == 4, -1, out), [10 + n]])
    for left, right in itertools.pairwise(edges):
        assert -1 in (left, right) or right == left + 1


def test_corrupt_masks_about_the_share():
    rng = np.random.default_rng(0)
    lost = [100 - (batching.corrupt(np.arange(10, 110), 4, rng) != 4).sum() for _ in range(200)]
    assert 24 < np.mean(lost) <= 30  # overlapping spans are counted twice


def test_denoise_batches_are_passages_and_their_corruption(corpus):
    g = corpus.generator_tokenizer
    data = batching.denoise_batches(corpus, batch=8, seed=0, length=64)
    whole = {bytes(corpus.generator_ids[i]).hex(): i for i in range(len(corpus))}
    assert len(whole) == len(corpus)
    for step in range(5):
        batch = data[step]
        assert batch["labels"].shape == (8, 64) and batch["tail_ids"].shape == (8, 63)
        for tail, n, label in zip(batch["tail_ids"], batch["tail_length"], batch["labels"], strict=True):
            text = label[label != g.pad_id]
            assert text[0] == g.bos_id and text[-1] == g.eos_id and (tail[n:] == g.pad_id).all()
            body = text[1:-1]
            assert any(made.find(body.tolist(), corpus.generator_ids[i]) >= 0 for i in range(len(corpus)))
            source = tail[:n]
            assert source[-1] == g.eos_id and 8 < n < 63 and (source == g.mask_id).sum() >= 2
            left = iter(body.tolist())
            assert all(token in left for token in source[:-1].tolist() if token != g.mask_id)  # in order


def test_denoise_needs_a_mask_token(corpus):
    class NoMask:
        generator_tokenizer = type("T", (), {"mask_id": None})()

    with pytest.raises(InputError, match="no mask token"):
        batching.denoise_batches(NoMask(), batch=8, seed=0, length=64)


def test_encode_questions_is_the_batch_without_labels(questions, corpus, examples):
    tables = batching.encode_questions(
        [q.question for q in questions], corpus.encoder_tokenizer, corpus.generator_tokenizer, QUESTION
    )
    batch = batches(examples, corpus)[0]
    assert set(tables) == {"question_ids", "question_length", "tail_ids", "tail_length"}
    for name, table in tables.items():
        np.testing.assert_array_equal(table[batch["source"]], batch[name])
