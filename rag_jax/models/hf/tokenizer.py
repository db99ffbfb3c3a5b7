"""Fates of the settings in tokenizer_config.json and special_tokens_map.json.

transformers loads the tokenizer, so what its class makes of these settings is in the tokenizer.json that is saved here.
"""

from rag_jax.models.hf.settings import Table, fates, idle, into, only

TOKENIZER: Table = fates({
    "tokenizer_class": into("tokenizer"),
    "bos_token eos_token unk_token sep_token pad_token cls_token mask_token additional_special_tokens "
    "extra_special_tokens added_tokens_decoder model_specific_special_tokens": into("tokenizer"),
    "add_bos_token add_eos_token add_prefix_space prepend_scheme do_lower_case do_basic_tokenize strip_accents "
    "tokenize_chinese_chars never_split lowercase trim_offsets legacy legacy_behaviour extra_ids sp_model_kwargs "
    "use_default_system_prompt src_lang tgt_lang language_codes keep_accents remove_space wordpieces_prefix":
        into("tokenizer"),
    "model_max_length": into("model.question_length"),
    "truncation_side": only("right", why="what is too long is cut at its end; of questions see model.question_keeps"),
    "padding_side padding pad_to_multiple_of pad_token_type_id": idle("rows are padded on the right, and masked"),
    "max_length max_len stride truncation truncation_strategy": idle("of a call of transformers; lengths are set here"),
    "clean_up_tokenization_spaces spaces_between_special_tokens": idle("answers are given as their tokens write them"),
    "split_special_tokens": idle("a special token written in a text is always text here"),
    "chat_template": idle("texts are read as they stand, without turns of a chat"),
    "errors": idle("bytes that are no letter are replaced"),
    "model_input_names return_token_type_ids processor_class backend is_local local_files_only fix_mistral_regex":
        idle("what transformers passes on"),
    "name_or_path tokenizer_file vocab_file merges_file special_tokens_map_file added_tokens_file cache_dir "
    "full_tokenizer_file transformers_version _commit_hash": idle("where the file comes from"),
    "auto_map": idle("code of its makers, which is never run here"),
})  # fmt: skip

# A generator reads passage and question joined and truncated here, so two settings of its tokenizer have no effect.
READER: Table = {**TOKENIZER, **fates({
    "truncation_side": idle("of the joined input the passage is cut"),
    "model_max_length": idle("model.source_length says it"),
})}  # fmt: skip
