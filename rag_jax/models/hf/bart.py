"""Names and settings of BART and mBART."""

import math
from typing import Any

from rag_jax.errors import InputError
from rag_jax.models.bart import BartConfig
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
from rag_jax.models.special_tokens import NONE

BART: Table = COMMON | LEGACY | fates({
    "vocab_size": into("vocab_size"),
    "d_model hidden_size": into("width"),
    "encoder_layers num_hidden_layers": into("encoder_layers"),
    "decoder_layers": into("decoder_layers"),
    "encoder_attention_heads decoder_attention_heads num_attention_heads": into("heads"),
    "encoder_ffn_dim decoder_ffn_dim": into("hidden"),
    "max_position_embeddings": into("positions"),
    "dropout": into("dropout"),
    "attention_dropout": into("attention_dropout"),
    "activation_dropout": into("activation_dropout"),
    "encoder_layerdrop decoder_layerdrop": only(0.0, why="layers are not dropped in training here"),
    "activation_function": into("activation"),
    "scale_embedding": into("embedding_scale"),
    "normalize_before add_final_layer_norm": only(False, why="BART norms after each sublayer; mBART before"),
    "normalize_embedding": only(True, why="embeddings are normed in BART and mBART"),
    "add_bias_logits": only(False, why="the bias of the logits is final_logits_bias"),
    "static_position_embeddings": only(False, why="positions are learned"),
    "extra_pos_embeddings": only(2, why="two rows of the position tables are unused"),
    "tie_word_embeddings": only(True, why="the head is the table of the tokens"),
    "is_encoder_decoder": only(True, why="a generator reads with its encoder"),
    "is_decoder add_cross_attention": only(False, why="a generator reads with its encoder"),
    "force_bos_token_to_be_generated": into("forced_bos_id"),
    "prefix": only("", " ", why="no text stands before the passage here"),
    "student_encoder_layers student_decoder_layers save_step total_flos replacing_rate":
        idle("how it was trained"),
})  # fmt: skip
MBART: Table = BART | fates({
    "normalize_before add_final_layer_norm": idle("mBART norms before each sublayer in any case"),
})  # fmt: skip


def bart_config(config: HfConfig, where: str, pre: bool = False) -> BartConfig:
    """Our configuration from a BartConfig or, with `pre`, an MBartConfig.

    pre: LayerNorm before each sublayer. Where the config has no start token, BART's decoder starts with eos.
    """
    heads = need(config, "encoder_attention_heads", where)
    hidden = need(config, "encoder_ffn_dim", where)
    refuse(config, where, decoder_attention_heads=heads, decoder_ffn_dim=hidden)
    width = need(config, "d_model", where)
    tokens = special_tokens(config, where, 0, 1, 2, NONE)
    if tokens["start_id"] == NONE and not pre:
        tokens["start_id"] = tokens["eos_id"]
    return BartConfig(
        vocab_size=need(config, "vocab_size", where),
        width=width,
        encoder_layers=need(config, "encoder_layers", where),
        decoder_layers=need(config, "decoder_layers", where),
        heads=heads,
        hidden=hidden,
        positions=need(config, "max_position_embeddings", where),
        dropout=float(config.get("dropout", 0.1)),
        attention_dropout=float(config.get("attention_dropout", 0.0)),
        activation=activation(config, "activation_function", "gelu", where),
        norm="pre" if pre else "post",
        embedding_scale=math.sqrt(width) if config.get("scale_embedding", False) else 1.0,
        activation_dropout=float(config.get("activation_dropout") or 0.0),
        **tokens,
    )


def mbart_config(config: HfConfig, where: str) -> BartConfig:
    return bart_config(config, where, pre=True)


def describe_bart(c: BartConfig) -> dict[str, Any]:
    if c.embedding_scale not in (1.0, math.sqrt(c.width)):
        raise InputError(f"embedding_scale={c.embedding_scale}: Hugging Face knows 1 and sqrt(width) only")
    return {
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "encoder_layers": c.encoder_layers,
        "decoder_layers": c.decoder_layers,
        "encoder_attention_heads": c.heads,
        "decoder_attention_heads": c.heads,
        "encoder_ffn_dim": c.hidden,
        "decoder_ffn_dim": c.hidden,
        "max_position_embeddings": c.positions,
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "activation_function": c.activation,
        "scale_embedding": c.embedding_scale != 1.0,
        "activation_dropout": c.activation_dropout,
        **describe_tokens(c),
        "is_encoder_decoder": True,
    }


def bart_entries(c: BartConfig) -> list[Entry]:
    entries = [Entry("final_logits_bias", ("logits_bias",), "row"), *table("model.shared", "shared")]
    for side, layers in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        entries += table(f"model.{side}.embed_positions", f"{side}/position")
        entries += norm(f"model.{side}.layernorm_embedding", f"{side}/embedding_norm")
        if c.norm == "pre":
            entries += norm(f"model.{side}.layer_norm", f"{side}/final_norm")
        for i in range(layers):
            at, to = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            for theirs, ours in (("self_attn", "self"), ("encoder_attn", "cross")):
                if ours == "cross" and side == "encoder":
                    continue
                for name in ("query", "key", "value", "out"):
                    short = "out" if name == "out" else name[0]
                    entries += dense(f"{at}.{theirs}.{short}_proj", f"{to}/{ours}_attention/{name}")
                entries += norm(f"{at}.{theirs}_layer_norm", f"{to}/{ours}_norm")
            entries += dense(f"{at}.fc1", f"{to}/feed_forward/inner")
            entries += dense(f"{at}.fc2", f"{to}/feed_forward/outer")
            entries += norm(f"{at}.final_layer_norm", f"{to}/feed_forward_norm")
    return entries


def without_logit_scale(config: Any, path: str, parameter: Any) -> Any:
    """A parameter of the equivalent generator without logit_scale, for which Hugging Face's BART has no setting.

    The factor goes into scale and bias of the decoder's last LayerNorm, whose output the logits are linear in.
    """
    if not isinstance(config, BartConfig) or config.logit_scale == 1.0:
        return parameter
    if config.norm == "pre":
        last = "decoder/final_norm"
    elif config.decoder_layers:
        last = f"decoder/layer_{config.decoder_layers - 1}/feed_forward_norm"
    else:
        last = "decoder/embedding_norm"
    return parameter * config.logit_scale if path.rpartition("/")[0] == last else parameter


def bart_copies(_config: BartConfig) -> dict[str, str]:
    return dict.fromkeys(
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
        "model.shared.weight",
    )


BART_SPELLINGS = (("", ""), ("model.", ""))  # a checkpoint saved without its head has no prefix "model."


FAMILIES = {
    "bart": HfFamily(
        bart_config,
        describe_bart,
        bart_entries,
        "BartForConditionalGeneration",
        BART,
        spellings=BART_SPELLINGS,
        copies=bart_copies,
        ignorable=(r"(model\.)?(en|de)coder\.version",),
        zeros=("final_logits_bias",),
    ),
    "mbart": HfFamily(
        mbart_config,
        describe_bart,
        bart_entries,
        "MBartForConditionalGeneration",
        MBART,
        spellings=BART_SPELLINGS,
        copies=bart_copies,
        ignorable=(r"(model\.)?(en|de)coder\.version",),
        zeros=("final_logits_bias",),
    ),
}
