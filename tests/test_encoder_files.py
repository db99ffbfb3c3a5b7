"""The files beside an encoder's weights, read and exported: pooling, prompts, lengths, dropout, tokenizers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pretrained import golden, same_checkpoint, write

import rag_jax
from rag_jax.__main__ import main
from rag_jax.corpus.directory import Corpus
from rag_jax.data import tokenizers
from rag_jax.errors import InputError
from rag_jax.index import snapshot
from rag_jax.index.snapshot import same_form
from rag_jax.models.bert import pool
from rag_jax.models.hf import ENCODERS
from rag_jax.pretrained.combine import combine
from rag_jax.pretrained.encoder_files import Asked

WORDS = [
    "river",
    "stone",
    "lamp",
    "market",
    "garden",
    "winter",
    "captain",
    "silver",
    "bridge",
    "engine",
    "poet",
    "island",
]
TEXTS = [" ".join(WORDS[(i * k) % 12] for k in range(1, 9)) + ", query: passage: ?" for i in range(60)]
TODAY = "sentence_transformers.sentence_transformer.modules"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train_wordpiece(TEXTS, 300)


def encoder(directory: Path, tokenizer, name="bert", **changes) -> Path:
    """The golden's encoder, with a larger vocabulary and more positions for real texts, and its tokenizer."""
    arrays, rng = golden(name), np.random.default_rng(0)
    config = json.loads(str(arrays["config"])) | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 96}
    for key in [k for k in arrays if "word_embeddings" in k or "position_embeddings" in k]:
        rows = tokenizer.vocab_size if "word" in key else 96
        arrays[key] = rng.normal(0, 1, (rows, arrays[key].shape[1])).astype("f4")
    write(directory, arrays, {**config, "architectures": ["BertModel"] if name == "bert" else None, **changes})
    tokenizer.save(directory)
    return directory


def put(directory: Path, **files) -> Path:
    """Writes JSON files into a directory; "__" in a name stands for the slash of a folder."""
    for name, content in files.items():
        path = directory / (name.replace("__", "/") + ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return directory


def modules(*kinds, base="sentence_transformers.models"):
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"{base}.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]


def model_of(directory: Path, **asked):
    return combine(directory, asked=Asked(**asked)).model


# --- pooling ----------------------------------------------------------------------------------------------------------


def by_hand(hidden_LD, mask_L, how):
    rows = hidden_LD[mask_L]
    n, at = len(rows), np.flatnonzero(mask_L) + 1
    return {
        "cls": lambda: hidden_LD[0],
        "mean": lambda: rows.mean(0),
        "max": lambda: rows.max(0),
        "mean_sqrt_len_tokens": lambda: rows.sum(0) / np.sqrt(n),
        "weightedmean": lambda: (rows * at[:, None]).sum(0) / at.sum(),
        "lasttoken": lambda: rows[-1],
    }[how]()


WAYS = ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.mark.parametrize("how", WAYS)
def test_every_way_of_pooling(how):
    rng = np.random.default_rng(1)
    hidden, lengths = rng.normal(size=(4, 7, 5)).astype("f4"), [7, 1, 4, 6]
    mask = np.arange(7) < np.array(lengths)[:, None]
    mask[3, :2] = False  # a prompt that is not pooled
    expected = [by_hand(h, m, how) for h, m in zip(hidden, mask, strict=True)]
    np.testing.assert_allclose(pool(jnp.asarray(hidden), jnp.asarray(mask), how), expected, atol=1e-5)


FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
FLAGS |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}


@pytest.mark.parametrize("how", WAYS)
def test_pooling_in_both_spellings(tmp_path, tokenizer, how):
    old = {"word_embedding_dimension": 12} | {f"pooling_mode_{flag}": way == how for way, flag in FLAGS.items()}
    new = {"embedding_dimension": 12, "pooling_mode": how, "include_prompt": True}
    for number, (pooling, base) in enumerate(((old, "sentence_transformers.models"), (new, TODAY))):
        directory = put(
            encoder(tmp_path / str(number), tokenizer),
            modules=modules("Transformer", "Pooling", "Normalize", base=base),
            **{"1_Pooling__config": pooling},
        )
        found = model_of(directory).encoder
        assert (found.pooling, found.vector_norm) == (how, 1.0)
        listed = put(directory, **{"1_Pooling__config": new | {"pooling_mode": [how]}})
        assert model_of(listed).encoder.pooling == how


@pytest.mark.parametrize(
    ("pooling", "said"),
    [
        ({"pooling_mode": ["cls", "mean"]}, r"pooling cls \+ mean is not supported"),
        ({"pooling_mode": "cls+mean"}, r"pooling cls \+ mean is not supported"),
        ({"pooling_mode": "attention"}, "pooling attention is not supported"),
        ({"pooling_mode_cls_token": True}, r"pooling cls \+ mean"),  # mean pooling is sentence-transformers' default
        ({"pooling_mode_mean_tokens": False}, "pooling of nothing"),
        ({"pooling_mode": "mean", "new_setting": 3}, "new_setting=3 is not known"),
    ],
)
def test_pooling_that_is_not_built_is_refused(tmp_path, tokenizer, pooling, said):
    directory = put(
        encoder(tmp_path, tokenizer), modules=modules("Transformer", "Pooling"), **{"1_Pooling__config": pooling}
    )
    with pytest.raises(InputError, match=said):
        model_of(directory)


@pytest.mark.parametrize("kind", ["Dense", "LSTM", "WeightedLayerPooling", "Router"])
def test_other_modules_are_refused(tmp_path, tokenizer, kind):
    directory = put(
        encoder(tmp_path, tokenizer), modules=modules("Transformer", kind, base=TODAY), **{f"1_{kind}__config": {}}
    )
    with pytest.raises(InputError, match=f"module {kind} is not supported"):
        model_of(directory)


@pytest.mark.parametrize(
    ("architectures", "how"),
    [(["Contriever"], "mean"), (["BertModel"], "cls"), (["BertForPreTraining"], "cls"), (None, "cls")],
)
def test_the_class_that_wrote_a_bert_says_how_it_pools(tmp_path, tokenizer, architectures, how):
    directory = encoder(tmp_path, tokenizer, architectures=architectures)
    model, params = rag_jax.from_pretrained(directory)
    assert model.config.encoder.pooling == how
    ids = np.random.default_rng(0).integers(5, 90, (3, 9))
    mask = np.arange(9) < np.array([9, 4, 6])[:, None]
    hidden = model.encoder.apply({"params": params["question_encoder"]}, ids, mask, method="hidden")
    expected = [by_hand(np.asarray(h), m, how) for h, m in zip(hidden, mask, strict=True)]
    np.testing.assert_allclose(model.embed_questions(params, ids, mask), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "NomicBertModel"])
def test_a_head_that_is_no_vector_needs_to_be_told(tmp_path, tokenizer, name):
    directory = encoder(tmp_path, tokenizer, architectures=[name])
    with pytest.raises(InputError, match=f"written by {name}.*--pooling"):
        model_of(directory)
    assert model_of(directory, pooling="max").encoder.pooling == "max"


def test_dropout_of_attention_is_that_of_the_file(tmp_path, tokenizer):
    directory = encoder(tmp_path, tokenizer, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0)
    model, params = rag_jax.from_pretrained(directory)
    assert (model.config.encoder.dropout, model.config.encoder.attention_dropout) == (0.3, 0.0)
    only = dataclasses.replace(model.config.encoder, dropout=0.0)
    ids, mask = np.arange(5, 13)[None], np.ones((1, 8), bool)
    for rate, same in ((0.0, True), (0.5, False)):
        config = dataclasses.replace(model.config, encoder=dataclasses.replace(only, attention_dropout=rate))
        trained = dataclasses.replace(model, config=config)
        found = trained.embed_questions(params, ids, mask, jax.random.key(0))
        assert np.allclose(found, trained.embed_questions(params, ids, mask)) == same
    old = dataclasses.replace(model.config.encoder, dropout=0.2, attention_dropout=-1.0)
    assert ENCODERS["bert"].describe(old)["attention_probs_dropout_prob"] == 0.2


# --- prompts and lengths ----------------------------------------------------------------------------------------------


PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("how", ["cls", "mean"])
def test_prompts_are_read_before_questions_and_passages(tmp_path, tokenizer, include, how):
    directory = put(
        encoder(tmp_path, tokenizer),
        modules=modules("Transformer", "Pooling", base=TODAY),
        config_sentence_transformers={"prompts": PROMPTS, "default_prompt_name": None},
        **{"1_Pooling__config": {"pooling_mode": how, "include_prompt": include}},
    )
    model, params = rag_jax.from_pretrained(directory)
    assert (model.config.query_prefix, model.config.passage_prefix) == ("query: ", "passage: ")
    texts = ["river stone, lamp", "the garden 1984"]
    for embed, prompt in ((model.embed_questions, "query: "), (model.embed_passages, "passage: ")):
        rows = tokenizers.wrap(tokenizer, tokenizer.encode_batch(texts), 40)
        ids, lengths = tokenizers.pad_rows(rows, 30, tokenizer.pad_id)
        found = embed(params, ids, np.arange(30) < lengths[:, None])
        for vector, text in zip(found, texts, strict=True):
            whole = np.array(tokenizer.backend.encode(prompt + text).ids)[None]
            hidden = model.encoder.apply(
                {"params": params["question_encoder"]}, whole, np.ones(whole.shape, bool), method="hidden"
            )
            first = 0 if include else len(tokenizer.backend.encode(prompt).ids) - 1  # [CLS] and the prompt
            mask = np.arange(whole.shape[1]) >= first
            np.testing.assert_allclose(vector, by_hand(np.asarray(hidden[0]), mask, how), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prompts": {"a": "one: "}, "default_prompt_name": "a"}, ("one: ", "one: ")),
        ({"prompts": {"a": "one: ", "query": "two: "}, "default_prompt_name": "a"}, ("two: ", "one: ")),
        ({"prompts": {"query": "", "passage": "two: "}, "default_prompt_name": None}, ("", "two: ")),
        ({"prompts": {"s2s": "one: "}, "default_prompt_name": None}, ("", "")),
        ({}, ("", "")),
    ],
)
def test_which_prompt_is_whose(tmp_path, tokenizer, settings, expected):
    model = model_of(put(encoder(tmp_path, tokenizer), config_sentence_transformers=settings))
    assert (model.query_prefix, model.passage_prefix) == expected
    model = model_of(tmp_path, query_prefix="mine: ", passage_prefix="")
    assert (model.query_prefix, model.passage_prefix) == ("mine: ", "")


def test_settings_of_the_model_that_are_not_built_are_refused(tmp_path, tokenizer):
    encoder(tmp_path, tokenizer)
    for settings, said in (
        ({"similarity_fn_name": "euclidean"}, "similarity_fn_name='euclidean' is not supported"),
        ({"default_prompt_name": "x", "prompts": {}}, "default_prompt_name='x' is none of its prompts"),
        ({"truncate_dim": 8}, "truncate_dim=8 is not supported"),
        ({"model_type": "SparseEncoder"}, "SparseEncoder"),
        ({"prompts": {"query": "Represent it"}}, "runs into the text after it"),
        ({"strange": 1}, "strange=1 is not known"),
    ):
        with pytest.raises(InputError, match=said):
            model_of(put(tmp_path, config_sentence_transformers=settings))
    assert (
        model_of(put(tmp_path, config_sentence_transformers={"similarity_fn_name": "cosine"})).encoder.vector_norm == 1
    )
    assert model_of(put(tmp_path, config_sentence_transformers={"similarity_fn_name": "dot"})).encoder.vector_norm == 0


def test_lengths_are_those_of_the_checkpoint(tmp_path, tokenizer):
    encoder(tmp_path, tokenizer)
    assert (model_of(tmp_path).question_length, model_of(tmp_path).passage_length) == (96, 96)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    put(tmp_path, tokenizer_config=settings | {"model_max_length": 80})
    assert model_of(tmp_path).question_length == 80
    put(tmp_path, tokenizer_config=settings | {"model_max_length": 10**30})
    assert model_of(tmp_path).question_length == 96
    put(tmp_path, sentence_bert_config={"max_seq_length": 50, "do_lower_case": False})
    assert model_of(tmp_path).question_length == 50
    asked = model_of(tmp_path, query_prefix="query: ", passage_length=33)
    assert (asked.question_length, asked.passage_length) == (50 - len(asked.query_prefix_ids), 33)
    assert len(asked.query_prefix_ids) >= 2
    with pytest.raises(InputError, match="length 97 is more than the 96 positions"):
        model_of(tmp_path, question_length=97)


def test_lower_case_is_the_tokenizers_or_refused(tmp_path, tokenizer):
    put(encoder(tmp_path / "a", tokenizer), sentence_bert_config={"max_seq_length": 50, "do_lower_case": True})
    assert model_of(tmp_path / "a").question_length == 50
    cased = tokenizers.train_wordpiece(TEXTS, 300)
    cased.backend.normalizer = None
    put(encoder(tmp_path / "b", cased), sentence_bert_config={"max_seq_length": 50, "do_lower_case": True})
    with pytest.raises(InputError, match="do_lower_case is set"):
        model_of(tmp_path / "b")


@pytest.mark.parametrize("side", ["left", "right"])
def test_settings_of_the_tokenizer(tmp_path, tokenizer, side):
    encoder(tmp_path, tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    put(tmp_path, tokenizer_config=settings | {"truncation_side": side, "padding_side": "left", "chat_template": "x"})
    if side == "left":
        with pytest.raises(InputError, match="truncation_side='left' is not supported"):
            model_of(tmp_path)
        return
    account = combine(tmp_path).account
    assert any("chat_template" in where for where, _, _ in account.idle)
    put(tmp_path, tokenizer_config=settings | {"secret_key": 1})
    with pytest.raises(InputError, match="secret_key=1 is not known"):
        model_of(tmp_path)


# --- two encoders, two tokenizers -------------------------------------------------------------------------------------


def test_a_tokenizer_of_its_own_is_refused_where_it_reads_otherwise(tmp_path, tokenizer):
    q, c = (encoder(tmp_path / n, tokenizer, n) for n in ("dpr_question", "dpr_context"))
    assert combine(q, c).model.context_encoder
    other = tokenizers.train_wordpiece([" ".join(reversed(text.split())) + " zebra" for text in TEXTS], 300)
    other.save(c)
    with pytest.raises(InputError, match=r"a tokenizer of its own, which differs.*tokens of their vocabularies: '"):
        combine(q, c)
    tokenizer.save(c)
    saved = json.loads((c / "tokenizer.json").read_text())
    put(c, tokenizer=saved | {"normalizer": saved["normalizer"] | {"lowercase": False}})
    with pytest.raises(InputError, match=r"their normalizer: .*\"lowercase\": true.* and .*\"lowercase\": false"):
        combine(q, c)
    put(
        c,
        tokenizer=saved
        | {"truncation": {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}},
    )
    assert combine(q, c).model.context_encoder  # the same ids


# --- an index is bound to the form of its vectors ---------------------------------------------------------------------


def test_an_index_cannot_lack_the_prefix_or_pool_otherwise(tmp_path, tokenizer, capsys):
    put(encoder(tmp_path / "hf", tokenizer), sentence_bert_config={"max_seq_length": 40})
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", "title": "T", "text": text}) + "\n" for i, text in enumerate(TEXTS[:9]))
    )
    runs = {"plain": [], "mean": ["--pooling", "mean"], "prefix": ["--passage-prefix", "passage: "]}
    for name, flags in runs.items():
        assert main(["convert", str(tmp_path / "hf"), "--out", str(tmp_path / name), *flags]) == 0
    tokens = str(tmp_path / "plain/tokenizers")
    assert main(["corpus", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "c"), "--tokenizers-from", tokens]) == 0
    assert Corpus.open(tmp_path / "c").manifest["lengths"]["encoder"] == 40
    vectors = {}
    for name in runs:
        words = ["index", str(tmp_path / name), "--corpus", str(tmp_path / "c"), "--out", str(tmp_path / f"i-{name}")]
        assert main(words) == 0
        vectors[name] = np.asarray(snapshot.open_snapshot(tmp_path / f"i-{name}").embeddings_NE[0:9])
    assert all(np.abs(vectors["plain"] - vectors[name]).max() > 0.01 for name in ("mean", "prefix"))
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"id": "q", "question": "river", "answers": ["x"], "positive_passage_ids": ["p1"]}) + "\n"
    )
    for run in runs:
        for made in runs:
            words = ["evaluate", str(tmp_path / run), "--index", str(tmp_path / f"i-{made}"), "--retrieval-only"]
            words += ["--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / f"ev-{run}-{made}")]
            capsys.readouterr()
            code = main(words)
            assert code == (0 if run == made else 2), (run, made, capsys.readouterr().err)
            if run != made:
                assert "its vectors are" in capsys.readouterr().err


def test_forms_of_vectors():
    """An index from before forms were recorded has pooling cls or mean, without a prefix."""
    assert same_form("", "cls") and same_form("", "mean of length 1") and not same_form("", "max")
    assert not same_form("", "mean after ids [3, 4]") and not same_form("cls", "mean") and same_form("mean", "mean")


# --- there and back ---------------------------------------------------------------------------------------------------


OLD_POOLING = {"word_embedding_dimension": 12, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
LAYOUTS = {
    "bert": {},
    "contriever": {},
    "old": {
        "modules": modules("Transformer", "Pooling", "Normalize"),
        "1_Pooling__config": OLD_POOLING,
        "sentence_bert_config": {"max_seq_length": 64, "do_lower_case": False},
        "config_sentence_transformers": {"__version__": {"sentence_transformers": "2.0.0"}},
    },
    "prompts": {
        "modules": modules("Transformer", "Pooling", base=TODAY),
        "1_Pooling__config": {"embedding_dimension": 12, "pooling_mode": "weightedmean", "include_prompt": False},
        "sentence_bert_config": {"max_seq_length": 48, "do_lower_case": False},
        "config_sentence_transformers": {
            "__version__": {"sentence_transformers": "5.0.0"},
            "model_type": "SentenceTransformer",
            "prompts": PROMPTS | {"clustering": "topic: "},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    },
    "default": {
        "modules": modules("Transformer", "Pooling", base=TODAY),
        "1_Pooling__config": {"embedding_dimension": 12, "pooling_mode": "cls", "include_prompt": True},
        "config_sentence_transformers": {"prompts": {"all": "query: "}, "default_prompt_name": "all"},
    },
}
NOT_COMPARED = ("transformers_version", "dtype", "torch_dtype", "_name_or_path")


def settings_of(directory: Path) -> dict:
    names = [p for p in directory.rglob("*.json") if p.name not in ("tokenizer.json", "manifest.json")]
    found = {str(path.relative_to(directory)): json.loads(path.read_text()) for path in names}
    found["config.json"] = {k: v for k, v in found["config.json"].items() if k not in NOT_COMPARED and v is not None}
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_settings_go_there_and_back(tmp_path, tokenizer, name):
    architecture = ["Contriever"] if name == "contriever" else ["BertModel"]
    changes = {"attention_probs_dropout_prob": 0.25, "architectures": architecture}
    source = put(encoder(tmp_path / "source", tokenizer, **changes), **LAYOUTS[name])
    settings = json.loads((source / "tokenizer_config.json").read_text())
    put(source, tokenizer_config=settings | {"model_max_length": 90, "padding_side": "right", "chat_template": "x"})
    assert main(["convert", str(source), "--out", str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
    same_checkpoint(source, tmp_path / "back")
    old, new = settings_of(source), settings_of(tmp_path / "back")
    assert {path: new.get(path) for path in old} == old
    a, b = (rag_jax.from_pretrained(tmp_path / d) for d in ("source", "back"))
    assert a[0].config == b[0].config
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


@pytest.mark.parametrize("name", ["dpr_question", "dpr_context"])
def test_settings_of_dpr_go_there_and_back(tmp_path, tokenizer, name):
    dropout = {"dpr_question": {}, "dpr_context": {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.05}}
    own = {"dpr_question": "DPRQuestionEncoder", "dpr_context": "DPRContextEncoder"}
    for n, changes in dropout.items():
        encoder(tmp_path / n, tokenizer, n, **changes, architectures=[own[n]])
    words = ["--question-encoder", str(tmp_path / "dpr_question"), "--context-encoder", str(tmp_path / "dpr_context")]
    assert main(["convert", *words, "--out", str(tmp_path / "ours")]) == 0
    part = name.removeprefix("dpr_") + "_encoder"
    assert main(["export", str(tmp_path / "ours"), "--part", part, "--out", str(tmp_path / "back")]) == 0
    old, new = settings_of(tmp_path / name), settings_of(tmp_path / "back")
    assert {path: {k: new[path].get(k) for k in old[path]} for path in old} == old


def test_what_convert_was_told_is_exported(tmp_path, tokenizer):
    """For a plain BERT the export adds files of sentence-transformers, since config.json has no place for these."""
    encoder(tmp_path / "source", tokenizer)
    flags = [
        "--pooling",
        "max",
        "--query-prefix",
        "query: ",
        "--passage-prefix",
        "passage: ",
        "--question-length",
        "30",
    ]
    assert main(["convert", str(tmp_path / "source"), "--out", str(tmp_path / "ours"), *flags]) == 0
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
    a, b = (rag_jax.from_pretrained(tmp_path / d)[0].config for d in ("ours", "back"))
    names = ("query_prefix", "passage_prefix", "question_length", "query_prefix_ids", "passage_prefix_ids", "encoder")
    assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]
    assert a.question_length == 30 and a.encoder.pooling == "max"


def test_an_older_layout_with_the_encoder_in_its_own_folder(tmp_path, tokenizer):
    inner = encoder(tmp_path / "0_Transformer", tokenizer)
    put(inner, sentence_bert_config={"max_seq_length": 44, "do_lower_case": False})
    listed = modules("Transformer", "Pooling")
    listed[0]["path"] = "0_Transformer"
    put(tmp_path, modules=listed, **{"1_Pooling__config": OLD_POOLING})
    model, _ = rag_jax.from_pretrained(tmp_path)
    assert (model.config.encoder.pooling, model.config.question_length) == ("mean", 44)
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "ours")]) == 0
