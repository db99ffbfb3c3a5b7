"""The corpus: whole or absent, reproducible, read by row and id; joined ids equal those of the joined text."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors

from rag_jax.__main__ import main
from rag_jax.corpus.build import build, encoder_rows, id_dtype
from rag_jax.corpus.directory import Corpus
from rag_jax.corpus.id_table import IdTable, hash_ids, matches
from rag_jax.data import tokenizers
from rag_jax.data.joining import check_join, join, join_tail, joined_text, normalize_title, passage_text
from rag_jax.data.readers.formats import Passage, read_passages, read_questions
from rag_jax.data.tokenizers import Tokenizer
from rag_jax.errors import InputError
from rag_jax.system import files

WORDS = ["river", "mountain", "city", "born", "wrote", "in", "of", "the", "new", "king", "museum", "year", "1950"]


def write_passages(path: Path, n: int, start: int = 0, seed: int = 0) -> Path:
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for i in range(start, start + n):
            text = " ".join(rng.choices(WORDS, k=rng.randint(5, 40))) + f" número {i}."
            row = {"id": f"p{i}", "title": f'"Entity {i}"' if i % 3 else "", "text": f" {text}\n"}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="module")
def both() -> dict[str, Tokenizer]:
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=20)) + f" / número {i} // Entity?" for i in range(200)]
    return {
        "encoder_tokenizer": tokenizers.train_wordpiece(texts, 400),
        "generator_tokenizer": tokenizers.train_bpe(texts, 500),
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, both: dict[str, Tokenizer]) -> tuple[Path, Corpus]:
    folder = tmp_path_factory.mktemp("corpus")
    source = write_passages(folder / "p.jsonl", 5000)
    return source, build([source], folder / "out", encoder_length=24, generator_length=32, **both)


def test_texts_ids_and_both_tables_row_by_row(built: tuple[Path, Corpus]) -> None:
    source, corpus = built
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    passages = list(read_passages([source]))
    assert len(corpus) == len(passages) == 5000
    assert corpus.encoder_ids.dtype == corpus.generator_ids.dtype == np.uint16
    assert isinstance(corpus.encoder_ids[:9], np.memmap)
    cut = 0
    for i in [*range(0, 5000, 97), 2047, 2048, 4999]:
        given, stored = passages[i], corpus[i]
        assert stored == Passage(given.id, given.title.strip('"'), given.text.strip(), given.id)
        pair = (stored.title, stored.text) if stored.title else (stored.text,)
        whole = encoder.backend.encode(*pair).ids  # [CLS] title [SEP] text [SEP]
        expected = whole if len(whole) <= 24 else [*whole[:23], 3]
        cut += len(whole) > 24
        length = corpus.encoder_length[i]
        assert corpus.encoder_ids[i, :length].tolist() == expected
        assert (corpus.encoder_ids[i, length:] == encoder.pad_id).all()
        [whole] = generator.encode_batch([f"{stored.title} / {stored.text}"])
        length = corpus.generator_length[i]
        assert corpus.generator_ids[i, :length].tolist() == whole[:32]
        assert (corpus.generator_ids[i, length:] == generator.pad_id).all()
    assert 0 < cut < 50
    truncated = corpus.manifest["truncated"]
    assert 0 < truncated["encoder"] < 5000 and 0 < truncated["generator"] < 5000


def test_row_of_id(built: tuple[Path, Corpus]) -> None:
    _, corpus = built
    rows = [4999, 0, 17, 17]
    assert corpus.rows([f"p{row}" for row in rows]).tolist() == rows
    assert corpus.row("p123") == 123 and corpus.pieces("p123") == [123]
    assert corpus.rows(["p1", "q1", "p0-0"], missing=-1).tolist() == [1, -1, -1]
    assert corpus.rows([]).tolist() == [] and corpus.pieces("q1") == []
    with pytest.raises(InputError, match="'q1' is not in this corpus"):
        corpus.row("q1")
    for row in (5000, -1):
        with pytest.raises(IndexError):
            corpus[row]


def test_colliding_hashes_are_told_apart_by_the_text(
    built: tuple[Path, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, corpus = built
    [segment] = corpus.segments
    hashes, rows = segment.id_table
    crowded = np.full_like(hashes, hash_ids(["p7"])[0])
    monkeypatch.setattr(segment, "id_table", (crowded, rows))
    assert corpus.row("p7") == 7


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=30), st.lists(st.integers(0, 30), max_size=20))
def test_id_table_equals_a_dictionary(batches: list[list[int]], asked: list[int]) -> None:
    table, expected, row = IdTable(), set(), 0
    for batch in batches:
        table.add(np.array(batch, np.uint64), np.arange(row, row + len(batch), dtype=np.uint32))
        expected |= {(value, row + i) for i, value in enumerate(batch)}
        row += len(batch)
    query = np.array(asked, np.uint64)
    wanted = {(i, r) for i, value in enumerate(asked) for v, r in expected if v == value}
    assert set(table.candidates(query)) == wanted
    if batches:
        hashes, rows = table.merged()
        assert {(i, int(rows[place])) for i, place in matches(hashes, query)} == wanted


def test_same_input_same_bytes(tmp_path: Path, built: tuple[Path, Corpus], both: dict[str, Tokenizer]) -> None:
    source, corpus = built
    again = build([source], tmp_path / "again", encoder_length=24, generator_length=32, **both)
    for name in ("manifest.json", *corpus.manifest["files"]):
        assert (again.directory / name).read_bytes() == (corpus.directory / name).read_bytes(), name
    other = build([write_passages(tmp_path / "p.jsonl", 50)], tmp_path / "other", encoder_length=24, **both)
    assert other.hash != corpus.hash


def test_training_and_reusing_tokenizers_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, edited = write_passages(tmp_path / "p.jsonl", 60), write_passages(tmp_path / "e.jsonl", 60, seed=5)
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    train = ["--train-tokenizer", "--encoder-vocab", "300", "--generator-vocab", "320", "--encoder-length", "20"]
    assert main(["corpus", str(source), "--out", first, *train, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n_passages"], result["generator_vocab"]) == (60, 320)
    assert 100 < result["encoder_vocab"] <= 300  # so few words give no more tokens
    assert main(["corpus", str(edited), "--out", second, "--tokenizers-from", first]) == 0
    assert main(["corpus", str(edited), "--out", third, "--tokenizers-from", f"{first}/tokenizers"]) == 0
    a, b, c = Corpus.open(first), Corpus.open(second), Corpus.open(third)
    assert a.manifest["tokenizers"] == b.manifest["tokenizers"] == c.manifest["tokenizers"]
    assert a.encoder_ids.shape == b.encoder_ids.shape == (60, 20) and c.encoder_ids.shape == (60, 160)
    assert a.hash != b.hash
    directories = [
        "--encoder-tokenizer",
        f"{first}/tokenizers/encoder",
        "--generator-tokenizer",
        f"{first}/tokenizers/generator",
    ]
    assert main(["corpus", str(source), "--out", first, *directories, "--encoder-length", "20", "--overwrite"]) == 0
    assert Corpus.open(first).hash == a.hash


def test_long_documents_are_cut_and_found_under_their_old_id(tmp_path: Path, both: dict[str, Tokenizer]) -> None:
    rng = random.Random(0)
    long = " ".join(" ".join(rng.choices(WORDS, k=9)) + " end." for _ in range(60))
    rows = [{"id": "a", "title": "A", "text": "short"}, {"id": "b", "title": "B", "text": long, "doc_id": "book"}]
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = build([source], tmp_path / "out", **both)
    assert [corpus[i].id for i in range(len(corpus))] == ["a", *(f"b-{i}" for i in range(6))]
    assert {corpus[i].document for i in range(1, 7)} == {"book"}
    assert corpus.manifest["n_cut"] == 1
    assert corpus.pieces("b") == [1, 2, 3, 4, 5, 6] and corpus.row("b-3") == 4
    with pytest.raises(InputError, match="'b' was cut into 6 passages"):
        corpus.row("b")
    whole = build([source], tmp_path / "whole", passage_words=0, **both)
    assert [whole[i].text for i in range(len(whole))] == ["short", long]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "b-2", "title": "", "text": "x"}]))
    with pytest.raises(InputError, match=r"p\.jsonl:3: duplicate id 'b-2', first at .*p\.jsonl:2"):
        build([source], tmp_path / "no", **both)


@pytest.mark.parametrize("distance", [1, 3000])
def test_duplicates_name_both_places(
    tmp_path: Path, both: dict[str, Tokenizer], distance: int, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_passages(tmp_path / "first.jsonl", 10)
    second = write_passages(tmp_path / "second.jsonl", distance, start=100)
    with second.open("a") as stream:
        stream.write('{"id": "p4", "title": "", "text": "again"}\n{"id": "p5000", "title": "", "text": "new"}\n')
    message = rf"second\.jsonl:{distance + 1}: duplicate id 'p4', first at .*first\.jsonl:5"
    with pytest.raises(InputError, match=message):
        build([first, second], tmp_path / "out", **both)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.jsonl", "second.jsonl"]
    corpus = build([first, second], tmp_path / "out", skip_bad_lines=True, **both)
    assert (len(corpus), corpus.manifest["skipped"]) == (10 + distance + 1, 1)
    assert corpus[corpus.row("p4")].text != "again"
    assert re.search(message, capsys.readouterr().err)


def test_skipped_lines_are_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_passages(tmp_path / "p.jsonl", 30)
    with source.open("a") as stream:
        stream.writelines("{broken\n" for _ in range(25))
    arguments = ["corpus", str(source), "--out", str(tmp_path / "out"), "--train-tokenizer", "--encoder-vocab", "300"]
    assert main([*arguments, "--json"]) == 2
    assert "p.jsonl:31: broken JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--json", "--skip-bad-lines"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["skipped"] == 25 and json.loads(shown.out)["n_passages"] == 30
    assert "p.jsonl:31: broken JSON" in shown.err and "skipped 25 bad lines" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "pass --encoder-tokenizer and --generator-tokenizer, or --train-tokenizer"),
        (["--train-tokenizer", "--tokenizers-from", "x"], "leave out the other"),
        (["--tokenizers-from", "no_such_corpus"], "no such corpus directory"),
        (["--train-tokenizer", "--encoder-vocab", "20"], "--encoder-vocab 20: at least 300"),
        (["--train-tokenizer", "--generator-length", "3"], "--generator-length 3: a number from 8"),
        (["--train-tokenizer", "--passage-words", "-5"], "--passage-words -5"),
        (["--encoder-tokenizer", "/none", "--generator-tokenizer", "/none"], "no such tokenizer directory"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    source = write_passages(tmp_path / "p.jsonl", 3)
    assert main(["corpus", str(source), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path, both: dict[str, Tokenizer]) -> None:
    source, out = write_passages(tmp_path / "p.jsonl", 5), tmp_path / "out"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a corpus"):
        build([source], precious, overwrite=True, **both)
    assert (precious / "thesis.txt").exists()
    with pytest.raises(InputError, match="cannot be made"):
        build([source], source / "out", **both)
    out.mkdir()  # an existing empty folder is accepted
    build([source], out, **both)
    with pytest.raises(InputError, match="pass --overwrite"):
        build([source], out, **both)
    assert len(build([write_passages(source, 7)], out, overwrite=True, **both)) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.jsonl", "precious"]


def everything(corpus: Corpus) -> None:
    """Reads every table and passage of a corpus."""
    tables = (corpus.encoder_ids, corpus.encoder_length, corpus.generator_ids, corpus.generator_length)
    _ = [np.asarray(table) for table in tables], corpus.encoder_tokenizer, corpus.generator_tokenizer
    assert corpus.rows([corpus[row].id for row in range(len(corpus))]).tolist() == list(range(len(corpus)))


def test_altered_directories_are_refused(tmp_path: Path, built: tuple[Path, Corpus]) -> None:
    _, corpus = built

    def altered(name: str, change) -> str:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(corpus.directory, tmp_path / "c")
        change(tmp_path / "c" / name)
        with pytest.raises(InputError, match=r"again|not the manifest|not a finished") as error:
            everything(Corpus.open(tmp_path / "c"))
        return str(error.value)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def manifest(path: Path, **changes: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    assert "not a finished corpus" in altered("manifest.json", Path.unlink)
    assert "unreadable" in altered("manifest.json", lambda p: p.write_text(p.read_text()[:100]))
    assert "format version 99" in altered("manifest.json", lambda p: manifest(p, format_version=99))
    assert "altered" in altered("manifest.json", lambda p: manifest(p, n_passages=4999))
    assert "not the manifest of a corpus" in altered("manifest.json", lambda p: manifest(p, kind="index"))
    for name in corpus.manifest["files"]:
        assert name in altered(name, Path.unlink)
        assert name in altered(name, lambda p: os.truncate(p, p.stat().st_size - 1))
        assert name in altered(name, flip)
    with pytest.raises(InputError, match="no such corpus"):
        Corpus.open(tmp_path / "nothing")


def test_killed_at_random_moments_it_leaves_nothing_or_the_whole(
    tmp_path: Path, built: tuple[Path, Corpus], both: dict[str, Tokenizer]
) -> None:
    source, corpus = built
    for name, tokenizer in both.items():
        tokenizer.save(tmp_path / "tokenizers" / name.removesuffix("_tokenizer"))
    out = tmp_path / "work" / "out"
    lengths = ["--encoder-length", "24", "--generator-length", "32", "--tokenizers-from", str(tmp_path / "tokenizers")]
    command = [sys.executable, "-m", "rag_jax", "corpus", str(source), "--out", str(out), *lengths]
    rng = random.Random(0)
    left = 0
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not any(out.parent.glob(f".{out.name}.building-*")):
            time.sleep(0.002)
        time.sleep(rng.choice([0, 0.02, 0.1, 0.3]) * rng.random())  # about the duration of a build
        process.kill()
        process.wait()
        if out.exists():
            assert Corpus.open(out).hash == corpus.hash
            shutil.rmtree(out)
        for rest in out.parent.iterdir():
            left += 1
            if not (rest / "manifest.json").exists():  # a complete one, not yet renamed, may be opened
                with pytest.raises(InputError, match="not a finished corpus"):
                    Corpus.open(rest)
    assert left, "no run was killed while it was writing: the test shows nothing"
    subprocess.run(command, check=True, capture_output=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # the leftovers of killed runs are removed
    assert Corpus.open(out).hash == corpus.hash


def test_two_builds_at_once_of_one_directory(tmp_path: Path) -> None:
    with files.new_directory(tmp_path / "out", "corpus") as first:
        (first / "x").write_text("x")
        with (
            pytest.raises(InputError, match="another process is building it"),
            files.new_directory(tmp_path / "out", "corpus"),
        ):
            pass
    assert (tmp_path / "out" / "x").exists()


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.new_directory(tmp_path / "out", "corpus"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_smallest_integer_type() -> None:
    sizes = [2, 256, 257, 65536, 65537]
    assert [id_dtype(size).name for size in sizes] == ["uint8", "uint8", "uint16", "uint16", "uint32"]


def test_encoder_rows_keep_the_closing_tokens_and_half_of_the_room_for_the_text(both: dict[str, Tokenizer]) -> None:
    encoder = both["encoder_tokenizer"]
    title, text = " ".join(["river"] * 40), " ".join(["city"] * 40)
    [river], [city] = encoder.encode_batch(["river", "city"])
    cases = [Passage("a", title, text, "a"), Passage("b", title, "city city", "b"), Passage("c", "", text, "c")]
    rows, lengths = encoder_rows(encoder, cases, 21)
    assert rows[0] == [2, *[river] * 9, 3, *[city] * 9, 3]
    assert rows[1] == [2, *[river] * 16, 3, city, city, 3]
    assert rows[2] == [2, *[city] * 19, 3]
    assert lengths == [83, 45, 42]


# The join: prefix + passage row + tail must be the ids of the joined text.


def assert_join_is_exact(tokenizer: Tokenizer, rows: list[tuple[str, str, str]]) -> None:
    rows = [(normalize_title(title), text.strip(), question) for title, text, question in rows]
    passages = tokenizer.encode_batch([passage_text(title, text) for title, text, _ in rows])
    tails = join_tail(tokenizer, [question for *_, question in rows])
    texts = [joined_text(*row) for row in rows]
    as_text = [[*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids] for ids in tokenizer.encode_batch(texts)]
    whole = tokenizer.backend.encode_batch(texts)  # with specials, also those that are written in a text
    written = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    for row, text, passage, tail, expected, theirs in zip(rows, texts, passages, tails, as_text, whole, strict=True):
        assert join(tokenizer.prefix_ids, passage, tail, 10**9) == expected, row
        assert expected == theirs.ids or any(token in text for token in written), row


def bart_directory(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """A directory like BART's at Hugging Face: vocabulary and merges, with its own post-processor."""
    tokenizer.backend.model.save(str(folder))
    (folder / "config.json").write_text('{"model_type": "bart"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BartTokenizer"}')
    return tokenizers.load(folder)


@pytest.fixture(scope="module", params=["bpe", "bart", "wordpiece"])
def generator(
    request: pytest.FixtureRequest, both: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "bart":
        return bart_directory(tmp_path_factory.mktemp("bart"), both["generator_tokenizer"])
    return both["generator_tokenizer" if request.param == "bpe" else "encoder_tokenizer"]


PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text("ab /'\"\n\t\u00a0\u2003\u200b\u3000.?!s", max_size=12),
    st.sampled_from(["<mask>", "</s>", "[SEP]", "'s", " // ", " / ", "  ", "city"]),
)
TEXT = st.lists(PIECES, max_size=5).map("".join)


@settings(max_examples=150)
@given(st.lists(st.tuples(TEXT, TEXT.filter(str.strip), TEXT), min_size=1, max_size=4))
def test_join_on_random_unicode(generator: Tokenizer, rows: list[tuple[str, str, str]]) -> None:
    assert_join_is_exact(generator, rows)


@settings(max_examples=200)
@given(TEXT, TEXT.filter(str.strip), TEXT)
def test_double_spaces_replaced_on_each_side_are_replaced_in_the_whole(title: str, text: str, question: str) -> None:
    title, text = normalize_title(title), text.strip()
    whole = f"{title} / {text} // {question}".replace("  ", " ")
    assert (
        passage_text(title, text) + f" // {question}".replace("  ", " ") == whole == joined_text(title, text, question)
    )


@pytest.mark.parametrize("name", ["squad", "nq_gold", "xquad_zh", "xquad_ar", "xquad_ru", "cmu_dog"])
def test_join_on_real_text(name: str, shared_data, tmp_path: Path) -> None:
    folder = shared_data(name)
    rng = random.Random(0)
    passages = list(islice(read_passages([folder / "passages.jsonl"]), 3000))
    questions = [question.question for question in read_questions(folder / "dev.jsonl")]
    drawn = zip(rng.choices(passages, k=500), rng.choices(questions, k=500), strict=True)
    rows = [(passage.title, passage.text, question) for passage, question in drawn]
    trained = tokenizers.train_bpe([f"{title} / {text} // {question}" for title, text, question in rows[:200]], 1200)
    assert_join_is_exact(trained, rows)
    assert_join_is_exact(bart_directory(tmp_path, trained), rows)


def test_join_as_the_reference_writes_it() -> None:
    assert normalize_title(' "The "Old" House" ') == 'The "Old" House'
    assert normalize_title('""x""') == '"x"' and normalize_title('"') == ""
    assert joined_text("A", "b  c", "d   e") == "A / b c // d  e"  # once: three spaces become two
    assert joined_text("", "b", "q") == " / b // q"


def test_join_cuts_the_passage_and_never_the_question() -> None:
    prefix, passage, tail = [0], [10, 11, 12, 13], [20, 21, 22, 2]
    assert join(prefix, passage, tail, 9) == [0, 10, 11, 12, 13, 20, 21, 22, 2]
    assert join(prefix, passage, tail, 7) == [0, 10, 11, 20, 21, 22, 2]
    assert join(prefix, passage, tail, 5) == [0, 20, 21, 22, 2]
    assert join(prefix, passage, tail, 4) == [0, 20, 21, 2]  # the question alone is too long: its beginning stays
    assert join((), passage, [20, 21], 3, suffix_length=0) == [10, 20, 21]
    assert join((), passage, [20, 21], 1, suffix_length=0) == [20]
    with pytest.raises(InputError, match="no room"):
        join(prefix, passage, tail, 2)


def test_a_tokenizer_that_is_not_safe_to_join_is_refused(tmp_path: Path, both: dict[str, Tokenizer]) -> None:
    """Without a pre-tokenizer BPE merges across spaces, so "x // who" has tokens that contain the end of x."""
    symbols = [
        *"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/.?!,'()\n:éúñ",
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
    ]
    vocab = {token: i for i, token in enumerate([*symbols, ". ", "/ "])}
    backend = Backend(models.BPE(vocab, [(".", " "), ("/", " ")], unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    ends = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", ends)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    unsafe = tokenizers._make(backend, names, "test")
    source = write_passages(tmp_path / "p.jsonl", 5)
    with pytest.raises(InputError, match="over the seam"):
        build([source], tmp_path / "out", encoder_tokenizer=both["encoder_tokenizer"], generator_tokenizer=unsafe)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_sentencepiece_like_tokenizer_may_be_joined() -> None:
    """T5's kind: ▁ stands for the space before a word, and before the first word too."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁//", "▁/", *"abcdefghijklmnopqrstuvwxyz./?"]
    backend = Backend(models.Unigram([(piece, -1.0 - 0.1 * i) for i, piece in enumerate(pieces)], unk_id=2))
    backend.normalizer = normalizers.Replace(" {2,}", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer = tokenizers._make(backend, {"pad_token": "<pad>", "eos_token": "</s>"}, "test")
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids, tokenizer.bos_id) == ((), (1,), 0)
    check_join(tokenizer, [("", "a cat."), ("the mat", "sat on it")])
    assert_join_is_exact(tokenizer, [("the mat", "sat on it", "who sat?")])
