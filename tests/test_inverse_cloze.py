"""Questions made from a corpus: the part taken, what is left of the passage, and their batches."""

import numpy as np
import pytest

from rag_jax.corpus import inverse_cloze
from rag_jax.corpus.build import encoder_rows
from rag_jax.corpus.directory import Corpus
from rag_jax.data.readers.formats import Passage


@pytest.fixture(scope="module")
def corpus(tiny_data):
    return Corpus.open(tiny_data / "corpus")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("No 3.5 of them, e.g.x", ["No 3.5 of them, e.g.x"]),
        ("黑豹队。丹佛赢了！ 是的", ["黑豹队。", "丹佛赢了！", "是的"]),
        ("ما هذا؟ كتاب.", ["ما هذا؟", "كتاب."]),
        ("  one part \n", ["one part"]),
    ],
)
def test_sentences(text, parts):
    assert inverse_cloze.sentences(text) == parts


def test_every_part_is_drawn_and_nine_in_ten_are_removed():
    passage = Passage("p", "Title", "One. Two. Three.", "d")
    left = {"Title": ("", "One. Two. Three."), "One.": ("Title", "Two. Three."), "Two.": ("Title", "One. Three."),
            "Three.": ("Title", "One. Two.")}  # fmt: skip
    counts = dict.fromkeys(left, 0)
    removed = 0
    for seed in range(2000):
        question, found = inverse_cloze.example(passage, np.random.default_rng(seed))
        counts[question] += 1
        if found != passage:
            removed += 1
            assert (found.title, found.text) == left[question] and (found.id, found.document) == ("p", "d")
    assert all(430 < count < 570 for count in counts.values())  # 500, standard deviation 19
    assert 1750 < removed < 1850  # 1800, 13
    alone = Passage("p", "", "One.", "p")
    assert inverse_cloze.example(alone, np.random.default_rng(0), removed=1.0) == ("One.", alone)
    assert all(
        inverse_cloze.example(passage, np.random.default_rng(seed), removed=0.0)[1] == passage for seed in range(20)
    )


def test_batches_hold_what_the_loss_embeds(corpus):
    """A part of a passage, and the passage of that row with or without it; each row once an epoch."""
    data = inverse_cloze.batches(corpus, 8, 0, 24)
    encoder, length = corpus.encoder_tokenizer, corpus.encoder_ids.shape[1]
    rows, without = [], 0
    for step in range(5):
        batch = data[step]
        assert batch["question_ids"].shape == (8, 24) and batch["passage_ids"].shape == (8, length)
        for i, (row,) in enumerate(batch["gold"]):
            rows.append(int(row))
            passage = corpus[row]
            parts = [passage.title, *inverse_cloze.sentences(passage.text)]
            ids = batch["question_ids"][i, : batch["question_length"][i]].tolist()
            asked = [n for n, part in enumerate(parts) if encoder.backend.encode(part).ids[:23] == ids[:23]]
            assert asked and ids[-1] == encoder.suffix_ids[0]
            mine = batch["passage_ids"][i, : batch["passage_length"][i]].tolist()
            whole = encoder_rows(encoder, [passage], length)[0][0]
            left = [
                Passage("", "" if n == 0 else parts[0], " ".join(p for m, p in enumerate(parts) if m not in (0, n)), "")
                for n in asked
            ]
            assert mine == whole or mine in encoder_rows(encoder, left, length)[0]
            without += mine != whole
            assert (batch["passage_ids"][i, len(mine) :] == encoder.pad_id).all()
    assert sorted(rows) == list(range(len(corpus)))
    assert 15 < without < 40  # where the passage was cut, what is left may begin alike


def test_a_batch_is_a_function_of_its_step_and_parts_of_it_are_made_alone(corpus):
    whole, again = inverse_cloze.batches(corpus, 8, 3, 24), inverse_cloze.batches(corpus, 8, 3, 24)
    part = inverse_cloze.batches(corpus, 8, 3, 24, np.array([2, 5]))
    for step in (7, 0):
        for name, value in whole[step].items():
            np.testing.assert_array_equal(value, again[step][name])
            np.testing.assert_array_equal(value[[2, 5]], part[step][name])
    assert (whole[0]["question_ids"] != inverse_cloze.batches(corpus, 8, 4, 24)[0]["question_ids"]).any()
