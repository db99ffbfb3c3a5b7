"""Names and settings of T5 1.0 and 1.1, Flan-T5 and mT5."""

from collections.abc import Container
from dataclasses import replace
from typing import Any

from rag_jax.errors import InputError
from rag_jax.models.hf.generation import LEGACY
from rag_jax.models.hf.naming import (
    Entry,
    HfConfig,
    HfFamily,
    activation,
    dense,
    describe_tokens,
    need,
    norm,
    refuse,
    special_tokens,
    table,
)
from rag_jax.models.hf.settings import COMMON, Table, fates, idle, into, only
from rag_jax.models.t5 import T5Config

T5: Table = COMMON | LEGACY | fates({
    "vocab_size": into("vocab_size"),
    "d_model hidden_size": into("width"),
    "d_kv head_dim": into("head_width"),
    "d_ff": into("hidden"),
    "num_layers num_hidden_layers": into("encoder_layers"),
    "num_decoder_layers": into("decoder_layers"),
    "num_heads num_attention_heads": into("heads"),
    "relative_attention_num_buckets": into("buckets"),
    "relative_attention_max_distance": into("max_distance"),
    "dropout_rate": into("dropout"),
    "layer_norm_epsilon": into("eps"),
    "feed_forward_proj dense_act_fn": into("activation"),
    "is_gated_act": into("gated"),
    "tie_word_embeddings": into("tied"),
    "scale_decoder_outputs": into("logit_scale"),
    "n_positions max_position_embeddings": idle("T5 has no table of positions"),
    "is_encoder_decoder": only(True, why="a generator reads with its encoder"),
    "is_decoder add_cross_attention": only(False, why="a generator reads with its encoder"),
    "prefix": only("", " ", why="no text stands before the passage here"),
})  # fmt: skip


def t5_config(config: HfConfig, where: str) -> T5Config:
    """Our configuration from a T5Config.

    The logits are scaled by width ** -0.5 if scale_decoder_outputs is true or, where that is missing, unless
    tie_word_embeddings is false. Of tie_word_embeddings only false is sure, a head of its own: transformers 5 writes
    true for every T5, so `t5_adapt` looks into the checkpoint.
    """
    refuse(config, where, is_decoder=False, is_encoder_decoder=True)
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    name = config.get("feed_forward_proj", "relu")
    act = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
    config = {
        "num_decoder_layers": config.get("num_layers"),
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "is_gated_act": name.startswith("gated-"),
        **{key: value for key, value in config.items() if value is not None},
    }
    buckets = need(config, "relative_attention_num_buckets", where)
    distance = need(config, "relative_attention_max_distance", where)
    if not 4 <= buckets < 2 * distance:
        raise InputError(
            f"{where}: relative_attention_num_buckets={buckets} for a relative_attention_max_distance of {distance}; "
            "it must be at least 4 and less than twice the distance"
        )
    width = need(config, "d_model", where)
    start = config.get("decoder_start_token_id", config.get("pad_token_id", 0))
    tokens = special_tokens(config, where, start, 0, 1, start)
    return T5Config(
        vocab_size=need(config, "vocab_size", where),
        width=width,
        encoder_layers=need(config, "num_layers", where),
        decoder_layers=need(config, "num_decoder_layers", where),
        heads=need(config, "num_heads", where),
        head_width=need(config, "d_kv", where),
        hidden=need(config, "d_ff", where),
        activation=activation(config, "dense_act_fn", act, where),
        gated=bool(config["is_gated_act"]),
        buckets=buckets,
        max_distance=distance,
        dropout=float(config.get("dropout_rate", 0.1)),
        eps=float(config.get("layer_norm_epsilon", 1e-6)),
        tied=config.get("tie_word_embeddings") is not False,
        logit_scale=width**-0.5 if scaled else 1.0,
        **tokens,
    )


def mt5_config(config: HfConfig, where: str) -> T5Config:
    """Our configuration from an MT5Config: gated by default, and its logits are never scaled."""
    return t5_config({"feed_forward_proj": "gated-gelu"} | dict(config) | {"scale_decoder_outputs": False}, where)


def describe_t5(c: T5Config) -> dict[str, Any]:
    if c.logit_scale not in (1.0, c.width**-0.5):
        raise InputError(f"logit_scale={c.logit_scale}: Hugging Face knows 1 and width ** -0.5 only")
    proj = "gelu" if c.gated and c.activation == "gelu_new" else c.activation
    return {
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "d_kv": c.head_width,
        "d_ff": c.hidden,
        "num_layers": c.encoder_layers,
        "num_decoder_layers": c.decoder_layers,
        "num_heads": c.heads,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "dropout_rate": c.dropout,
        "layer_norm_epsilon": c.eps,
        "feed_forward_proj": f"gated-{proj}" if c.gated else proj,
        "dense_act_fn": c.activation,
        "is_gated_act": c.gated,
        "tie_word_embeddings": c.tied,
        "scale_decoder_outputs": c.logit_scale != 1.0,
        **describe_tokens(c),  # T5 has no bos, but transformers' RAG asks for one
        "is_encoder_decoder": True,
    }


TABLE_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def t5_adapt(c: T5Config, names: Container[str]) -> T5Config:
    """The configuration with `tied` as in the checkpoint: false if it has both a head and a word table.

    A head beside the table counts only where the logits are not scaled, else it is a copy.
    """
    own = "lm_head.weight" in names and any(name in names for name in ("shared.weight", *TABLE_COPIES))
    return replace(c, tied=c.tied and not (c.logit_scale == 1.0 and own))


def t5_entries(c: T5Config) -> list[Entry]:
    entries = table("shared", "shared")
    if not c.tied:
        entries += dense("lm_head", "lm_head", bias=False)
    inner = {"wi_0": "inner", "wi_1": "linear"} if c.gated else {"wi": "inner"}
    for side, layers in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        entries += table(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{side}/relative")
        entries += norm(f"{side}.final_layer_norm", f"{side}/final_norm", bias=False)
        sublayers = [("SelfAttention", "self"), *([("EncDecAttention", "cross")] if side == "decoder" else [])]
        for i in range(layers):
            at, to = f"{side}.block.{i}.layer", f"{side}/layer_{i}"
            for j, (theirs, ours) in enumerate(sublayers):
                for name in ("query", "key", "value", "out"):
                    entries += dense(f"{at}.{j}.{theirs}.{name[0]}", f"{to}/{ours}_attention/{name}", bias=False)
                entries += norm(f"{at}.{j}.layer_norm", f"{to}/{ours}_norm", bias=False)
            last = f"{at}.{len(sublayers)}"
            for theirs, ours in (inner | {"wo": "outer"}).items():
                entries += dense(f"{last}.DenseReluDense.{theirs}", f"{to}/feed_forward/{ours}", bias=False)
            entries += norm(f"{last}.layer_norm", f"{to}/feed_forward_norm", bias=False)
    return entries


def t5_copies(c: T5Config) -> dict[str, str]:
    return dict.fromkeys((*TABLE_COPIES, "lm_head.weight") if c.tied else TABLE_COPIES, "shared.weight")


T5_IGNORABLE = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


FAMILIES = {
    "t5": HfFamily(
        t5_config,
        describe_t5,
        t5_entries,
        "T5ForConditionalGeneration",
        T5,
        copies=t5_copies,
        ignorable=T5_IGNORABLE,
        adapt=t5_adapt,
    ),
    "mt5": HfFamily(
        mt5_config,
        describe_t5,
        t5_entries,
        "MT5ForConditionalGeneration",
        T5,
        copies=t5_copies,
        ignorable=T5_IGNORABLE,
        adapt=t5_adapt,
    ),
}
