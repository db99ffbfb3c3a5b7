"""A deterministic fictional world, so that answers must be read and cannot be guessed.

Entity i is a pure function of (seed, i): its name, facts, wordings, passage and questions. Nothing is kept between
entities, so any range can be generated on its own, by any process, in flat memory.
"""

import json
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rag_jax.data.synthetic.world_text import (
    DISTRACTORS,
    KINDS,
    ORGANISATION_NOUNS,
    RELATIONS,
    WORK_NOUNS,
    Relation,
)
from rag_jax.errors import InputError
from rag_jax.system import files, paths
from rag_jax.system.logs import Progress

VERSION = "1.0.0"  # of the generated text: the same version, seed and index give the same bytes
SPLITS = ("train", "dev", "test")
FILES: tuple[str, ...] = ("passages", *SPLITS)
MIN_WORDS, MAX_WORDS = 60, 120

# One-letter onsets and at most one-letter codas: a word splits into its syllables in exactly one way, so different
# syllables give different words. The last syllable (closed or open) shows the kind of a name, so that no name contains
# another: people "Velmon Torvil", bare words "Torva", places "Velmora", organisations "Velmoran Guild".
_ONSETS, _VOWELS, _CODAS = "bdfgjklmnrstvw", "aeiou", "nrls"
OPEN = tuple(c + v for c in _ONSETS for v in _VOWELS)
CLOSED = tuple(
    c + v + _CODAS[(i + j + k) % 4] for i, c in enumerate(_ONSETS) for j, v in enumerate(_VOWELS) for k in (0, 2)
)
SYLLABLES = OPEN + CLOSED
_LAST_OPEN = tuple(syllable for syllable in OPEN if syllable[-1] != "e")  # with it "Some", "Time" would be names
_PAIRS = len(SYLLABLES) ** 2
_NAMES = {  # how many names each kind has
    "person": (len(SYLLABLES) * len(CLOSED)) ** 2,
    "place": _PAIRS * len(_LAST_OPEN),
    "organisation": _PAIRS * len(CLOSED) * len(ORGANISATION_NOUNS),
    "work": _PAIRS * len(CLOSED) * len(WORK_NOUNS),
}
_CYCLE = ("person", "person", "place", "organisation", "work")  # the kind of entity i is _CYCLE[i % 5]
MAX_ENTITIES = 10_000_000
MIN_ENTITIES = 20
MIN_RELATIONS = 6  # an entity has up to six facts

_BLOCK = 1000  # distractors name entities of the same block, so that any block can be generated without the others
_SPLIT_BLOCK = 20  # entities of which 2 are test and 1 is dev
_CHUNK = 2000  # entities of one unit of work
_ANSWER_WORDS = {"person": 2, "place": 1, "organisation": 2, "work": 4, "year": 1, "number": 1, "word": 1}

_TAKEN = {kind: MAX_ENTITIES // 5 * _CYCLE.count(kind) for kind in KINDS}  # by the entities; the rest are strangers
# Ranges that answers are drawn from: (smallest number, how many). Answers are strangers, names that no entity has: so
# only the entity's own passage states its answer, and no other one can be misread for it ("Y was married to X" beside
# "Who was married to X?").
_ANSWERS = {
    **{kind: (_TAKEN[kind], _NAMES[kind] - _TAKEN[kind]) for kind in KINDS},
    "year": (1000, 1000),
    "number": (2000, 8000),
    "word": (0, len(SYLLABLES) * len(_LAST_OPEN)),
}

_MASK = (1 << 64) - 1
_encode = json.JSONEncoder(ensure_ascii=False).encode


def _mix(x: int) -> int:
    """The splitmix64 finaliser: 64 bits to 64 well-mixed bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=1024)
def _root(seed: int, purpose: str) -> int:
    key = _mix(seed)
    for byte in purpose.encode():
        key = _mix(key ^ byte)
    return key


class _Stream:
    """A splitmix64 stream for one purpose: small, fast and the same in every version of Python and NumPy."""

    __slots__ = ("state",)

    def __init__(self, seed: int, purpose: str, index: int):
        self.state = _mix(_root(seed, purpose) ^ index)

    def below(self, n: int) -> int:
        self.state = state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        x = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((x ^ (x >> 31)) * n) >> 64

    def pick(self, n: int, k: int) -> list[int]:
        """k different numbers below n in random order, from one draw (n**k well below 2**64)."""
        items, x = list(range(n)), self.below(1 << 64)
        for i in range(k):
            x, j = divmod(x, n - i)
            items[i], items[i + j] = items[i + j], items[i]
        return items[:k]

    def shuffle(self, items: list[Any]) -> None:
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]


def permute(x: int, size: int, key: int) -> int:
    """A keyed bijection of range(size): a four-round Feistel network, walked until it lands inside."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = x >> half, x & mask
        for r in range(4):
            left, right = right, left ^ (_mix(key + (r << 60) + right) & mask)
        x = (left << half) | right
        if x < size:
            return x


def _word(x: int, last: tuple[str, ...], syllables: int) -> tuple[str, int]:
    """The word with number x among those of this many syllables, and the rest of x for further words."""
    x, end = divmod(x, len(last))
    word = last[end]
    for _ in range(syllables - 1):
        x, i = divmod(x, len(SYLLABLES))
        word = SYLLABLES[i] + word
    return word.capitalize(), x


@lru_cache(maxsize=8 * _BLOCK)
def _name(seed: int, kind: str, n: int) -> str:
    x = permute(n, _NAMES[kind], _root(seed, kind))
    if kind == "person":
        first, x = _word(x, CLOSED, 2)
        return f"{first} {_word(x, CLOSED, 2)[0]}"
    if kind == "place":
        return _word(x, _LAST_OPEN, 3)[0]
    word, x = _word(x, CLOSED, 3)
    return f"{word} {ORGANISATION_NOUNS[x]}" if kind == "organisation" else f"The {WORK_NOUNS[x]} of {word}"


@lru_cache(maxsize=64)
def _splits(seed: int, block: int) -> tuple[str, ...]:
    order = _Stream(seed, "split", block).pick(_SPLIT_BLOCK, 3)
    held_out = {order[0]: "test", order[1]: "test", order[2]: "dev"}
    return tuple(held_out.get(i, "train") for i in range(_SPLIT_BLOCK))


def _locate(i: int) -> tuple[str, int]:
    """The kind of entity i and its number among its kind."""
    kind = _CYCLE[i % 5]
    return kind, 2 * (i // 5) + i % 5 if kind == "person" else i // 5


def _least_words(template: str, answer: str = "") -> int:
    """Number of words in the shortest rendering: a pronoun or a one-word name, and fillers of their fixed lengths."""
    for slot, words in _ANSWER_WORDS.items():
        template = template.replace("{a}" if slot == answer else "{" + slot + "}", " ".join("x" * words))
    return len(template.split())


def _slots(template: str) -> tuple[str, ...]:
    return tuple(t for t in ("person", "place", "organisation", "work", "year", "number") if "{" + t + "}" in template)


_DISTRACTORS = tuple((template, _slots(template), _least_words(template)) for template in DISTRACTORS)
_ABOUT = re.compile(r"\{[sop]\}").search  # whether a template mentions the entity
_STATEMENT_WORDS = {
    (kind, r.name): tuple(_least_words(s, r.answer) for s in r.statements)
    for kind, relations in RELATIONS.items()
    for r in relations
}


@dataclass(frozen=True)
class Fact:
    """One fact: the question asked about it, its answer, and in an edited world the answer it had before."""

    relation: str
    question: str
    answer: str
    previous: str | None


@dataclass(frozen=True)
class Entity:
    """One entity with its facts and the sentences of its passage, each with the relation it states (None: nothing)."""

    index: int
    id: str
    kind: str
    name: str
    facts: tuple[Fact, ...]
    sentences: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class World:
    """A fictional world, the same for the same fields.

    entities: number of entities, one passage each.
    seed: another seed gives other names and facts.
    edit: the same world with half of every entity's facts changed.
    relations: use only the first so many kinds of fact of each kind of entity, at least 6; 0: all.
    wordings: use only the first so many statements and questions of each kind of fact; 0: all. Fewer relations and
        wordings make passages easier to read.
    """

    entities: int
    seed: int
    edit: bool = False
    relations: int = 0
    wordings: int = 0

    def __post_init__(self) -> None:
        if not MIN_ENTITIES <= self.entities <= MAX_ENTITIES:
            raise InputError(f"entities: {self.entities} is not between {MIN_ENTITIES} and {MAX_ENTITIES}")
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed: {self.seed} is not between 0 and 2**64 - 1")
        if self.relations and self.relations < MIN_RELATIONS:
            raise InputError(f"relations: {self.relations}; at least {MIN_RELATIONS}, or 0 for all")
        if self.wordings < 0:
            raise InputError(f"wordings: {self.wordings}; at least 1, or 0 for all")

    def __len__(self) -> int:
        return self.entities

    def split(self, i: int) -> str:
        """The split of the questions about entity i: "train", "dev" (5%) or "test" (10%)."""
        return _splits(self.seed, i // _SPLIT_BLOCK)[i % _SPLIT_BLOCK]

    def _value(self, answer: str, number: int) -> str:
        if answer in KINDS:
            return _name(self.seed, answer, number)
        return _word(number, _LAST_OPEN, 2)[0] if answer == "word" else str(number)

    def entity(self, i: int) -> Entity:
        """Entity i. Raises IndexError outside the world."""
        return self._entity(i, with_passage=True)

    def _entity(self, i: int, with_passage: bool) -> Entity:
        if not 0 <= i < self.entities:
            raise IndexError(f"entity {i} of {self.entities}")
        kind, n = _locate(i)
        name = _name(self.seed, kind, n)
        rng = _Stream(self.seed, "entity", i)
        used = {(kind, n)}

        def draw(answer: str, stranger: bool) -> tuple[str, int]:
            """(type, number) of a value of this type that the passage does not have yet."""
            least, many = _ANSWERS[answer]
            if not stranger and answer in KINDS:
                many = _TAKEN[answer] * _BLOCK // MAX_ENTITIES
                least = i // _BLOCK * many
            while True:
                value = (answer, least + rng.below(many))
                if value not in used:
                    used.add(value)
                    return value

        known = RELATIONS[kind][: self.relations or None]
        relations: list[Relation] = [known[r] for r in rng.pick(len(known), 4 + rng.below(3))]
        changed = set(rng.pick(len(relations), (len(relations) + rng.below(2)) // 2))
        subject = f"the {name}" if kind == "organisation" else name
        pronouns = {
            "person": (("he", "him", "his"), ("she", "her", "her"))[rng.below(2)],
            "place": ("the town", "the town", "the town's"),
            "organisation": (noun := f"the {name.split()[-1].lower()}", noun, noun + "'s"),
            "work": ("the book", "the book", "the book's"),
        }[kind]
        forms = ((subject, subject, subject + "'s"), pronouns)

        facts: list[Fact] = []
        plan: list[tuple[str, dict[str, str], str | None, bool]] = []  # template, fillers, relation, names its own kind
        words = 0
        for j, relation in enumerate(relations):
            before, after = draw(relation.answer, True), draw(relation.answer, True)
            edited = self.edit and j in changed
            answer = self._value(*(after if edited else before))
            statement = rng.below(len(relation.statements[: self.wordings or None]))
            questions = relation.questions[: self.wordings or None]
            question = questions[rng.below(len(questions))].replace("{n}", subject)
            facts.append(Fact(relation.name, question, answer, self._value(*before) if edited else None))
            plan.append((relation.statements[statement], {"a": answer}, relation.name, relation.answer == kind))
            words += _STATEMENT_WORDS[kind, relation.name][statement]
        if not with_passage:
            return Entity(i, f"world-{kind}-{n}", kind, name, tuple(facts), ())
        for d in rng.pick(len(_DISTRACTORS), 8):
            if words >= MIN_WORDS and len(plan) >= len(facts) + 2:
                break
            template, slots, least = _DISTRACTORS[d]
            plan.append((template, {slot: self._value(*draw(slot, False)) for slot in slots}, None, kind in slots))
            words += least

        sentences: list[tuple[str, str | None]] = []
        # A pronoun only once the name was given, and not after another entity of the same kind, which it could mean.
        by_name = True
        for p in rng.pick(len(plan), len(plan)):
            template, fillers, stated, own_kind = plan[p]
            s, o, possessive = forms[0 if by_name or rng.below(5) < 3 else 1]
            text = template.format(s=s, o=o, p=possessive, **fillers)
            sentences.append((text[0].upper() + text[1:], stated))
            by_name = own_kind or (by_name and stated is None and not _ABOUT(template))
        return Entity(i, f"world-{kind}-{n}", kind, name, tuple(facts), tuple(sentences))

    def passage(self, i: int) -> dict[str, str]:
        """The passage about entity i: {"id", "title", "text"}."""
        e = self.entity(i)
        return {"id": e.id, "title": e.name, "text": " ".join(text for text, _ in e.sentences)}

    def questions(self, i: int) -> list[dict[str, Any]]:
        """One row per fact of entity i; in an edited world with "changed" and, if it is, "previous_answers"."""
        e = self._entity(i, with_passage=False)
        rows = []
        for fact in e.facts:
            row: dict[str, Any] = {
                "id": f"{e.id}-{fact.relation}",
                "question": fact.question,
                "answers": [fact.answer],
                "positive_passage_ids": [e.id],
                "relation": fact.relation,
                "entity": e.id,
            }
            if self.edit:
                row["changed"] = fact.previous is not None
                if fact.previous is not None:
                    row["previous_answers"] = [fact.previous]
            rows.append(row)
        return rows

    def shuffled_questions(self, split: str, start: int, stop: int) -> list[dict[str, Any]]:
        """The questions of a split about the entities at [start, stop) of a fixed random order, shuffled."""
        key = _root(self.seed, "order")
        order = (permute(j, self.entities, key) for j in range(start, stop))
        rows = [row for i in order if self.split(i) == split for row in self.questions(i)]
        _Stream(self.seed, split, start).shuffle(rows)
        return rows

    def chunk(self, name: str, start: int) -> list[dict[str, Any]]:
        """The rows of the file of this name ("passages" or a split) from the unit of work that begins at `start`."""
        stop = min(start + _CHUNK, self.entities)
        if name == "passages":
            return [self.passage(i) for i in range(start, stop)]
        return self.shuffled_questions(name, start, stop)

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """All rows of the file of this name, in its order; memory does not grow with the world."""
        for start in range(0, self.entities, _CHUNK):
            yield from self.chunk(name, start)


def _encoded(world: World, name: str, start: int) -> tuple[str, int, bytes]:
    rows = world.chunk(name, start)
    return name, len(rows), "".join(_encode(row) + "\n" for row in rows).encode()


def _chunks(world: World, workers: int) -> Iterator[tuple[str, int, bytes]]:
    """(file, rows, bytes) of all chunks in order; only a few are in flight, so memory does not grow with the world."""
    jobs = ((name, start) for name in FILES for start in range(0, world.entities, _CHUNK))
    if workers == 1:
        for name, start in jobs:
            yield _encoded(world, name, start)
        return
    pending: deque[Future[tuple[str, int, bytes]]] = deque()
    # Spawned: the caller may have threads (JAX does), whose locks a fork would copy in whatever state they are.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name, start in jobs:
            pending.append(pool.submit(_encoded, world, name, start))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write(
    out: str | Path,
    entities: int,
    seed: int,
    edit: bool = False,
    workers: int = 1,
    relations: int = 0,
    wordings: int = 0,
) -> dict[str, Any]:
    """Writes passages.jsonl, train.jsonl, dev.jsonl, test.jsonl and the manifest world.json, which it returns.

    The bytes do not depend on `workers`. `out` must not exist or be empty; it appears whole or not at all.
    """
    world = World(entities, seed, edit, relations, wordings)
    if workers < 1:
        raise InputError(f"workers: {workers} is less than 1")
    counts: dict[str, int] = dict.fromkeys(FILES, 0)
    hashes = {name: sha256() for name in FILES}
    chunks = -(-entities // _CHUNK)
    out = paths.real(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already exists and is not an empty directory; remove it or choose another")
    with files.new_directory(out, "world") as temporary:
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(len(FILES) * chunks, "world", unit="chunks"))
            streams = {name: stack.enter_context(open(temporary / f"{name}.jsonl", "wb")) for name in FILES}
            for name, rows, data in _chunks(world, min(workers, chunks)):
                streams[name].write(data)
                hashes[name].update(data)
                counts[name] += rows
                progress.update()
        manifest = {
            "version": VERSION,
            "seed": seed,
            "entities": entities,
            "edit": edit,
            "relations": relations,
            "wordings": wordings,
            "counts": counts,
            "sha256": {f"{name}.jsonl": h.hexdigest() for name, h in hashes.items()},
        }
        (temporary / "world.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest
