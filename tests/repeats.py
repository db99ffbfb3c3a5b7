"""Which cases of a parametrised test the default suite runs; the others are slow.

They repeat a draw, or cross options that the cases named here cross with others, and take most of the time.
`pytest -m ''` runs them all. Names are patterns of fnmatch for what stands in a test's brackets.
"""

from collections.abc import Mapping, Sequence

QUICK: Mapping[str, Sequence[str]] = {
    "test_bfloat16.py::test_no_step_sums_bfloat16": ("bart-changes0", "t5-changes1", "llama-changes3", "bart-changes5"),
    "test_bfloat16.py::test_output_layer_for_targets_of_every_probability": ("*-0.0-*", "*-18.0-*"),
    "test_bfloat16.py::test_whole_steps": ("t5",),
    "test_checkpoint_names.py::test_a_tied_table_is_found_under_any_of_its_names": (
        "bart-lm_head", "bart-model.shared", "mbart-model.decoder.embed_tokens", "t5-shared", "t5-lm_head",
        "gpt2-lm_head",
    ),
    "test_decode_parity.py::test_the_same_tokens": ("Sequence-0", "Token-4"),
    "test_encoder_files.py::test_prompts_are_read_before_questions_and_passages": ("cls-True", "mean-False"),
    "test_fused_attention.py::test_decoding_steps_do_not": ("bart-sequence-2", "lm-token-4", "t5-token-4"),
    "test_generation_parity.py::test_the_same_answers": (
        "bart_forced", "bart_suppress", "llama_ends", "mbart_language", "t5_other_start",
    ),
    "test_losses.py::test_a_chunk_of_the_vocabulary_at_a_time_gives_the_same_and_so_does_its_gradient": (
        "*-0.1", "3-1-1-*-0.0",
    ),
    "test_losses.py::test_probabilities_of_all_sequences_sum_to_one": ("3-3",),
    "test_mips.py::test_compiled_program_moves_candidates_only": ("True-*", "False-search-float32"),
    "test_mips.py::test_normaliser_and_its_gradient": (
        "0.1-float32-?", "0.1-int8-8", "0.1-bits-8", "30.0-bfloat16-8", "30.0-bits-0",
    ),
    "test_mips.py::test_results_cut_as_the_batch_is": (
        "8-float32-shape1", "8-int8-shape0", "24-float32-shape0", "24-int8-shape2",
    ),
    "test_live_corpus.py::test_another_index_is_swapped_in_without_compiling": ("int8",),
    "test_models.py::test_rematerialisation_changes_no_gradient": ("Bert-*",),
    "test_parity.py::test_generators": ("*-0",),
    "test_parity.py::test_rag": ("bart-Sequence-0", "t5-Token-0"),
    "test_pretrained.py::test_generators_give_the_numbers_of_torch": (
        "*-float32", "bart-bfloat16", "llama-bfloat16", "t5_gated-bfloat16",
    ),
    "test_pretrained.py::test_gradients_are_those_of_torch": ("rag_sequence", "rag_token_t5"),
    "test_pretrained.py::test_losses_are_those_of_torch": ("rag_sequence", "rag_token_t5"),
    "test_pretrained.py::test_parts_become_one_model_and_parts_again": ("mbart", "gpt2", "t5_gated"),
    "test_pretrained.py::test_rag_goes_there_and_back": ("True-rag_sequence", "False-rag_token_t5"),
    "test_pretrained.py::test_random_damage_is_never_a_model": ("0", "1", "2", "3"),
    "test_rag.py::test_any_generator_answers": ("lm-3",),
    "test_rag.py::test_rag_sequence_answers_by_candidates": ("1-thorough", "3-fast"),
    "test_rag_decode.py::test_candidates_are_scored_as_by_the_whole_forward_pass": (
        "1-3-lm", "3-4-t5", "9-100-bart",
    ),
    "test_rag_decode.py::test_candidates_that_cannot_win_are_not_scored": ("eos-1",),
    "test_rag_decode.py::test_documents_in_chunks_are_documents_at_once": (
        "sequence-thorough-3", "sequence-fast-1", "token-thorough-1",
    ),
    "test_rag_decode.py::test_one_device_is_eight": ("sequence-thorough",),
    "test_rag_decode.py::test_only_allowed_answers": ("sequence",),
    "test_rag_decode.py::test_samples_are_those_of_their_key": ("token",),
    "test_rag_decode.py::test_scores_are_the_likelihood_of_the_answers": ("sequence-lm", "sequence-t5", "token-bart"),
    "test_rag_decode.py::test_thorough_with_one_document_is_plain_beam_search": ("t5",),
    "test_settings.py::test_settings_go_there_and_back": ("bart*", "gpt2", "llama", "many", "mt5", "t5"),
}  # fmt: skip
