"""Questions -> batches of arrays: tokenised once, then shuffled, windowed and batched by grain.

A batch is a pure function of (seed, stage, step), so the step number is the whole data position and resuming is exact.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np

from rag_jax.data.formats import Question
from rag_jax.data.joining import QUESTION_SEPARATOR, join_tail
from rag_jax.data.tokenizers import Tokenizer, pad_rows, wrap
from rag_jax.errors import InputError

Batch = Mapping[str, np.ndarray]


class PassageTable(Protocol):
    """What the pipeline needs of a corpus."""

    generator_ids: np.ndarray
    generator_length: np.ndarray

    @property
    def encoder_tokenizer(self) -> Tokenizer: ...
    @property
    def generator_tokenizer(self) -> Tokenizer: ...
    @property
    def live_N(self) -> np.ndarray | None: ...
    def __len__(self) -> int: ...
    def rows(self, passage_ids: Sequence[str], missing: int | None = None) -> np.ndarray: ...
    def pieces(self, passage_id: str) -> list[int]: ...
    def deleted(self, passage_id: str) -> bool: ...


@dataclass(frozen=True)
class Examples:
    """Tokenised (question, answer) pairs. N pairs, Q question length, T target length, G gold passages; -1 and pad
    fill up.

    `labels_NT` are `<s> answer </s>`; `answer_N2` is where the answer's tokens stand in the first gold passage, or
    (0, 0).
    """

    question_ids_NQ: np.ndarray
    question_length_N: np.ndarray
    tail_ids_NQ: np.ndarray
    tail_length_N: np.ndarray
    labels_NT: np.ndarray
    gold_NG: np.ndarray
    answer_N2: np.ndarray
    source_N: np.ndarray  # which question the pair was made from

    def __len__(self) -> int:
        return len(self.labels_NT)

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: getattr(self, name)[rows] for name in self.__dataclass_fields__}

    def where(self, keep: np.ndarray) -> "Examples":
        return Examples(**self.take(np.flatnonzero(keep)))

    def fingerprint(self, questions_only: bool = False) -> str:
        """Hash of every array: a checkpoint's data position means nothing for other data. questions_only: of those that
        are the same whatever the corpus holds.
        """
        digest = hashlib.sha256()
        for name, value in self.take(np.arange(len(self))).items():
            if questions_only and name in ("gold_NG", "answer_N2"):
                continue
            digest.update(str(value.shape).encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()


def kept(ids: list[int], room: int, keeps: str, head: int = 0) -> list[int]:
    """At most `room` of the ids: the first, or, where keeps is "end", the `head` first and the last."""
    if len(ids) <= room or keeps == "start":
        return ids[:room]
    return [*ids[:head], *ids[len(ids) - room + head :]]


def tail(
    tokenizer: Tokenizer, questions: Sequence[str], max_length: int, keeps: str = "start"
) -> tuple[np.ndarray, np.ndarray]:
    """The generator's side of a question: ids of " // question" and the suffix, [N, max_length] and lengths."""
    suffix = list(tokenizer.suffix_ids)
    room, head = max_length - len(suffix), len(tokenizer.encode_batch([QUESTION_SEPARATOR.rstrip()])[0])
    bare = (ids[: len(ids) - len(suffix)] for ids in join_tail(tokenizer, questions))
    rows = [[*kept(ids, room, keeps, head), *suffix] for ids in bare]
    return pad_rows(rows, max_length, tokenizer.pad_id, np.int32)


def encode_questions(
    questions: Sequence[str], encoder: Tokenizer, generator: Tokenizer, length: int, keeps: str = "start"
) -> dict[str, np.ndarray]:
    """Both sides of each question, as the keys of a batch. Questions longer than `length` keep their beginning, or
    their end.
    """
    room = length - len(encoder.prefix_ids) - len(encoder.suffix_ids)
    short = [kept(ids, max(room, 0), keeps) for ids in encoder.encode_batch(list(questions))]
    ids, lengths = pad_rows(wrap(encoder, short, length), length, encoder.pad_id, np.int32)
    tail_ids, tail_lengths = tail(generator, questions, length, keeps)
    return {"question_ids": ids, "question_length": lengths, "tail_ids": tail_ids, "tail_length": tail_lengths}


def find(needle: Sequence[int], haystack: np.ndarray) -> int:
    """First position of the ids `needle` in `haystack`, or -1."""
    wanted, row = np.asarray(needle, np.int32).tobytes(), np.asarray(haystack, np.int32).tobytes()
    at = row.find(wanted)
    while at % 4 and at >= 0:
        at = row.find(wanted, at + 1)
    return at // 4 if at >= 0 and needle else -1


def tokenise(
    questions: Sequence[Question],
    corpus: PassageTable,
    *,
    question_length: int,
    target_length: int,
    every_answer: bool = False,
    live: bool = False,
    question_keeps: str = "start",
) -> Examples:
    """Examples for training: one pair per question (its target or first answer), or one per answer as the paper does
    for NQ.

    Questions with no answer are left out. A gold passage that was deleted is none. InputError names one that the corpus
    never had; with `live` it may still come.
    """
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    pairs = []
    for source, question in enumerate(questions):
        wanted = [question.target] if question.target else list(question.answers)
        wanted = [answer.strip() for answer in wanted if answer.strip()]
        pairs += [(source, answer) for answer in (wanted if every_answer else wanted[:1])]
    if not pairs:
        raise InputError("no question has an answer or a target; training needs at least one")
    source_N = np.asarray([source for source, _ in pairs], np.int32)
    both = encode_questions([q.question for q in questions], encoder, generator, question_length, question_keeps)
    gold_NG = gold_rows(questions, corpus, live)[source_N]
    answers, answer_N2 = as_they_stand([answer for _, answer in pairs], gold_NG[:, 0], corpus)
    labels = [generator.label(ids, target_length) for ids in answers]
    labels_NT, _ = pad_rows(labels, target_length, generator.pad_id, np.int32)
    return Examples(
        question_ids_NQ=both["question_ids"][source_N],
        question_length_N=both["question_length"][source_N],
        tail_ids_NQ=both["tail_ids"][source_N],
        tail_length_N=both["tail_length"][source_N],
        labels_NT=labels_NT,
        gold_NG=gold_NG,
        answer_N2=answer_N2,
        source_N=source_N,
    )


def as_they_stand(
    answers: Sequence[str], gold_N: np.ndarray, corpus: PassageTable
) -> tuple[list[list[int]], np.ndarray]:
    """Ids of each answer, and where they stand in the passage at row gold_N (-1: none), (0, 0) where they do not.

    An answer in the middle of a text follows a space. One that stands there without it alone, as behind a bracket or
    in Chinese, is written without: labels made of the passage's tokens can be copied.
    """
    tokenizer = corpus.generator_tokenizer
    written, bare = (tokenizer.encode_batch([space + answer for answer in answers]) for space in (" ", ""))
    answer_N2 = np.zeros((len(answers), 2), np.int32)
    for i, row in enumerate(gold_N):
        passage = corpus.generator_ids[row][: corpus.generator_length[row]] if row >= 0 else np.zeros(0, np.int32)
        for ids in (written[i], bare[i]):
            at = find(ids, passage)
            if at >= 0:
                written[i], answer_N2[i] = ids, (at, at + len(ids))
                break
    return written, answer_N2


def no_examples(question_length: int, target_length: int) -> Examples:
    """Those of a run whose stages have no questions."""
    question, target, gold, answer = (np.zeros((0, n), np.int32) for n in (question_length, target_length, 1, 2))
    length = np.zeros(0, np.int32)
    return Examples(question, length, question, length, target, gold, answer, length)


def gold_rows(questions: Sequence[Question], corpus: PassageTable, live: bool = False) -> np.ndarray:
    """Rows [n, G] int32 of the right passages of each question, those that are there first; see `tokenise`."""
    width = max(1, *(len(q.right_passage_ids) for q in questions)) if questions else 1
    gold_nG = np.full((len(questions), width), -1, np.int32)
    for i, question in enumerate(questions):
        ids = question.right_passage_ids
        if not ids:
            continue
        rows = corpus.rows(ids, missing=-1)
        for passage_id in [passage_id for passage_id, row in zip(ids, rows, strict=True) if row < 0]:
            if corpus.deleted(passage_id) or (live and not corpus.pieces(passage_id)):
                continue
            try:
                corpus.rows([passage_id])  # says what is wrong with it
            except InputError as error:
                raise InputError(f"question {question.id!r}: {error}") from error
        found = rows[rows >= 0]
        gold_nG[i, : len(found)] = found
    return gold_nG


def window_around(answer_B2: np.ndarray, length_B: np.ndarray, widest: int, rng: np.random.Generator) -> np.ndarray:
    """Random windows [B, 2] of a third of `widest` to `widest` tokens, each around the answer (or its first tokens).

    The widths differ so that the question after the window does not always stand at the same position.
    """
    width_B = rng.integers(-(-widest // 3), widest + 1, len(length_B))
    lowest = np.clip(answer_B2[:, 1] - width_B, 0, None)
    highest = np.minimum(answer_B2[:, 0], np.maximum(length_B - width_B, 0))
    start = rng.integers(np.minimum(lowest, highest), highest + 1)
    return np.stack([start, start + width_B], axis=1).astype(np.int32)


def question_batches(
    examples: Examples,
    passage_lengths: np.ndarray,
    *,
    batch: int,
    seed: int,
    window: int = 0,
    own: np.ndarray | slice = slice(None),
) -> grain.MapDataset:
    """Endless shuffled batches of questions; `batches[step]` is one, `source` says of which questions. With `window` >
    0 each has `window_B2`, a part of its first gold passage that holds the answer: the reading curriculum. own: only
    these rows of each batch are made, as they would be among all.
    """
    if len(examples) < batch:
        raise InputError(
            f"{len(examples)} training examples are fewer than one batch of {batch}; give more or a smaller batch"
        )

    def assemble(rows: np.ndarray, rng: np.random.Generator) -> Batch:
        taken = examples.take(rows[own])
        if window:
            lengths = passage_lengths[np.maximum(examples.gold_NG[rows, 0], 0)].astype(np.int32)
            taken["window_B2"] = window_around(examples.answer_N2[rows], lengths, window, rng)[own]
        return {name[: name.rindex("_")]: value for name, value in taken.items() if name != "answer_N2"}

    return (
        grain.MapDataset.range(len(examples))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch, drop_remainder=True)
        .random_map(assemble)
    )


def corrupt(
    ids: np.ndarray, mask_id: int, rng: np.random.Generator, share: float = 0.3, mean_span: float = 3.0
) -> np.ndarray:
    """BART's text infilling (Lewis et al. 2019, section 2.2): spans of Poisson length, together about `share` of the
    tokens, each replaced by one mask token.
    """
    keep = np.ones(len(ids), bool)
    out = ids.copy()
    budget = round(share * len(ids))
    while budget > 0 and len(ids):
        span = max(1, min(int(rng.poisson(mean_span)), budget, len(ids)))
        at = int(rng.integers(0, len(ids) - span + 1))
        keep[at : at + span] = False
        keep[at], out[at] = True, mask_id
        budget -= span
    return out[keep]


def denoise_batches(
    corpus: PassageTable,
    *,
    batch: int,
    seed: int,
    length: int,
    share: float = 0.3,
    own: np.ndarray | slice = slice(None),
) -> grain.MapDataset:
    """Endless batches of corrupted passages (`tail`, a whole generator input less the prefix) and `labels`, the
    passage itself; deleted passages are left out. own: as in `question_batches`.
    """
    tokenizer = corpus.generator_tokenizer
    mask_id = tokenizer.mask_id
    if mask_id is None:
        raise InputError("the generator's tokenizer has no mask token, which the denoise stage needs")
    room = length - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)

    live = None if corpus.live_N is None else np.flatnonzero(corpus.live_N)

    def assemble(rows: np.ndarray, rng: np.random.Generator) -> Batch:
        sources, labels = [], []
        seeds = rng.integers(2**63, size=len(rows))[own]  # one for each row, whichever others are made here
        for row, seed in zip((rows if live is None else live[rows])[own], seeds, strict=True):
            rng, total = np.random.default_rng(seed), int(corpus.generator_length[row])
            start = int(rng.integers(0, max(total - room, 0) + 1))
            ids = np.asarray(corpus.generator_ids[row][start : min(start + room, total)], np.int32)
            sources.append([*corrupt(ids, mask_id, rng, share), *tokenizer.suffix_ids])
            labels.append(tokenizer.label(ids.tolist(), length))
        tail_ids, tail_length = pad_rows(sources, length - len(tokenizer.prefix_ids), tokenizer.pad_id, np.int32)
        label_ids, _ = pad_rows(labels, length, tokenizer.pad_id, np.int32)
        return {"tail_ids": tail_ids, "tail_length": tail_length, "labels": label_ids}

    return (
        grain.MapDataset.range(len(corpus) if live is None else len(live))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch, drop_remainder=True)
        .random_map(assemble)
    )


def iterate(batches: grain.MapDataset, start: int) -> "grain.DatasetIterator":
    """Batches from step `start` on, prepared ahead in a thread."""
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
    iterator.set_state({"next_index": start})
    return iterator
