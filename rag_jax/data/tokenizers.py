"""Tokenizers: any Hugging Face fast tokenizer, or one trained here. Texts become ids without special tokens; the ids
that a model wants around them are fields of `Tokenizer`.
"""

import hashlib
import json
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from rag_jax.data.literal_text import text_backend
from rag_jax.errors import InputError
from rag_jax.system import files

WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BPE_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
HUB_SECONDS = 10.0  # timeout of the check that the hub can be reached
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"  # written before transformers 5: special tokens that CONFIG_FILE may lack
# Classes for which tokenizer.json is the whole truth; others may rebuild it from vocabulary files.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# A file, and settings, with which transformers changes what tokenizer.json says: it loads the tokenizer then.
_CHANGING_FILE = "added_tokens.json"
_CHANGING = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "auto_map")


class Wrapping(NamedTuple):
    """The special tokens of a label (the generator's output).

    opening, closing: ids before and after the text.
    pad_id: id of the padding.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and its special tokens.

    backend: the tokenizer of the `tokenizers` library.
    pad_id, bos_id, eos_id: padding, start and end of a text. Without an id of their own: padding is the end, the start
        is the padding.
    mask_id: the mask token, or None.
    prefix_ids, middle_ids, suffix_ids: a text is wrapped as prefix + ids + suffix, a pair as prefix + a + middle + b +
        suffix.
    vocab_size: the largest id plus one.
    hash: SHA-256 of the backend as canonical JSON.
    specials: special tokens by role, such as "eos_token".
    wrapping: how labels are wrapped, where the generator's checkpoint says it; None: see `labels`.
    """

    backend: Backend
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int | None
    prefix_ids: tuple[int, ...]
    middle_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    vocab_size: int
    hash: str
    specials: dict[str, str]
    wrapping: Wrapping | None = None

    @property
    def start_id(self) -> int:
        """The id from which the decoder starts, before the first token of an answer."""
        return self.prefix_ids[0] if self.prefix_ids else self.bos_id

    @property
    def labels(self) -> Wrapping:
        """How labels are wrapped: as the checkpoint says, else as the tokenizer wraps a text."""
        return self.wrapping or Wrapping((self.start_id,), self.suffix_ids or (self.eos_id,), self.pad_id)

    def label(self, ids: Sequence[int], max_length: int) -> list[int]:
        """opening + ids + closing, which the generator learns to write; the ids are cut to fit `max_length`."""
        opening, closing, _ = self.labels
        return [*opening, *ids[: max_length - len(opening) - len(closing)], *closing]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without special tokens, on all cores.

        A special token written in a text is text: "<s>" gives the ids of these three characters. (transformers gives
        the control token unless told `split_special_tokens=True`.)
        """
        return [encoding.ids for encoding in self._text.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _text(self) -> Backend:
        return text_backend(self.backend)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each id adds to that of the ids before it; "" while the bytes of a character are incomplete."""
        texts = [""]
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[:end])
            texts.append(texts[-1] if text.endswith("\ufffd") else text)  # an incomplete character decodes to this
        return [text[len(before) :] for before, text in pairwise(texts)]

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as Hugging Face lays them out."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER_FILE).write_text(_canonical(self.backend), encoding="utf-8")
        config = {"tokenizer_class": _PLAIN_CLASSES[0], "clean_up_tokenization_spaces": False} | self.specials
        text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def wrap(tokenizer: Tokenizer, ids_list: Sequence[Sequence[int]], max_length: int) -> list[list[int]]:
    """prefix + ids + suffix, such as [CLS] question [SEP]; the ids are cut so that a row has at most `max_length`."""
    prefix, suffix = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
    room = max_length - len(prefix) - len(suffix)
    if room < 1:
        raise InputError(f"length {max_length} leaves no room beside {len(prefix) + len(suffix)} special tokens")
    return [[*prefix, *ids[:room], *suffix] for ids in ids_list]


# Beginnings of texts, for the check that a prefix has the same ids before any of them.
_BEGINNINGS = ("who wrote it?", "The", "1984", "(what", "'s", "éa", "谁写的", "- a", ":")


def before(tokenizer: Tokenizer, prefix: str) -> tuple[int, ...]:
    """Ids of a prefix such that these ids, then those of any text, are the ids of the joined text.

    InputError where there are no such ids, and where the tokenizer does not begin every text with exactly one token,
    after which they are placed.
    """
    if not prefix:
        return ()
    whole = tokenizer.encode_batch([prefix + text for text in _BEGINNINGS])
    alone = tokenizer.encode_batch(_BEGINNINGS)
    for text in (prefix, prefix.rstrip()):
        [ids] = tokenizer.encode_batch([text])
        if all(joined == ids + bare for joined, bare in zip(whole, alone, strict=True)):
            if len(tokenizer.prefix_ids) != 1:
                raise InputError(f"prefix {prefix!r} needs a tokenizer that begins every text with one token, as [CLS]")
            return tuple(ids)
    raise InputError(
        f"prefix {prefix!r} runs into the text after it as this tokenizer reads both; end it in a space or a sign"
    )


def pad_rows(
    ids_list: Sequence[Sequence[int]], length: int, pad_id: int, dtype: Any = np.int32
) -> tuple[np.ndarray, np.ndarray]:
    """The rows padded or cut on the right to L = length, ids_NL, and the number of ids in each, int32 length_N."""
    full_N = np.fromiter(map(len, ids_list), np.int64, len(ids_list))
    length_N = np.minimum(full_N, length)
    flat = np.fromiter(chain.from_iterable(ids_list), dtype, int(full_N.sum()))
    position_L = np.arange(length)
    ids_NL = np.full((len(ids_list), length), pad_id, dtype)
    filled_NL = position_L < length_N[:, None]
    starts_N = np.cumsum(full_N) - full_N
    ids_NL[filled_NL] = flat[(starts_N[:, None] + position_L)[filled_NL]]
    return ids_NL, length_N.astype(np.int32)


def load(name_or_dir: str | Path) -> Tokenizer:
    """Loads a tokenizer from a local directory, else from the hub or its cache. InputError where there is none.

    transformers is imported only where tokenizer.json alone may not be the whole tokenizer.
    """
    directory = Path(name_or_dir)
    if directory.is_dir():
        files.check_listed(directory)
    config = directory / CONFIG_FILE
    if config.is_file() and (directory / TOKENIZER_FILE).is_file():
        settings = files.read_json_object(config)
        changed = any(key in settings for key in _CHANGING) or (directory / _CHANGING_FILE).is_file()
        named = directory / SPECIALS_FILE
        settings = (files.read_json_object(named) if named.is_file() else {}) | settings
        if settings.get("tokenizer_class") in _PLAIN_CLASSES and not changed:
            return _load_plain(directory, settings)
    return _load_transformers(str(name_or_dir), directory.is_dir())


def _load_plain(directory: Path, settings: dict[str, Any]) -> Tokenizer:
    path = directory / TOKENIZER_FILE
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer file ({error})") from error
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    specials = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    return _make(backend, {key: value for key, value in specials.items() if isinstance(value, str)}, str(directory))


def _load_transformers(name: str, local: bool) -> Tokenizer:
    if not local and not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise InputError(f"{name}: no such tokenizer directory")
    from transformers import AutoTokenizer

    # Code that comes with a tokenizer is never run; False also keeps transformers from asking on stdin.
    read = partial(AutoTokenizer.from_pretrained, name, trust_remote_code=False)
    try:
        try:
            loaded = read(local_files_only=True)
        except OSError:
            if local:
                raise
            check_hub(name)
            loaded = read()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{name}: its tokenizer is code that comes with it, which is never run here; use one that is saved as "
                f"{TOKENIZER_FILE} of a class that transformers knows"
            ) from error
        raise InputError(f"{name}: no tokenizer there ({reason}); name a directory with {TOKENIZER_FILE}") from error
    if not loaded.is_fast:
        raise InputError(f"{name}: not a fast tokenizer; one with a {TOKENIZER_FILE} is needed")
    specials = {key: value for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}
    return _make(loaded.backend_tokenizer, specials, name)


def check_hub(name: str) -> None:
    """Raises InputError at once where the hub cannot be reached; its own client would try for minutes."""
    from huggingface_hub import constants

    advice = "no local directory or cached copy of this name; give a directory, or download it first"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{name}: {advice} (the hub is switched off by HF_HUB_OFFLINE)")
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers, that is enough
    except OSError as error:
        raise InputError(f"{name}: {advice} (the hub cannot be reached: {error})") from error


def _make(backend: Backend, specials: dict[str, str], name: str) -> Tokenizer:
    """The `Tokenizer` of a backend; how it wraps texts is read off an encoded sentence and an encoded pair."""
    backend.no_truncation()
    backend.no_padding()

    def ids(text: str, pair: str | None = None, special: bool = True) -> list[int]:
        return backend.encode(text, pair, add_special_tokens=special).ids

    sentence = "a"
    bare, wrapped = ids(sentence, special=False), ids(sentence)
    start = next((i for i in range(len(wrapped)) if wrapped[i : i + len(bare)] == bare), None)
    if not bare or start is None:
        raise InputError(f"{name}: cannot tell how this tokenizer wraps a sentence")
    prefix, suffix = wrapped[:start], wrapped[start + len(bare) :]
    pair = ids(sentence, sentence)
    middle = pair[len(prefix) + len(bare) : len(pair) - len(bare) - len(suffix)]

    def special_id(*keys: str) -> int | None:
        found = (backend.token_to_id(specials[key]) for key in keys if key in specials)
        return next((i for i in found if i is not None), None)

    eos = special_id("eos_token", "sep_token")
    if eos is None:
        raise InputError(f"{name}: the tokenizer has no eos_token; name one in its {CONFIG_FILE}")
    pad = special_id("pad_token")
    pad = eos if pad is None else pad  # GPT-2 has none
    bos = special_id("bos_token", "cls_token")
    return Tokenizer(
        backend=backend,
        pad_id=pad,
        bos_id=pad if bos is None else bos,  # T5 has none and starts decoding from pad
        eos_id=eos,
        mask_id=special_id("mask_token"),
        prefix_ids=tuple(prefix),
        middle_ids=tuple(middle),
        suffix_ids=tuple(suffix),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        hash=hashlib.sha256(_canonical(backend).encode("utf-8")).hexdigest(),
        specials=dict(sorted(specials.items())),
    )


def _canonical(backend: Backend) -> str:
    return json.dumps(json.loads(backend.to_str()), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a lower-casing WordPiece tokenizer as BERT's; ids start with [PAD] [UNK] [CLS] [SEP] [MASK].

    The same texts give the same bytes. All texts are held in memory: pass a sample.
    """
    texts = list(texts)
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()

    def train(size: int, named: Sequence[str], alphabet: Sequence[str]) -> dict[str, int]:
        backend = Backend(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizer, splitter
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=list(named),
            initial_alphabet=list(alphabet),
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return backend.get_vocab()

    # The trainer breaks ties by token id, and gives ids to "##x" pieces and drops rare characters in the order of a
    # hash table. So both sets are found by a first run that merges nothing, and are named, sorted, in the second.
    alphabet = _alphabet((normalizer.normalize_str(text) for text in texts), vocab_size // 3)
    pieces = train(1, WORDPIECE_SPECIALS, alphabet)
    continued = sorted(piece for piece in pieces if len(piece) == 3 and piece.startswith("##"))
    learnt = train(vocab_size, [*WORDPIECE_SPECIALS, *alphabet, *continued], alphabet)
    vocab = {token: i for i, token in enumerate(sorted(learnt, key=learnt.__getitem__))}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.add_special_tokens(list(WORDPIECE_SPECIALS))
    cls, sep = ("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[cls, sep]
    )
    backend.decoder = decoders.WordPiece(prefix="##")
    keys = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return _make(backend, dict(zip(keys, WORDPIECE_SPECIALS, strict=True)), "trained WordPiece")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer as BART's; ids start with <s> <pad> </s> <unk> <mask>; no prefix space.

    The same texts give the same bytes.
    """
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = [AddedToken(token, special=True, normalized=False) for token in BPE_SPECIALS[:-1]]
    specials.append(AddedToken(BPE_SPECIALS[-1], special=True, normalized=False, lstrip=True))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    bos, eos = ("<s>", backend.token_to_id("<s>")), ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1", special_tokens=[bos, eos]
    )
    backend.decoder = decoders.ByteLevel()
    keys = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return _make(backend, dict(zip(keys, BPE_SPECIALS, strict=True)), "trained BPE")


def _alphabet(texts: Iterable[str], limit: int) -> list[str]:
    """The most frequent characters, at most `limit`, sorted; without spaces and those rarer than one in a million."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    total = counts.total()
    frequent = [char for char, count in counts.items() if count * 1_000_000 >= total and not char.isspace()]
    return sorted(sorted(frequent, key=lambda char: (-counts[char], char))[:limit])
