"""Names and settings of decoder-only models: GPT-2, Llama, Mistral, Qwen2."""

from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

from rag_jax.errors import InputError
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf.generation import LEGACY_LM
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

ROPE: Table = fates({
    "rope_type type": into("rope_scaling"),
    "rope_theta": into("rope_theta"),
    "factor": into("rope_factor"),
    "low_freq_factor": into("rope_low"),
    "high_freq_factor": into("rope_high"),
    "original_max_position_embeddings": into("rope_original"),
    "partial_rotary_factor": only(1.0, why="whole heads are rotated"),
})  # fmt: skip
DECODER_ONLY: Table = COMMON | LEGACY_LM | fates({
    "is_encoder_decoder": only(False, why="passage and answer go through one stack"),
    "is_decoder": idle("a decoder in any case"),
    "add_cross_attention": only(False, why="the passage is the prompt"),
    "prefix": only("", why="no text stands before the passage here"),
})  # fmt: skip
GPT2: Table = DECODER_ONLY | fates({
    "vocab_size": into("vocab_size"),
    "n_embd hidden_size": into("width"),
    "n_layer num_hidden_layers": into("layers"),
    "n_head num_attention_heads": into("heads"),
    "n_inner": into("hidden"),
    "n_positions n_ctx max_position_embeddings": into("positions"),
    "activation_function": into("activation"),
    "resid_pdrop embd_pdrop": into("dropout"),
    "attn_pdrop": into("attention_dropout"),
    "layer_norm_epsilon": into("eps"),
    "scale_attn_weights": only(True, why="scores are divided by the square root of a head's width"),
    "scale_attn_by_inverse_layer_idx": only(False, why="scores are scaled alike in all layers"),
    "reorder_and_upcast_attn": idle("the order of operations, not their result"),
    "tie_word_embeddings": only(True, why="the head is the table of the tokens"),
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout":
        idle("of a head for classification, which is not read"),
    "predict_special_tokens": idle("of OpenAI GPT, which GPT-2's configuration kept"),
})  # fmt: skip
LLAMA: Table = DECODER_ONLY | fates({
    "vocab_size": into("vocab_size"),
    "hidden_size": into("width"),
    "num_hidden_layers": into("layers"),
    "num_attention_heads": into("heads"),
    "num_key_value_heads": into("groups"),
    "head_dim": into("head_width"),
    "intermediate_size": into("hidden"),
    "max_position_embeddings": into("positions"),
    "attention_dropout": into("attention_dropout"),
    "rms_norm_eps": into("eps"),
    "hidden_act": into("activation"),
    "rope_theta": into("rope_theta"),
    "rope_scaling rope_parameters": into("rope_scaling", ROPE),
    "original_max_position_embeddings": into("rope_original"),
    "partial_rotary_factor": only(1.0, why="whole heads are rotated"),
    "rope_interleaved": only(False, why="a head's halves are rotated against each other"),
    "attention_bias": into("qkv_bias"),
    "mlp_bias": into("mlp_bias"),
    "tie_word_embeddings": into("tied"),
    "layer_types": into("window"),
    "pretraining_tp": idle("the order of operations, not their result"),
    "is_llama_config max_sequence_length": idle("a note of its makers"),
})  # fmt: skip
MISTRAL: Table = LLAMA | fates({
    "sliding_window": into("window"),
    "attention_bias mlp_bias": only(False, why="Mistral has no biases"),
})  # fmt: skip
QWEN2: Table = LLAMA | fates({
    "sliding_window use_sliding_window max_window_layers": into("window"),
    "attention_bias": only(True, why="Qwen2 has biases on queries, keys and values"),
    "mlp_bias": only(False, why="Qwen2 has no biases there"),
    "use_mrope": only(False, why="positions are those of text"),
})  # fmt: skip


def lm_tokens(config: HfConfig, where: str, bos: int | None, eos: int | None) -> dict[str, Any]:
    """The special tokens of a decoder-only model; those that are null are the end token.

    bos, eos: the ids where the config has no such key. bos stands between the prompt and the answer.
    """
    config = {"bos_token_id": bos, "eos_token_id": eos} | dict(config)
    ends = config["eos_token_id"]
    if ends in (None, []):
        raise InputError(f"{where}: eos_token_id is missing; it must be given, as int")
    end = ends[0] if isinstance(ends, list) else ends
    config |= {"decoder_start_token_id": None, "forced_bos_token_id": None}  # for encoder-decoders alone
    return special_tokens(config, where, end, end, end, NONE)


def describe_lm_tokens(c: LmConfig) -> dict[str, Any]:
    said = describe_tokens(c)
    del said["decoder_start_token_id"], said["forced_bos_token_id"]
    return said if c.forced_eos_id != NONE else {k: v for k, v in said.items() if k != "forced_eos_token_id"}


def gpt2_config(config: HfConfig, where: str) -> LmConfig:
    dropout = config.get("resid_pdrop", 0.1)
    refuse(
        config,
        where,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
        embd_pdrop=dropout,
    )
    width = need(config, "n_embd", where)
    tokens = lm_tokens(config, where, 50256, 50256)
    return LmConfig(
        vocab_size=need(config, "vocab_size", where),
        width=width,
        layers=need(config, "n_layer", where),
        heads=need(config, "n_head", where),
        hidden=4 * width if config.get("n_inner") is None else need(config, "n_inner", where),
        positions=need(config, "n_positions", where),
        dropout=float(dropout),
        attention_dropout=float(config.get("attn_pdrop", 0.1)),
        eps=float(config.get("layer_norm_epsilon", 1e-5)),
        activation=activation(config, "activation_function", "gelu_new", where),
        **tokens,
    )


def rope(config: HfConfig, where: str) -> dict[str, Any]:
    """Our fields of the rotary position embedding, from rope_parameters or, before transformers 5, rope_theta and
    rope_scaling.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise InputError(f"{where}: rope_parameters that differ from layer to layer are not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"{where}: rope_type={kind!r} is not supported; known: default, linear, llama3")
    for settings in (config, given):
        refuse(settings, where, partial_rotary_factor=1.0)
    theta: Any = given.get("rope_theta", config.get("rope_theta"))
    found: dict[str, Any] = {"rope_theta": 10_000.0 if theta is None else float(theta)}
    if kind == "default":
        return found
    found |= {"rope_scaling": kind, "rope_factor": float(need(given, "factor", where, Real))}
    if kind == "llama3":
        key = "original_max_position_embeddings"
        settings = {key: need(config, "max_position_embeddings", where)} | dict(given)
        found["rope_low"] = float(need(given, "low_freq_factor", where, Real))
        found["rope_high"] = float(need(given, "high_freq_factor", where, Real))
        found["rope_original"] = need(config if key in config else settings, key, where)
    return found


def llama_config(config: HfConfig, where: str) -> LmConfig:
    """Our configuration from a LlamaConfig, or from another config that was put into its keys."""
    if other := sorted(set(config.get("layer_types") or ()) - {"full_attention"}):
        raise InputError(f"{where}: layer_types {', '.join(other)} are not supported; full_attention is")
    biased = bool(config.get("attention_bias", False))
    tokens = lm_tokens(config, where, 1, 2)
    return LmConfig(
        vocab_size=need(config, "vocab_size", where),
        width=need(config, "hidden_size", where),
        layers=need(config, "num_hidden_layers", where),
        heads=need(config, "num_attention_heads", where),
        groups=config.get("num_key_value_heads") or 0,
        head_width=config.get("head_dim") or 0,
        hidden=need(config, "intermediate_size", where),
        positions=need(config, "max_position_embeddings", where),
        dropout=0.0,
        attention_dropout=float(config.get("attention_dropout") or 0.0),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=activation(config, "hidden_act", "silu", where),
        gated=True,
        norm_kind="rms",
        position_kind="rotary",
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied=bool(config.get("tie_word_embeddings", False)),
        **tokens,
        **rope(config, where),
    )


def mistral_config(config: HfConfig, where: str) -> LmConfig:
    biases = {"attention_bias": False, "mlp_bias": False}
    c = llama_config({"num_key_value_heads": 8} | dict(config) | biases, where)
    return replace(c, window=config.get("sliding_window", 4096) or 0)


def qwen2_config(config: HfConfig, where: str) -> LmConfig:
    types = config.get("layer_types")
    first = config.get("max_window_layers", 28)  # the first layer with a window, where no types are given
    if other := sorted(set(types or ()) - {"full_attention", "sliding_attention"}):
        raise InputError(f"{where}: layer_types {', '.join(other)} are not supported; full_attention is")
    slides = "sliding_attention" in types if types else first < need(config, "num_hidden_layers", where)
    slides = slides and bool(config.get("use_sliding_window", False))
    defaults = {"num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None}
    biases = {"attention_bias": True, "mlp_bias": False}
    c = llama_config(defaults | dict(config) | biases | {"layer_types": None}, where)
    return replace(c, out_bias=False, window=config.get("sliding_window", 4096) or 0 if slides else 0)


def lm_family(c: LmConfig) -> str:
    """The family (a key of GENERATORS) as which a generator can be exported; InputError where there is none."""
    form, biases = (c.norm_kind, c.position_kind, c.gated), (c.qkv_bias, c.out_bias, c.mlp_bias)
    even = c.groups in (0, c.heads) and c.head_width * c.heads in (0, c.width)
    if c.logit_scale == 1.0:
        if form == ("layer", "learned", False) and all(biases) and c.tied and even:
            return "gpt2"
        if form == ("rms", "rotary", True) and c.qkv_bias == c.out_bias:
            return "mistral" if c.window else "llama"
        if form == ("rms", "rotary", True) and biases == (True, False, False):
            return "qwen2"
    raise InputError(
        "Hugging Face has no decoder with these settings together; those of GPT-2, Llama and Qwen2 can be exported"
    )


def check_form(c: LmConfig, *families: str) -> None:
    """Raises InputError if the generator cannot be exported as one of these families."""
    if lm_family(c) not in families:
        raise InputError(f"this generator has the form of {lm_family(c)}, not of {families[0]}")


def describe_gpt2(c: LmConfig) -> dict[str, Any]:
    check_form(c, "gpt2")
    return {
        "vocab_size": c.vocab_size,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "n_positions": c.positions,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
        "layer_norm_epsilon": c.eps,
        "activation_function": c.activation,
        **describe_lm_tokens(c),
        "tie_word_embeddings": True,
    }


def describe_rotary(c: LmConfig) -> dict[str, Any]:
    """The keys of config.json that Llama, Mistral and Qwen2 share.

    Rotary positions are written under both names, for transformers before and after version 5.
    """
    scaling: dict[str, Any] = {"rope_type": "default" if c.rope_scaling == "none" else c.rope_scaling}
    if c.rope_scaling != "none":
        scaling["factor"] = c.rope_factor
    if c.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": c.rope_low,
            "high_freq_factor": c.rope_high,
            "original_max_position_embeddings": c.rope_original,
        }
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.groups or c.heads,
        "head_dim": c.head_width or c.width // c.heads,
        "intermediate_size": c.hidden,
        "max_position_embeddings": c.positions,
        "attention_dropout": c.attention_dropout,
        "rms_norm_eps": c.eps,
        "hidden_act": c.activation,
        "rope_theta": c.rope_theta,
        "rope_scaling": None if c.rope_scaling == "none" else scaling,
        "rope_parameters": scaling | {"rope_theta": c.rope_theta},
        **describe_lm_tokens(c),
        "tie_word_embeddings": c.tied,
    }


def describe_llama(c: LmConfig) -> dict[str, Any]:
    check_form(c, "llama")
    return describe_rotary(c) | {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def describe_mistral(c: LmConfig) -> dict[str, Any]:
    check_form(c, "llama", "mistral")
    if c.qkv_bias or c.mlp_bias:
        raise InputError("Mistral has no biases; this generator can be exported as llama")
    return describe_rotary(c) | {"sliding_window": c.window or None}


def describe_qwen2(c: LmConfig) -> dict[str, Any]:
    check_form(c, "qwen2")
    window = {"sliding_window": c.window, "max_window_layers": 0} if c.window else {}
    return describe_rotary(c) | {"use_sliding_window": bool(c.window)} | window


def gpt2_entries(c: LmConfig) -> list[Entry]:
    def conv(theirs: str, *ours: str) -> list[Entry]:
        """Entries of a Conv1D, whose weight is [in, out], as here; with several paths, they are concatenated in it."""
        return [
            Entry(f"{theirs}.{name}", tuple(f"{path}/{leaf}" for path in ours))
            for name, leaf in (("weight", "kernel"), ("bias", "bias"))
        ]

    entries = [*table("wte", "token"), *table("wpe", "position"), *norm("ln_f", "final_norm")]
    for i in range(c.layers):
        at, to = f"h.{i}", f"layer_{i}"
        entries += norm(f"{at}.ln_1", f"{to}/attention_norm")
        entries += conv(f"{at}.attn.c_attn", *(f"{to}/attention/{name}" for name in ("query", "key", "value")))
        entries += conv(f"{at}.attn.c_proj", f"{to}/attention/out")
        entries += norm(f"{at}.ln_2", f"{to}/feed_forward_norm")
        entries += conv(f"{at}.mlp.c_fc", f"{to}/feed_forward/inner")
        entries += conv(f"{at}.mlp.c_proj", f"{to}/feed_forward/outer")
    return entries


def llama_entries(c: LmConfig) -> list[Entry]:
    entries = [*table("model.embed_tokens", "token"), *norm("model.norm", "final_norm", bias=False)]
    if not c.tied:
        entries += dense("lm_head", "lm_head", bias=False)
    for i in range(c.layers):
        at, to = f"model.layers.{i}", f"layer_{i}"
        entries += norm(f"{at}.input_layernorm", f"{to}/attention_norm", bias=False)
        for name in ("query", "key", "value"):
            entries += dense(f"{at}.self_attn.{name[0]}_proj", f"{to}/attention/{name}", c.qkv_bias)
        entries += dense(f"{at}.self_attn.o_proj", f"{to}/attention/out", c.out_bias)
        entries += norm(f"{at}.post_attention_layernorm", f"{to}/feed_forward_norm", bias=False)
        for theirs, ours in (("gate", "inner"), ("up", "linear"), ("down", "outer")):
            entries += dense(f"{at}.mlp.{theirs}_proj", f"{to}/feed_forward/{ours}", c.mlp_bias)
    return entries


def llama_copies(c: LmConfig) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if c.tied else {}


ROTARY_IGNORABLE = (r"(.*\.)?rotary_emb\.inv_freq",)  # computed from the configuration


FAMILIES = {
    "gpt2": HfFamily(
        gpt2_config,
        describe_gpt2,
        gpt2_entries,
        "GPT2LMHeadModel",
        GPT2,
        (("", "transformer."), ("", "")),
        copies=lambda config: {"lm_head.weight": "wte.weight"},
        ignorable=(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",),
    ),
    "llama": HfFamily(
        llama_config,
        describe_llama,
        llama_entries,
        "LlamaForCausalLM",
        LLAMA,
        copies=llama_copies,
        ignorable=ROTARY_IGNORABLE,
    ),
    "mistral": HfFamily(
        mistral_config,
        describe_mistral,
        llama_entries,
        "MistralForCausalLM",
        MISTRAL,
        copies=llama_copies,
        ignorable=ROTARY_IGNORABLE,
    ),
    "qwen2": HfFamily(
        qwen2_config,
        describe_qwen2,
        llama_entries,
        "Qwen2ForCausalLM",
        QWEN2,
        copies=llama_copies,
        ignorable=ROTARY_IGNORABLE,
    ),
}
