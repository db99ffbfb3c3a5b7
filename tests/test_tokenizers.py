"""Tokenizers: reproducible training, loading from Hugging Face directories, special tokens, padding."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from rag_jax.data import tokenizers
from rag_jax.data.joining import check_join, join_tail, joined_text, passage_text
from rag_jax.data.literal_text import text_backend
from rag_jax.data.readers.formats import read_passages, read_questions
from rag_jax.errors import InputError

TEXTS = [
    "The cat sat on the mat; a Cat sat, on the café's mat. Größe, naïve.",
    "谁写的这本书？ كتاب جديد من القاهرة. Новая книга вышла вчера.",
    *(
        f"Entity number {i} was born in {1900 + i} near the river of {chr(97 + i % 26)}{chr(97 + i // 26)}o."
        for i in range(300)
    ),
]


@pytest.fixture(scope="module")
def wordpiece() -> tokenizers.Tokenizer:
    return tokenizers.train_wordpiece(TEXTS, 700)


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
    return tokenizers.train_bpe(TEXTS, 700)


def test_wordpiece_layout(wordpiece: tokenizers.Tokenizer) -> None:
    t = wordpiece
    assert [t.backend.token_to_id(token) for token in tokenizers.WORDPIECE_SPECIALS] == [0, 1, 2, 3, 4]
    assert (t.pad_id, t.bos_id, t.eos_id, t.mask_id) == (0, 2, 3, 4)
    assert (t.prefix_ids, t.middle_ids, t.suffix_ids) == ((2,), (3,), (3,))
    assert t.vocab_size == t.backend.get_vocab_size() <= 700
    assert sorted(t.backend.get_vocab().values()) == list(range(t.vocab_size))
    upper, lower = t.encode_batch(["THE CAT", "the cat"])
    assert upper == lower and 1 not in upper
    assert t.decode([2, *upper, 3, 0]) == "the cat"
    # Letters must not have become special tokens: these would split words and vanish from decoded text.
    assert {token.content for token in t.backend.get_added_tokens_decoder().values()} == set(
        tokenizers.WORDPIECE_SPECIALS
    )


def test_bpe_layout(bpe: tokenizers.Tokenizer) -> None:
    t = bpe
    assert [t.backend.token_to_id(token) for token in tokenizers.BPE_SPECIALS] == [0, 1, 2, 3, 4]
    assert (t.pad_id, t.bos_id, t.eos_id, t.mask_id) == (1, 0, 2, 4)
    assert (t.prefix_ids, t.suffix_ids, t.vocab_size) == ((0,), (2,), 700)
    for text in [*TEXTS[:3], " leading", "emoji 🙂\n\ttabs", ""]:
        [ids] = t.encode_batch([text])
        assert t.decode([0, *ids, 2, 1]) == text


@pytest.mark.parametrize("hash_seed_and_threads", [("1", "1"), ("2", "4")])
def test_training_gives_the_same_bytes_in_every_process(
    wordpiece: tokenizers.Tokenizer, bpe: tokenizers.Tokenizer, hash_seed_and_threads: tuple[str, str]
) -> None:
    seed, threads = hash_seed_and_threads
    code = (
        "import json, sys; from rag_jax.data import tokenizers as t; texts = json.load(sys.stdin);"
        "print(t.train_wordpiece(texts, 700).hash, t.train_bpe(texts, 700).hash)"
    )
    environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [wordpiece.hash, bpe.hash]


def test_rare_characters_do_not_fill_the_vocabulary(shared_data) -> None:
    passages = [p.text for p in read_passages([shared_data("xquad_zh") / "passages.jsonl"])]
    first, second = (tokenizers.train_wordpiece(passages, 1024) for _ in range(2))
    assert first.hash == second.hash  # more characters than fit: those that stay must not depend on a hash table
    assert first.vocab_size == 1024
    alphabet = [token for token in first.backend.get_vocab() if len(token) == 1]
    assert len(alphabet) == 1024 // 3
    encoded = first.encode_batch(passages)
    assert sum(ids.count(1) for ids in encoded) < 0.3 * sum(map(len, encoded))


@pytest.mark.slow
@pytest.mark.parametrize("language", ["zh", "ar", "ru"])
def test_other_scripts_are_covered(shared_data, language: str) -> None:
    """All text of passages; of questions all but characters that no passage has; every answer is decoded exactly."""
    folder = shared_data(f"xquad_{language}")
    passages = [passage.text for passage in read_passages([folder / "passages.jsonl"])]
    questions = read_questions(folder / "dev.jsonl")
    wordpiece, bpe = (train(passages, 8192) for train in (tokenizers.train_wordpiece, tokenizers.train_bpe))
    unknown = wordpiece.backend.token_to_id("[UNK]")
    assert not any(unknown in ids for ids in wordpiece.encode_batch(passages))
    letters, lost = set("".join(passages).lower()), 0
    for question in questions:
        made = wordpiece.backend.encode(question.question, add_special_tokens=False)
        for token, (start, stop) in zip(made.ids, made.offsets, strict=True):
            lost += token == unknown
            assert token != unknown or not letters.issuperset(question.question[start:stop].lower())
    assert lost <= 1.5 * len(questions)  # the question mark, mostly
    texts = [f" {answer}" for question in questions for answer in question.answers]
    assert [bpe.decode(ids) for ids in bpe.encode_batch(texts)] == texts


def test_save_and_load(tmp_path: Path, wordpiece: tokenizers.Tokenizer, bpe: tokenizers.Tokenizer) -> None:
    for name, tokenizer in [("w", wordpiece), ("b", bpe)]:
        tokenizer.save(tmp_path / name)
        loaded = tokenizers.load(tmp_path / name)
        assert replace(loaded, backend=None) == replace(tokenizer, backend=None)
        assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        loaded.save(tmp_path / "again")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / name / file).read_bytes()


def test_transformers_reads_what_is_saved(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    from transformers import AutoTokenizer

    bpe.save(tmp_path)
    other = AutoTokenizer.from_pretrained(str(tmp_path))
    assert other(TEXTS[:2])["input_ids"] == [[0, *ids, 2] for ids in bpe.encode_batch(TEXTS[:2])]
    assert (other.pad_token_id, other.mask_token_id, other.bos_token_id) == (1, 4, 0)


def test_a_hugging_face_bart_directory(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    bpe.backend.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BartTokenizer", "model_max_length": 16}')
    loaded = tokenizers.load(tmp_path)
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.mask_id) == (1, 0, 2, 4)
    assert (loaded.prefix_ids, loaded.middle_ids, loaded.suffix_ids) == ((0,), (2, 2), (2,))
    assert loaded.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)  # whole: neither truncated nor padded


def test_a_hugging_face_bert_directory(tmp_path: Path, wordpiece: tokenizers.Tokenizer) -> None:
    vocab = sorted(wordpiece.backend.get_vocab(), key=wordpiece.backend.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    loaded = tokenizers.load(tmp_path)
    assert (loaded.prefix_ids, loaded.middle_ids, loaded.suffix_ids, loaded.pad_id) == ((2,), (3,), (3,), 0)
    assert loaded.encode_batch(TEXTS) == wordpiece.encode_batch(TEXTS)


def test_a_tokenizer_that_is_not_there_fails_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    started = time.monotonic()
    for name in ("no/such-tokenizer", "/no/such/directory", "..", str(tmp_path)):
        with pytest.raises(InputError, match="tokenizer"):
            tokenizers.load(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="cannot be reached"):
        tokenizers.check_hub("no/such-tokenizer")
    assert time.monotonic() - started < 20


def test_broken_tokenizer_files(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    bpe.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[:1000])
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer file"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}'
    )
    with pytest.raises(InputError, match="no eos_token"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        tokenizers.load(tmp_path)


def test_a_tokenizer_with_no_specials_around_a_sentence() -> None:
    backend = Backend(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = tokenizers._make(backend, {"pad_token": "<pad>", "eos_token": "<eos>"}, "test")
    assert (made.prefix_ids, made.middle_ids, made.suffix_ids, made.bos_id, made.mask_id) == ((), (), (), 0, None)


def test_a_tokenizer_without_padding_pads_with_its_end() -> None:
    """For GPT-2, whose tokenizer adds no special tokens; its labels still begin and end with them."""
    backend = Backend(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = tokenizers._make(backend, {"bos_token": "<eos>", "eos_token": "<eos>"}, "test")
    assert (made.pad_id, made.start_id, made.label([1, 1, 1, 1], 4)) == (0, 0, [0, 1, 1, 0])


def test_a_label_is_cut_before_its_end(bpe: tokenizers.Tokenizer, wordpiece: tokenizers.Tokenizer) -> None:
    assert bpe.label([7, 8, 9], 9) == [0, 7, 8, 9, 2]
    assert bpe.label([7, 8, 9], 4) == [0, 7, 8, 2]
    assert wordpiece.label([7, 8, 9], 4) == [2, 7, 8, 3]


def test_pieces_are_what_every_token_adds(bpe: tokenizers.Tokenizer, wordpiece: tokenizers.Tokenizer) -> None:
    text = "The cat 🦉 sat, 新しい本 لكن naïve."
    for t, shown in ((bpe, text), (wordpiece, wordpiece.decode(wordpiece.encode_batch([text])[0]))):
        ids = t.encode_batch([text])[0]
        pieces = t.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == shown
    pieces, owl = bpe.pieces(bpe.encode_batch([text])[0]), bpe.encode_batch(["🦉"])[0]
    at = pieces.index("🦉")  # of several bytes, each a token: it is there with the last one
    assert len(owl) == 4 and pieces[at - 3 : at] == ["", "", ""]
    assert bpe.pieces(owl[:2]) == ["", ""] and bpe.pieces([]) == []
    assert bpe.special_ids == set(range(5)) and wordpiece.special_ids == set(range(5))


def test_wrap(wordpiece: tokenizers.Tokenizer) -> None:
    assert tokenizers.wrap(wordpiece, [[7, 8, 9], [], [7]], 4) == [[2, 7, 8, 3], [2, 3], [2, 7, 3]]
    with pytest.raises(InputError, match="no room"):
        tokenizers.wrap(wordpiece, [[7]], 2)


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 60_000), max_size=12), max_size=9), st.integers(1, 10), st.integers(0, 9))
def test_pad_rows_equals_a_loop(rows: list[list[int]], length: int, pad: int) -> None:
    ids_NL, length_N = tokenizers.pad_rows(rows, length, pad, np.uint16)
    assert ids_NL.shape == (len(rows), length) and ids_NL.dtype == np.uint16
    assert length_N.tolist() == [min(len(row), length) for row in rows]
    assert ids_NL.tolist() == [(row + [pad] * length)[:length] for row in rows]


# --- special tokens written in a text ---------------------------------------------------------------------------------


def unigram() -> Backend:
    """A tokenizer like T5's: the vocabulary itself holds the special tokens, with the best score."""
    letters = [(piece, -5.0) for piece in sorted({*"".join(TEXTS), *"<>[]|/_▁"} - {" ", "▁"})]
    specials = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    vocab = [(token, 0.0) for token in specials] + [("▁", -3.0), ("▁born", -6.0), *letters]
    made = Backend(models.Unigram(vocab, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens(specials)
    return made


def words() -> Backend:
    """A vocabulary of whole words that includes special tokens, and an added token that is not special."""
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    vocab = {word: i for i, word in enumerate([*specials, "the", "cat", "a"])}
    made = Backend(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(specials)
    made.add_tokens(["<tool>"])
    made.add_special_tokens(["<|im_end|>"])
    return made


def chat() -> Backend:
    """Byte-level BPE with special tokens outside its vocabulary, and added ones that are not special (Qwen2)."""
    made = Backend.from_str(tokenizers.train_bpe(TEXTS, 600).backend.to_str())
    made.add_special_tokens(["<|im_start|>"])
    made.add_tokens(["<tool_call>"])
    made.add_special_tokens(["<|im_end|>"])
    return made


BACKENDS = {
    "wordpiece": lambda: tokenizers.train_wordpiece(TEXTS, 700).backend,
    "bpe": lambda: tokenizers.train_bpe(TEXTS, 700).backend,
    "chat": chat,
    "unigram": unigram,
    "words": words,
}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> Backend:
    return BACKENDS[request.param]()


def control(backend: Backend) -> dict[int, str]:
    return {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}


@settings(max_examples=60)
@given(data=st.data())
def test_special_tokens_in_a_text_are_text(backend: Backend, data: st.DataObject) -> None:
    """No special token's id but that of an unknown word; other text and other added tokens as the backend reads."""
    specials, plain = control(backend), text_backend(backend)
    unknown = {i for i, token in specials.items() if token.strip("<[]>").lower() == "unk"}
    parts = st.one_of(st.sampled_from(sorted(specials.values())), st.text("abc <>[]/|é", max_size=6), st.just(" "))
    text = "".join(data.draw(st.lists(parts, max_size=6)))
    ids = plain.encode(text, add_special_tokens=False).ids
    assert not (set(ids) & set(specials)) - unknown
    usual = backend.encode(text, add_special_tokens=False).ids
    if not set(usual) & set(specials):
        assert ids == usual


def test_other_added_tokens_keep_their_ids(backend: Backend) -> None:
    plain = text_backend(backend)
    for i, token in backend.get_added_tokens_decoder().items():
        if not token.special:
            assert plain.encode(f"a {token.content}", add_special_tokens=False).ids[-1] == i
    for text in TEXTS[:4]:
        assert plain.encode(text, add_special_tokens=False).ids == backend.encode(text, add_special_tokens=False).ids


def test_special_tokens_in_a_text_decode_to_themselves(bpe: tokenizers.Tokenizer) -> None:
    text = "a </s> b <mask><s> c"
    [ids] = bpe.encode_batch([text])
    assert bpe.decode(ids) == text and not set(ids) & bpe.special_ids
    assert "</s>" not in bpe.decode([*ids, bpe.eos_id])[len(text) :]


def test_joining_is_exact_with_special_tokens_in_passages_and_questions(bpe: tokenizers.Tokenizer) -> None:
    passages = [("<s> title", "text </s> of <mask>"), ("", "<pad>"), ("t", "x</s>")]
    check_join(bpe, passages)
    for title, text in passages:
        for question in ("<mask> who?", "</s>", "a <s>"):
            [whole] = bpe.encode_batch([joined_text(title, text, question)])
            [left], [tail] = bpe.encode_batch([passage_text(title, text)]), join_tail(bpe, [question])
            assert left + tail == whole + list(bpe.suffix_ids)


# --- code beside a tokenizer, and settings that change it -------------------------------------------------------------


def with_settings(directory: Path, tokenizer: tokenizers.Tokenizer, **changes: object) -> Path:
    tokenizer.save(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_code_beside_a_tokenizer_is_not_run_and_nobody_is_asked(
    tmp_path: Path, bpe: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    code = {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(InputError, match="its tokenizer is code that comes with it, which is never run here"):
        tokenizers.load(with_settings(tmp_path, bpe, tokenizer_class="Own", **code))
    loaded = tokenizers.load(with_settings(tmp_path, bpe, **code))  # a class that is known: the code is not needed
    assert loaded.encode_batch(TEXTS[:9]) == bpe.encode_batch(TEXTS[:9])
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    with pytest.raises(InputError, match=r"never run here|no tokenizer there"):
        tokenizers.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"add_bos_token": True, "add_eos_token": False},
        {"add_prefix_space": True},
        {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"},
        {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"},
    ],
)
def test_settings_that_change_a_tokenizer_are_those_of_transformers(tmp_path, bpe, changes) -> None:
    from transformers import AutoTokenizer

    directory = with_settings(tmp_path, bpe, **changes)
    loaded = tokenizers.load(directory)
    expected = AutoTokenizer.from_pretrained(directory)(["the cat", " mat"])["input_ids"]
    assert tokenizers.wrap(loaded, loaded.encode_batch(["the cat", " mat"]), 30) == expected


def test_special_tokens_named_in_a_file_of_their_own(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    bpe.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    moved = {key: config.pop(key) for key in list(config) if key.endswith("_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(moved))
    loaded = tokenizers.load(tmp_path)
    assert replace(loaded, backend=None) == replace(bpe, backend=None)


@pytest.mark.parametrize("prefix", ["query: ", "passage:", "Represent this: "])
def test_ids_before_a_text(wordpiece: tokenizers.Tokenizer, prefix: str) -> None:
    ids = list(tokenizers.before(wordpiece, prefix))
    for text in TEXTS[:8]:
        [whole], [bare] = wordpiece.encode_batch([prefix + text]), wordpiece.encode_batch([text])
        assert whole == ids + bare
    with pytest.raises(InputError, match="runs into the text after it"):
        tokenizers.before(wordpiece, "Represent")
    assert tokenizers.before(wordpiece, "") == ()
