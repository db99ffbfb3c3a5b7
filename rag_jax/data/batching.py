"""From examples to batches of arrays: grain chooses, shuffles, mixes, buckets, windows and batches them.

A batch is a pure function of (seed, stage, step), so the step number is the whole data position and resuming is exact.
With several processes each makes only its own rows of a batch. All of them still draw the random numbers of the whole
batch, so that a batch is the same however many processes share it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from rag_jax.data import buckets, examples, mixing
from rag_jax.data.buckets import Bucket
from rag_jax.data.examples import Examples, PassageTable
from rag_jax.data.tokenizers import Tokenizer, pad_rows
from rag_jax.errors import InputError

Batch = Mapping[str, np.ndarray]
ON_HOST = ("source", "share")  # keys of a batch that stay on the host


def encode_questions(
    questions: Sequence[str],
    encoder: Tokenizer,
    generator: Tokenizer,
    length: int,
    keeps: str = "start",
    tail_length: int = 0,
) -> dict[str, np.ndarray]:
    """Both forms of each question under the keys of a batch: `question` for the encoder, `tail` for the generator.

    length: most tokens of either.
    keeps: the part of a longer question that is kept, "start" or "end".
    tail_length: another limit for the generator's form; 0: `length`.
    """
    rows, tails = examples.both_sides(questions, encoder, generator, length, keeps, tail_length)
    ids, lengths = pad_rows(rows, length, encoder.pad_id, np.int32)
    tail_ids, tail_lengths = pad_rows(tails, tail_length or length, generator.pad_id, np.int32)
    return {"question_ids": ids, "question_length": lengths, "tail_ids": tail_ids, "tail_length": tail_lengths}


@dataclass(frozen=True)
class EpochUnits:
    """The U units of an epoch of a stage, each a question with the answers from which one is drawn.

    pairs: (question, answer) pairs, as numbers into `Examples`, unit after unit.
    first_U, count_U: unit u has the pairs pairs[first_U[u] : first_U[u] + count_U[u]].
    question_U: the question of each unit.
    """

    pairs: np.ndarray
    first_U: np.ndarray
    count_U: np.ndarray
    question_U: np.ndarray

    def __len__(self) -> int:
        return len(self.first_U)

    def drawn(self, units: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One pair of each of these units, drawn uniformly."""
        first, count = self.first_U[units], self.count_U[units]
        return self.pairs[first + rng.integers(count) if (self.count_U > 1).any() else first]


def units_of(found: Examples, pairs: np.ndarray, sample: bool, most: int = 0) -> EpochUnits:
    """The units of these pairs.

    pairs: ascending numbers of pairs.
    sample: a unit is all pairs of a question; False: every pair is a unit of its own.
    most: keep this many units of every input, the first ones; 0: all.
    """
    question_P = found.question_of(pairs)
    first_U = np.flatnonzero(np.diff(question_P, prepend=-1)) if sample else np.arange(len(pairs))
    count_U = np.diff(first_U, append=len(pairs))
    if most:
        input_U = found.input_N[question_P[first_U]]
        kept_U = np.arange(len(first_U)) - np.searchsorted(input_U, input_U) < most
        return units_of(found, pairs[np.repeat(kept_U, count_U)], sample)
    return EpochUnits(pairs, first_U, count_U, question_P[first_U])


def window_around(answer_B2: np.ndarray, length_B: np.ndarray, widest: int, rng: np.random.Generator) -> np.ndarray:
    """Random windows, int32 [B, 2] (start, end), of widest / 3 to widest tokens around the answer or its first tokens.

    answer_B2: first position of the answer in the passage, and the one after its last. length_B: tokens of the passage.
    The widths vary so that the question after the window is not always at the same position.
    """
    width_B = rng.integers(-(-widest // 3), widest + 1, len(length_B))
    lowest = np.clip(answer_B2[:, 1] - width_B, 0, None)
    highest = np.minimum(answer_B2[:, 0], np.maximum(length_B - width_B, 0))
    start = rng.integers(np.minimum(lowest, highest), highest + 1)
    return np.stack([start, start + width_B], axis=1).astype(np.int32)


def negatives_of(
    found: Examples, questions_B: np.ndarray, count: int, rng: np.random.Generator, own: Any
) -> np.ndarray:
    """Wrong passages, int32 [b, count], for the `own` ones of these questions: distinct rows of the corpus.

    Drawn from the hard negatives of a question, and where these are too few from its other ones; -1 after the last.
    """
    hard_B, other_B = found.hard.lengths(questions_B), found.other.lengths(questions_B)
    order_BW = rng.random((len(questions_B), max(1, int((hard_B + other_B).max()))))
    rows_bn = np.full((len(questions_B[own]), count), -1, np.int32)
    for out_n, question, order_W in zip(rows_bn, questions_B[own], order_BW[own], strict=True):
        hard, other = found.hard[question], found.other[question]
        rows = np.concatenate([hard, other])
        drawn = np.argsort(order_W[: len(rows)] + (np.arange(len(rows)) >= len(hard)))[:count]  # hard ones first
        out_n[: len(drawn)] = rows[drawn]
    return rows_bn


@dataclass(frozen=True)
class BatchOptions:
    """Settings of the batches of a stage.

    batch: questions per batch, over all processes.
    lengths: most tokens of a question, and of a target.
    question_widths, target_widths: widths of further, narrower buckets, in tokens.
    window: most tokens of the part of the first gold passage, around the answer, that is read (the reading curriculum);
        0: no windows.
    negatives: wrong passages per question.
    weights: relative weight of each input, in their order.
    own: rows of each batch that this process makes, the same as in the whole batch; None: all.
    tail_length: most tokens of the generator's form of a question; 0: that of the question.
    """

    batch: int
    seed: int
    lengths: tuple[int, int]
    question_widths: tuple[int, ...] = ()
    target_widths: tuple[int, ...] = ()
    window: int = 0
    negatives: int = 0
    weights: tuple[float, ...] = (1.0,)
    own: np.ndarray | None = None
    tail_length: int = 0


def question_batches(
    found: Examples, units: EpochUnits, corpus: PassageTable, wanted: BatchOptions
) -> grain.MapDataset:
    """Endless shuffled batches of questions: `batches[step]` is the batch of a step.

    Its key `source` has the numbers of the questions; `share`, with several inputs, the share of the batch that is from
    each. A batch has one width, so it is drawn from one bucket. Every bucket shuffles each input on its own, and comes
    as often as the weights of its units say, so that all units of an input come equally often.
    """
    if len(units) < wanted.batch:
        raise InputError(
            f"{len(units)} training examples are fewer than one batch of {wanted.batch}; give more or a smaller batch"
        )
    input_U = found.input_N[units.question_U]
    count_I = np.bincount(input_U, minlength=len(wanted.weights))
    weight_U = (np.asarray(wanted.weights) / np.maximum(count_I, 1))[input_U]  # how often a unit is drawn
    parts = bucketed(found, units, wanted)
    sets = []
    for number, bucket in enumerate(parts):
        leaves, shares = [], []  # a leaf has the positions in bucket.units, a range, of the units of one input
        for i in np.unique(input_U[bucket.units]):
            first, last = (int(np.searchsorted(input_U[bucket.units], i, side)) for side in ("left", "right"))
            leaf_seed = seed_of(wanted.seed, number * len(wanted.weights) + int(i))
            leaves.append(grain.MapDataset.range(first, last).seed(leaf_seed).shuffle().repeat())
            shares.append(float(weight_U[bucket.units[first:last]].sum()))
        batches = mixing.mixed(leaves, shares).batch(wanted.batch, drop_remainder=True)
        sets.append(batches.random_map(assembler(found, units, corpus, wanted, bucket)))
    return mixing.mixed(sets, [float(weight_U[bucket.units].sum()) for bucket in parts])


def bucketed(found: Examples, units: EpochUnits, wanted: BatchOptions) -> list[Bucket]:
    """The buckets of a stage, by the longer form of a unit's question and by its longest answer."""
    questions = units.question_U
    longest_U = np.maximum(found.question.lengths(questions), found.tail.lengths(questions))
    targets_U = np.maximum.reduceat(found.label.lengths(units.pairs), units.first_U)
    lengths_U2 = np.stack([longest_U, targets_U], axis=1)
    return buckets.grouped(lengths_U2, wanted.question_widths, wanted.target_widths, wanted.lengths, wanted.batch)


def seed_of(seed: int, number: int) -> int:
    """The seed of one of several shuffled orders of a stage; number 0 has the seed of the stage itself."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) if number else seed


def assembler(
    found: Examples, units: EpochUnits, corpus: PassageTable, wanted: BatchOptions, bucket: Bucket
) -> Callable[[np.ndarray, np.random.Generator], Batch]:
    """A function (positions in bucket.units [B], random generator of the batch) -> the own rows of the batch."""
    gold_width = max(1, int(found.gold.lengths().max()))
    own: Any = slice(None) if wanted.own is None else wanted.own
    encoder_pad, generator_pad = corpus.encoder_tokenizer.pad_id, corpus.generator_tokenizer.pad_id
    label_pad = corpus.generator_tokenizer.labels.pad_id

    def assemble(places: np.ndarray, rng: np.random.Generator) -> Batch:
        rows = bucket.units[places]
        # Drawn for the whole batch, own rows or not: every process must take the same numbers from `rng`.
        pairs, questions = units.drawn(rows, rng), units.question_U[rows]
        mine = questions[own]
        batch = {
            "question_ids": found.question.padded(mine, bucket.question, encoder_pad),
            "question_length": found.question.lengths(mine),
            "tail_ids": found.tail.padded(
                mine, min(bucket.question, wanted.tail_length or bucket.question), generator_pad
            ),
            "tail_length": found.tail.lengths(mine),
            "labels": found.label.padded(pairs[own], bucket.target, label_pad),
            "gold": found.gold.padded(mine, gold_width, -1),
            "source": mine.astype(np.int32),
        }
        if wanted.window:
            first_gold = found.gold.padded(questions, 1, 0)[:, 0]
            lengths = np.asarray(corpus.generator_length[first_gold], np.int32)
            batch["window"] = window_around(found.answer_P2[pairs], lengths, wanted.window, rng)[own]
        if wanted.negatives:
            batch["negatives"] = negatives_of(found, questions, wanted.negatives, rng, own)
        if len(wanted.weights) > 1:
            count_I = np.bincount(found.input_N[questions], minlength=len(wanted.weights))
            batch["share"] = count_I / len(questions)
        return batch

    return assemble


def widths_of(batch: Batch) -> tuple[int, ...]:
    """Widths, in tokens, of the tails and labels of a batch: each combination has a compiled step of its own.

    Empty where the generator reads nothing.
    """
    return tuple(batch[name].shape[1] for name in ("tail_ids", "labels") if name in batch)


def corrupt(
    ids: np.ndarray, mask_id: int, rng: np.random.Generator, share: float = 0.3, mean_span: float = 3.0
) -> np.ndarray:
    """BART's text infilling (Lewis et al. 2019, section 2.2): each of some spans is replaced by one mask token.

    share: share of the tokens that the spans cover, about. mean_span: mean of their Poisson lengths, in tokens.
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


def passage_batches(
    corpus: PassageTable,
    batch: int,
    seed: int,
    own: np.ndarray | None,
    assemble: Callable[[list[tuple[int, np.random.Generator]]], Batch],
) -> grain.MapDataset:
    """Endless shuffled batches made from the corpus alone; deleted passages are left out.

    own: as in `BatchOptions`. assemble: from (row, its own random generator) pairs to a batch.
    """
    live = None if corpus.live_N is None else np.flatnonzero(corpus.live_N)
    mine: Any = slice(None) if own is None else own

    def drawn(numbers: np.ndarray, rng: np.random.Generator) -> Batch:
        rows = (numbers if live is None else live[numbers])[mine]
        seeds = rng.integers(2**63, size=len(numbers))[mine]  # drawn for all rows, so each has the same on any process
        return assemble([(int(row), np.random.default_rng(one)) for row, one in zip(rows, seeds, strict=True)])

    return (
        grain.MapDataset.range(len(corpus) if live is None else len(live))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch, drop_remainder=True)
        .random_map(drawn)
    )


def denoise_batches(
    corpus: PassageTable,
    *,
    batch: int,
    seed: int,
    length: int,
    share: float = 0.3,
    own: np.ndarray | None = None,
) -> grain.MapDataset:
    """Endless batches for denoising: corrupted passages as `tail`, and the passages themselves as `labels`.

    length: most tokens of a generator input; a `tail` is all of it but the prefix. share: see `corrupt`.
    own: as in `BatchOptions`. Deleted passages are left out.
    """
    tokenizer = corpus.generator_tokenizer
    mask_id = tokenizer.mask_id
    if mask_id is None:
        raise InputError("the generator's tokenizer has no mask token, which the denoise stage needs")
    room = length - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)

    def assemble(drawn: list[tuple[int, np.random.Generator]]) -> Batch:
        sources, labels = [], []
        for row, rng in drawn:
            total = int(corpus.generator_length[row])
            start = int(rng.integers(0, max(total - room, 0) + 1))
            ids = np.asarray(corpus.generator_ids[row][start : min(start + room, total)], np.int32)
            sources.append([*corrupt(ids, mask_id, rng, share), *tokenizer.suffix_ids])
            labels.append(tokenizer.label(ids.tolist(), length))
        tail_ids, tail_length = pad_rows(sources, length - len(tokenizer.prefix_ids), tokenizer.pad_id, np.int32)
        label_ids, _ = pad_rows(labels, length, tokenizer.labels.pad_id, np.int32)
        rows = np.array([row for row, _ in drawn], np.int32)
        return {"tail_ids": tail_ids, "tail_length": tail_length, "labels": label_ids, "source": rows}

    return passage_batches(corpus, batch, seed, own, assemble)


def iterate(batches: grain.MapDataset, start: int) -> "grain.DatasetIterator":
    """Iterates over the batches from step `start` on; a thread prepares them ahead."""
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
    iterator.set_state({"next_index": start})
    return iterator
