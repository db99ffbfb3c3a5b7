"""Settings of generation: the keys of generation_config.json, which older checkpoints have in config.json."""

from collections.abc import Mapping
from typing import Any

from rag_jax.models.hf.settings import Table, fates, idle, into, only

SEARCH = "how transformers searches, with the same result"
ASSISTANT = idle("of an assistant model, which is given to transformers' generate and not in the checkpoint")

# for encoder-decoders; max_length counts the start token, with which the answer begins, in transformers and here
GENERATION: Table = fates({
    "decoder_start_token_id": into("start_id"),
    "bos_token_id": into("bos_id"),
    "pad_token_id": into("pad_id"),
    "eos_token_id": into("end_ids"),
    "forced_bos_token_id": into("forced_bos_id"),
    "forced_eos_token_id": into("forced_eos_id"),
    "max_length max_new_tokens": into("answering.max_length"),
    "min_length min_new_tokens": into("answering.min_length"),
    "bad_words_ids": into("answering.bad_word_ids"),
    "suppress_tokens": into("answering.suppress_ids"),
    "begin_suppress_tokens": into("answering.begin_suppress_ids"),
    **{key: into(f"answering.{key}") for key in (
        "num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size", "repetition_penalty", "do_sample",
        "temperature", "top_k", "top_p",
    )},
    "num_return_sequences": only(1, why="one answer is given to a question"),
    "num_beam_groups": only(1, why="beams are searched in one group"),
    "diversity_penalty": only(0.0, why="beams are searched in one group"),
    "encoder_no_repeat_ngram_size": only(0, why="what the passage says may be said again"),
    "encoder_repetition_penalty": only(1.0, why="what the passage says may be said again"),
    "typical_p": only(1.0, why="sampling here knows temperature, top_k and top_p"),
    "min_p epsilon_cutoff eta_cutoff": only(0.0, why="sampling here knows temperature, top_k and top_p"),
    "top_h": only(why="sampling here knows temperature, top_k and top_p"),
    "penalty_alpha": only(0.0, why="contrastive search is not built"),
    "dola_layers": only(why="decoding by contrasting layers is not built"),
    "guidance_scale": only(1.0, why="classifier-free guidance is not built"),
    "exponential_decay_length_penalty": only(why="the length is penalised by length_penalty alone"),
    "sequence_bias": only(why="tokens are banned (bad_words) or allowed (allowed_answers), not weighted"),
    "constraints force_words_ids": only([], why="an answer is constrained by allowed_answers"),
    "stop_strings": only([], why="an answer ends with a token, see generator.end_ids"),
    "token_healing": only(False, why="the prompt is never cut within a word here"),
    "watermarking_config": only(why="watermarks are not built"),
    "renormalize_logits": only(False, why="scores of beams are not normalised again after the rules"),
    "max_time": only(why="answers are limited by answering.max_length, not in seconds"),
    "remove_invalid_values": idle("NaN and infinity are an error here"),
    "use_cache cache_implementation cache_config max_cache_len low_memory compile_config disable_compile "
    "continuous_batching_config prefill_chunk_size use_mtp speculation_type": idle(SEARCH),
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate":
        idle("what transformers returns, not what is computed"),
    "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
    "assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight": ASSISTANT,
    "prompt_lookup_num_tokens max_matching_ngram_size": idle(SEARCH),
    "_from_model_config transformers_version _commit_hash _original_object_hash": idle("where the file comes from"),
    "custom_generate": only(why="the model has code of its own, which is never run here"),
})  # fmt: skip

# differences for decoder-only models, where transformers counts the prompt as well
GENERATION_LM: Table = GENERATION | fates({
    "decoder_start_token_id": idle("of encoder-decoders; here generator.bos_id stands before the answer"),
    "max_length": idle("counts the prompt there; answering.max_length counts the answer"),
    "min_length": only(0, why="counts the prompt there; answering.min_length counts the answer"),
    "repetition_penalty": only(1.0, why="counts the prompt there; answering.repetition_penalty counts the answer"),
    "no_repeat_ngram_size": only(0, why="counts the prompt there; answering.no_repeat_ngram_size counts the answer"),
    "forced_bos_token_id": idle("forced at the first position, which is in the prompt"),
})  # fmt: skip

NOT_OF_CONFIGS = ("transformers_version", "_commit_hash", "_from_model_config", "use_cache")


def legacy(table: Table) -> Table:
    """The table for the keys of generation in config.json, where they were before generation_config.json existed."""
    return {key: fate for key, fate in table.items() if key not in NOT_OF_CONFIGS}


LEGACY, LEGACY_LM = legacy(GENERATION), legacy(GENERATION_LM)
LEGACY_ENCODER: Table = dict.fromkeys(LEGACY, idle("an encoder writes nothing"))

TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
# key of generation_config.json -> field of AnswerConfig with the same meaning
SAME = {key: key for key in (
    "num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size", "repetition_penalty", "do_sample",
    "temperature", "top_k", "top_p",
)} | {
    "bad_words_ids": "bad_word_ids", "suppress_tokens": "suppress_ids", "begin_suppress_tokens": "begin_suppress_ids",
}  # fmt: skip
TOP_K = 50  # transformers' default where a file has do_sample but no top_k


def superseded(table: Table) -> Table:
    """The table of a config.json that has a generation_config.json beside it, which overrides its keys of generation.

    The special tokens of config.json stay honoured, since they are used where generation_config.json has none.
    """
    instead = idle("generation_config.json takes its place")
    return table | {key: instead for key in LEGACY if key in table and key not in TOKENS}


def tokens(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config with the special tokens that transformers generates with.

    generation: the content of generation_config.json; None leaves the config as it is. Its tokens override those of the
    config; where it has no start token, its bos token starts; and only the tokens that it forces itself are forced.
    """
    if generation is None:
        return dict(config)
    said = {key: generation[key] for key in TOKENS if generation.get(key) is not None}
    if "decoder_start_token_id" not in said and "bos_token_id" in said:
        said["decoder_start_token_id"] = said["bos_token_id"]
    return {**config, **said, **{key: generation.get(key) for key in FORCED}, "force_bos_token_to_be_generated": None}


def answering(given: Mapping[str, Any], decoder_only: bool) -> dict[str, Any]:
    """The fields of AnswerConfig that generation_config.json, or config.json with its older keys, sets.

    decoder_only: lengths that count the prompt (max_length, min_length) are then left out.
    """
    given = {key: value for key, value in given.items() if value is not None}
    found = {ours: given[key] for key, ours in SAME.items() if key in given}
    if found.get("do_sample"):
        found.setdefault("top_k", TOP_K)
    elif found.get("temperature") == 0:  # some files mean by it that nothing is sampled, which is so without do_sample
        del found["temperature"]
    if "max_new_tokens" in given:
        found["max_length"] = given["max_new_tokens"] + 1  # our length counts the start token, too
    elif "max_length" in given and not decoder_only:
        found["max_length"] = given["max_length"]
    least = max(given.get("min_new_tokens", -1) + 1, 0 if decoder_only else given.get("min_length", 0))
    return found | ({"min_length": least} if least else {})


def changed(given: Mapping[str, Any], now: Mapping[str, Any], decoder_only: bool) -> dict[str, Any]:
    """Keys of generation_config.json for the fields of AnswerConfig that differ from those it had.

    given: the content of the file that the model came with. now: the present fields of AnswerConfig.
    """
    was = answering(given, decoder_only)
    back = {ours: key for key, ours in SAME.items()}
    counts_new = decoder_only or given.get("max_new_tokens") is not None
    back["max_length"] = "max_new_tokens" if counts_new else "max_length"
    back["min_length"] = "min_new_tokens" if decoder_only else "min_length"
    differ = {ours: now.get(ours) for ours in back if now.get(ours) != was.get(ours)}
    return {back[o]: v - 1 if v is not None and back[o].endswith("new_tokens") else v for o, v in differ.items()}


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of generation of a config.json that are not null, as the content of a generation_config.json."""
    return {key: config[key] for key in LEGACY if config.get(key) is not None}
