"""Questions to batches: what each array holds, read back through the tokenizers, and the order of the examples."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax.data import formats, pipeline
from rag_jax.data.formats import Question
from rag_jax.errors import InputError
from rag_jax.retrieval.corpus import Corpus

QUESTION, TARGET = 32, 20


@pytest.fixture(scope="module")
def corpus(tiny_data):
    return Corpus.open(tiny_data / "corpus")


@pytest.fixture(scope="module")
def questions(tiny_data):
    return formats.read_questions(tiny_data / "world/train.jsonl")


def tokenise(questions, corpus, **changes):
    return pipeline.tokenise(questions, corpus, **{"question_length": QUESTION, "target_length": TARGET} | changes)


@pytest.fixture(scope="module")
def examples(questions, corpus):
    return tokenise(questions, corpus)


def question(i, answers=("Anna",), gold=(), target=None, text="Who?"):
    return Question(str(i), text, tuple(answers), tuple(gold), target, {})


# --- tokenise ---------------------------------------------------------------------------------------------------------


def test_every_array_says_what_the_question_says(questions, corpus, examples):
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    assert len(examples) == len(questions) > 100
    assert examples.source_N.tolist() == list(range(len(questions)))
    for i, q in enumerate(questions):
        ids = examples.question_ids_NQ[i, : examples.question_length_N[i]].tolist()
        assert ids == encoder.backend.encode(q.question).ids
        tail = examples.tail_ids_NQ[i, : examples.tail_length_N[i]].tolist()
        assert tail == [*generator.encode_batch([" // " + q.question])[0], *generator.suffix_ids]
        answer = generator.encode_batch([" " + q.answers[0]])[0]
        label = [*generator.prefix_ids, *answer, *generator.suffix_ids]
        assert examples.labels_NT[i].tolist() == label + [generator.pad_id] * (TARGET - len(label))
        assert [corpus[row].id for row in examples.gold_NG[i]] == list(q.positive_passage_ids)
    assert (examples.question_ids_NQ[np.arange(QUESTION) >= examples.question_length_N[:, None]] == 0).all()


def test_further_right_passages_are_no_negatives(questions, corpus):
    """They stand behind the positive one, where the contrastive loss leaves them out and recall counts them."""
    other = corpus[len(corpus) - 1].id
    changed = [dataclasses.replace(questions[0], also_relevant_passage_ids=(other,)), questions[1]]
    gold = pipeline.tokenise(changed, corpus, question_length=QUESTION, target_length=TARGET).gold_NG
    assert gold[0].tolist() == [corpus.row(questions[0].positive_passage_ids[0]), len(corpus) - 1]
    assert gold[1].tolist() == [corpus.row(questions[1].positive_passage_ids[0]), -1]


def test_the_span_in_the_gold_passage_is_the_answer(questions, corpus, examples):
    """All answers of the world stand in their passages, whole where the passage was not cut."""
    found = 0
    for q, gold, (start, stop), label in zip(
        questions, examples.gold_NG, examples.answer_N2, examples.labels_NT, strict=True
    ):
        if stop:
            found += 1
            span = corpus.generator_ids[gold[0]][start:stop]
            assert corpus.generator_tokenizer.decode(span) == " " + q.answers[0]
            assert label[1 : 1 + stop - start].tolist() == span.tolist()
            assert stop <= corpus.generator_length[gold[0]]
    assert 0.6 * len(questions) < found < len(questions)  # tiny corpora cut their passages: some answers are lost


def test_an_answer_is_written_as_it_stands_in_its_passage(corpus):
    """Behind a bracket, or within Chinese, there is no space before it."""
    generator = corpus.generator_tokenizer
    texts = ["the mill (Bela) by the river", "the mill Bela by the river", "磨坊 在河边 Bela", "nobody"]
    rows = generator.encode_batch(texts)

    class Table:
        generator_tokenizer = generator
        generator_ids = np.array([row + [generator.pad_id] * (60 - len(row)) for row in rows])
        generator_length = np.array(list(map(len, rows)))

    gold = np.array([0, 1, 2, 3, -1, 3])
    written, spans = pipeline.as_they_stand(["Bela", "Bela", "河边", "Bela", "Bela", ""], gold, Table())
    assert [generator.decode(ids) for ids in written[:5]] == ["Bela", " Bela", "河边", " Bela", " Bela"]
    for ids, row, (start, stop) in zip(written[:3], rows, spans, strict=False):
        assert ids == row[start:stop] and stop > start
    assert (spans[3:] == 0).all()


def test_one_pair_per_question_or_per_answer(corpus):
    gold = [corpus[i].id for i in (3, 1)]
    asked = [
        question(0, ["Anna", "Anna Aska"], gold),
        question(1, []),
        question(2, ["nobody"], target=" Berta "),
        question(3, [" "]),
        question(4, ["x"], gold[:1]),
    ]
    one, each = tokenise(asked, corpus), tokenise(asked, corpus, every_answer=True)
    assert one.source_N.tolist() == [0, 2, 4] and each.source_N.tolist() == [0, 0, 2, 4]
    texts = [corpus.generator_tokenizer.decode(row) for row in each.labels_NT]
    assert texts == [" Anna", " Anna Aska", " Berta", " x"]
    assert each.gold_NG.tolist() == [[3, 1], [3, 1], [-1, -1], [3, -1]]
    assert one.answer_N2[1].tolist() == [0, 0]


def test_long_questions_keep_beginning_and_end_token_and_long_answers_their_beginning(corpus):
    text = "where does the river of the old mill bend " * 9
    short, whole = (tokenise([question(0, [text], text=text)], corpus, question_length=n) for n in (12, 400))
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    np.testing.assert_array_equal(short.question_ids_NQ[0, :11], whole.question_ids_NQ[0, :11])
    assert short.question_ids_NQ[0, 11] == encoder.suffix_ids[0] and short.question_length_N[0] == 12
    np.testing.assert_array_equal(short.tail_ids_NQ[0, :11], whole.tail_ids_NQ[0, :11])
    assert short.tail_ids_NQ[0, 11] == generator.suffix_ids[0] and short.tail_length_N[0] == 12
    assert short.labels_NT[0, -1] == generator.eos_id and (short.labels_NT != generator.pad_id).all()


def test_the_end_of_a_long_dialogue_stays_where_that_is_asked_for(corpus):
    """Lines stay lines, and the separator stands before the last turns."""
    text = "A: have you seen the old mill?\nB: " + "yes it is by the river " * 9 + "\nA: who built it?"
    short, whole = (
        tokenise([question(0, ["x"], text=text)], corpus, question_length=n, question_keeps="end") for n in (12, 400)
    )
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    n, m = whole.question_length_N[0], whole.tail_length_N[0]
    assert short.question_ids_NQ[0].tolist() == [encoder.prefix_ids[0], *whole.question_ids_NQ[0, n - 11 : n]]
    separator = generator.encode_batch([" //"])[0]
    last = whole.tail_ids_NQ[0, m - 12 + len(separator) : m].tolist()
    assert short.tail_ids_NQ[0].tolist() == [*separator, *last] and last[-1] == generator.eos_id
    assert generator.decode(last).endswith(" built it?")
    assert generator.decode(whole.tail_ids_NQ[0]) == " // " + text
    fits = tokenise([question(0, ["x"], text="A: hi\nB: hello")], corpus, question_keeps="end")
    same = tokenise([question(0, ["x"], text="A: hi\nB: hello")], corpus)
    assert fits.fingerprint() == same.fingerprint() and whole.question_length_N[0] < 400


def test_no_examples_have_the_shapes_of_some(examples):
    none = pipeline.no_examples(QUESTION, TARGET)
    for name, value in none.take(np.arange(0)).items():
        other = getattr(examples, name)
        assert value.shape == (0, *other.shape[1:]) and value.dtype == other.dtype, name
    assert len(none) == 0 and none.fingerprint() != examples.fingerprint()


def test_what_cannot_be_tokenised_is_named(corpus):
    with pytest.raises(InputError, match=r"question '7'.*passage 'nowhere' is not in this corpus"):
        tokenise([question(7, gold=["nowhere"])], corpus)
    with pytest.raises(InputError, match="no question has an answer"):
        tokenise([question(0, []), question(1, ["  "])], corpus)


def test_fingerprint_changes_with_any_array(examples):
    assert examples.fingerprint() == examples.where(np.ones(len(examples), bool)).fingerprint()
    for name, value in examples.take(np.arange(len(examples))).items():
        changed = value.copy()
        changed.flat[-1] += 1
        assert pipeline.Examples(**{**vars(examples), name: changed}).fingerprint() != examples.fingerprint()


@given(st.lists(st.integers(0, 3), max_size=30), st.data())
def test_find_is_that_of_lists(haystack, data):
    """Small alphabets, and ids whose bytes look like others' shifted: 256 is 1 one byte on."""
    haystack = [(0, 1, 256, 65537)[i] for i in haystack]
    needle = data.draw(st.lists(st.sampled_from([0, 1, 256, 65537]), max_size=3))
    at = [i for i in range(len(haystack) - len(needle) + 1) if haystack[i : i + len(needle)] == needle]
    assert pipeline.find(needle, np.array(haystack, np.uint32)) == (at[0] if at and needle else -1)


# --- windows and batches ----------------------------------------------------------------------------------------------


@given(st.data(), st.integers(3, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_windows_hold_the_answer(data, widest, seed):
    length = np.array(data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=5)))
    rng = np.random.default_rng(seed)
    start = rng.integers(0, length)
    stop = rng.integers(start, length) + 1
    window = pipeline.window_around(np.stack([start, stop], 1), length, widest, rng)
    for (left, right), a, b, n in zip(window, start, stop, length, strict=True):
        assert 0 <= left <= a < right and right - left <= widest
        assert b <= right or b - a > -(-widest // 3)  # only answers longer than the narrowest window are cut
        assert right <= n or left == 0  # not past the end, but where the passage is shorter than the window


def test_batches_hold_what_the_step_reads(examples, corpus):
    data = pipeline.question_batches(examples, corpus.generator_length, batch=8, seed=0)
    names = {"question_ids", "question_length", "tail_ids", "tail_length", "labels", "gold", "source"}
    assert set(data[0]) == names
    with_answer = examples.where(examples.answer_N2[:, 1] > 0)
    data = pipeline.question_batches(with_answer, corpus.generator_length, batch=8, seed=0, window=24)
    assert set(data[0]) == names | {"window"}
    for batch in (data[i] for i in range(20)):
        for row, (start, stop), label in zip(batch["gold"][:, 0], batch["window"], batch["labels"], strict=True):
            seen = corpus.generator_ids[row][start : min(stop, corpus.generator_length[row])]
            answer = label[1 : label.tolist().index(corpus.generator_tokenizer.eos_id)].tolist()
            assert pipeline.find(answer[:8], seen) >= 0 and len(seen) <= 24  # the narrowest window is 8 wide


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def all_batches(examples, corpus, seed=0):
    kept = examples.where(examples.answer_N2[:, 1] > 0)
    yield pipeline.question_batches(kept, corpus.generator_length, batch=8, seed=seed, window=16)
    yield pipeline.denoise_batches(corpus, batch=8, seed=seed, length=64)


def test_a_batch_is_a_function_of_its_step(examples, corpus):
    again = list(all_batches(examples, corpus))
    other = list(all_batches(examples, corpus, seed=1))
    for k, data in enumerate(all_batches(examples, corpus)):
        for step in (70, 3, 0):
            assert_same(data[step], again[k][step])
            assert (data[step]["labels"] != other[k][step]["labels"]).any()


@pytest.mark.parametrize("start", [0, 1, 13])
def test_iterating_from_a_step_is_skipping(examples, corpus, start):
    for data in all_batches(examples, corpus):
        iterator = pipeline.iterate(data, start)
        for step in range(start, start + 12):
            assert_same(next(iterator), data[step])


def test_every_example_once_an_epoch_in_another_order(examples, corpus):
    rows = examples.where(np.arange(len(examples)) < 24)
    data = pipeline.question_batches(rows, corpus.generator_length, batch=8, seed=0)

    def epoch(e):
        ids = [data[step]["tail_ids"] for step in range(3 * e, 3 * e + 3)]
        return [row.tobytes() for row in np.concatenate(ids)]

    wanted = sorted(row.tobytes() for row in rows.tail_ids_NQ)
    assert all(sorted(epoch(e)) == wanted for e in range(3))
    assert epoch(0) != epoch(1) != epoch(2)
    assert epoch(0) != [row.tobytes() for row in rows.tail_ids_NQ]


def test_fewer_examples_than_a_batch(examples, corpus):
    with pytest.raises(InputError, match="3 training examples are fewer than one batch of 8"):
        pipeline.question_batches(
            examples.where(np.arange(len(examples)) < 3), corpus.generator_length, batch=8, seed=0
        )


# --- denoising --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.sampled_from([0.0, 0.15, 0.3, 0.6]), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_corrupt_keeps_order_and_masks_spans(n, share, seed):
    ids = np.arange(10, 10 + n)
    out = pipeline.corrupt(ids, 4, np.random.default_rng(seed), share)
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
    lost = [100 - (pipeline.corrupt(np.arange(10, 110), 4, rng) != 4).sum() for _ in range(200)]
    assert 24 < np.mean(lost) <= 30  # spans that overlap count twice


def test_denoise_batches_are_passages_and_their_corruption(corpus):
    g = corpus.generator_tokenizer
    data = pipeline.denoise_batches(corpus, batch=8, seed=0, length=64)
    whole = {bytes(corpus.generator_ids[i]).hex(): i for i in range(len(corpus))}
    assert len(whole) == len(corpus)
    for step in range(5):
        batch = data[step]
        assert batch["labels"].shape == (8, 64) and batch["tail_ids"].shape == (8, 63)
        for tail, n, label in zip(batch["tail_ids"], batch["tail_length"], batch["labels"], strict=True):
            text = label[label != g.pad_id]
            assert text[0] == g.bos_id and text[-1] == g.eos_id and (tail[n:] == g.pad_id).all()
            body = text[1:-1]
            assert any(pipeline.find(body.tolist(), corpus.generator_ids[i]) >= 0 for i in range(len(corpus)))
            source = tail[:n]
            assert source[-1] == g.eos_id and 8 < n < 63 and (source == g.mask_id).sum() >= 2
            left = iter(body.tolist())
            assert all(token in left for token in source[:-1].tolist() if token != g.mask_id)  # in order


def test_denoise_needs_a_mask_token(corpus):
    class NoMask:
        generator_tokenizer = type("T", (), {"mask_id": None})()

    with pytest.raises(InputError, match="no mask token"):
        pipeline.denoise_batches(NoMask(), batch=8, seed=0, length=64)


def test_encode_questions_is_the_batch_without_labels(questions, corpus, examples):
    tables = pipeline.encode_questions(
        [q.question for q in questions], corpus.encoder_tokenizer, corpus.generator_tokenizer, QUESTION
    )
    assert set(tables) == {"question_ids", "question_length", "tail_ids", "tail_length"}
    np.testing.assert_array_equal(tables["question_ids"], examples.question_ids_NQ)
    np.testing.assert_array_equal(tables["tail_ids"], examples.tail_ids_NQ)
