"""Names and settings of BERT, alone or with sentence-transformers' files, and of the two encoders of DPR."""

from collections.abc import Callable
from typing import Any

from rag_jax.errors import InputError
from rag_jax.models.bert import BertConfig
from rag_jax.models.hf.generation import LEGACY_ENCODER
from rag_jax.models.hf.naming import Entry, HfConfig, HfFamily, activation, dense, need, norm, refuse, table
from rag_jax.models.hf.settings import COMMON, Table, fates, idle, into, only

BERT: Table = COMMON | LEGACY_ENCODER | fates({
    "vocab_size": into("vocab_size"),
    "hidden_size": into("width"),
    "num_hidden_layers": into("layers"),
    "num_attention_heads": into("heads"),
    "intermediate_size": into("hidden"),
    "max_position_embeddings": into("positions"),
    "type_vocab_size": into("token_types"),
    "architectures": into("pooling"),
    "hidden_dropout_prob": into("dropout"),
    "attention_probs_dropout_prob": into("attention_dropout"),
    "layer_norm_eps": into("eps"),
    "hidden_act": into("activation"),
    "projection_dim": into("projection"),
    "position_embedding_type": only("absolute", why="positions are learned"),
    "is_decoder add_cross_attention is_encoder_decoder": only(False, why="an encoder reads both ways"),
    "tie_word_embeddings": idle("of a head that predicts words, which is not read"),
    "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type":
        idle("of BERT's pooler, which is not read"),
    "prefix": idle("of generators"),
})  # fmt: skip


def bert_config(config: HfConfig, where: str) -> BertConfig:
    """Our configuration from a BertConfig or DPRConfig; pooling and vector_norm are left at DPR's."""
    refuse(config, where, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return BertConfig(
        vocab_size=need(config, "vocab_size", where),
        width=need(config, "hidden_size", where),
        layers=need(config, "num_hidden_layers", where),
        heads=need(config, "num_attention_heads", where),
        hidden=need(config, "intermediate_size", where),
        positions=need(config, "max_position_embeddings", where),
        token_types=need(config, "type_vocab_size", where),
        dropout=float(config.get("hidden_dropout_prob", 0.1)),
        attention_dropout=float(config.get("attention_probs_dropout_prob", 0.1)),
        eps=float(config.get("layer_norm_eps", 1e-12)),
        activation=activation(config, "hidden_act", "gelu", where),
        projection=config.get("projection_dim", 0) or 0,
    )


def describe_bert(c: BertConfig) -> dict[str, Any]:
    if c.norm != "post":
        raise InputError(
            "Hugging Face has no BERT with LayerNorm before its sublayers (norm='pre'); an encoder trained with "
            "norm='post' can be exported"
        )
    described = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "max_position_embeddings": c.positions,
        "type_vocab_size": c.token_types,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.weights_dropout,
        "layer_norm_eps": c.eps,
        "hidden_act": c.activation,
        "pad_token_id": 0,
    }
    return described | ({"projection_dim": c.projection} if c.projection else {})


def bert_entries(c: BertConfig) -> list[Entry]:
    entries = [
        entry for ours in ("word", "position", "token_type") for entry in table(f"embeddings.{ours}_embeddings", ours)
    ]
    entries += norm("embeddings.LayerNorm", "embedding_norm")
    for i in range(c.layers):
        at, to = f"encoder.layer.{i}", f"layer_{i}"
        for name in ("query", "key", "value"):
            entries += dense(f"{at}.attention.self.{name}", f"{to}/attention/{name}")
        entries += dense(f"{at}.attention.output.dense", f"{to}/attention/out")
        entries += norm(f"{at}.attention.output.LayerNorm", f"{to}/attention_norm")
        entries += dense(f"{at}.intermediate.dense", f"{to}/feed_forward/inner")
        entries += dense(f"{at}.output.dense", f"{to}/feed_forward/outer")
        entries += norm(f"{at}.output.LayerNorm", f"{to}/feed_forward_norm")
    return entries


BERT_IGNORABLE = (
    r"(.*\.)?embeddings\.(position|token_type)_ids",
    r"(.*\.)?pooler\..*",
    r"(.*\.)?encoder\.version",
    r"cls\..*",
)


def dpr_entries(side: str) -> Callable[[BertConfig], list[Entry]]:
    """The entries of a DPR encoder: BERT's under a prefix, and the projection.

    side: the prefix, question_encoder or ctx_encoder.
    """

    def entries(c: BertConfig) -> list[Entry]:
        inner = [entry._replace(theirs=f"{side}.bert_model.{entry.theirs}") for entry in bert_entries(c)]
        return inner + (dense(f"{side}.encode_proj", "projection") if c.projection else [])

    return entries


def describe_dpr(c: BertConfig) -> dict[str, Any]:
    return {"projection_dim": 0} | describe_bert(c)


FAMILIES = {
    "bert": HfFamily(
        bert_config, describe_bert, bert_entries, "BertModel", BERT, (("", ""), ("", "bert.")), ignorable=BERT_IGNORABLE
    ),
    "dpr": HfFamily(
        bert_config, describe_dpr, dpr_entries("question_encoder"), "DPRQuestionEncoder", BERT, ignorable=BERT_IGNORABLE
    ),
    "dpr_context": HfFamily(
        bert_config, describe_dpr, dpr_entries("ctx_encoder"), "DPRContextEncoder", BERT, ignorable=BERT_IGNORABLE
    ),
}
