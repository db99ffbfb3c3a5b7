"""Answers equal those of transformers' generate token by token, with the checkpoint's own settings."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rag_jax.inference import pipeline
from rag_jax.inference.config import AnswerConfig
from rag_jax.pretrained.combine import combine
from rag_jax.pretrained.weights import WeightReport
from rag_jax.rag import Rag
from rag_jax.system import configuration, sharding

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
pytestmark = pytest.mark.parity
VOCABULARY, L, QUESTIONS = 41, 9, 6

STACKS = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 40,
}  # fmt: skip
ROTARY = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 48, "bos_token_id": 0,
    "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48, "bos_token_id": 0,
        "pad_token_id": 1, "eos_token_id": 2}  # fmt: skip
TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
ENDS = {"eos_token_id": [2, 5, 9, 14]}
MODELS = {
    "bart": ("BartForConditionalGeneration", "BartConfig", STACKS),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", STACKS),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", ROTARY),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", ROTARY),
}
CASES = {
    "bart_plain": ("bart", TOKENS | {"decoder_start_token_id": 2, "forced_eos_token_id": 2, "max_length": 8}),
    "bart_forced": ("bart", TOKENS | {"decoder_start_token_id": 2, "forced_bos_token_id": 0, "num_beams": 3,
                    "max_length": 9, "length_penalty": 2.0, "no_repeat_ngram_size": 2}),
    "bart_ends": ("bart", TOKENS | ENDS | {"decoder_start_token_id": 3, "num_beams": 4, "early_stopping": True,
                  "max_new_tokens": 9, "min_length": 4}),
    "bart_suppress": ("bart", TOKENS | {"decoder_start_token_id": 2, "forced_bos_token_id": 7, "max_length": 9,
                      "suppress_tokens": list(range(20, 30)), "begin_suppress_tokens": list(range(10, 20)),
                      "bad_words_ids": [[31], [4, 6]]}),
    "mbart_language": ("mbart", TOKENS | {"decoder_start_token_id": 7, "forced_eos_token_id": 2, "num_beams": 2,
                       "max_length": 7}),
    "mbart_forced": ("mbart", TOKENS | {"decoder_start_token_id": 2, "forced_bos_token_id": 11, "max_length": 9}),
    "t5_other_start": ("t5", TOKENS | {"decoder_start_token_id": 3, "max_length": 8, "repetition_penalty": 1.4}),
    "t5_beams": ("t5", ENDS | {"decoder_start_token_id": 1, "pad_token_id": 1, "num_beams": 3, "max_length": 9,
                 "early_stopping": "never"}),
    "gpt2_ends": ("gpt2", TOKENS | ENDS | {"max_new_tokens": 9}),
    "gpt2_beams": ("gpt2", TOKENS | ENDS | {"max_new_tokens": 9, "num_beams": 3, "min_new_tokens": 3}),
    "llama_ends": ("llama", TOKENS | ENDS | {"max_new_tokens": 9, "forced_eos_token_id": 2}),
    "qwen2_beams": ("qwen2", TOKENS | {"eos_token_id": [6, 2], "max_new_tokens": 7, "num_beams": 4}),
}  # fmt: skip


def answers_of_both(case: str, directory: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Transformers' answers and ours [QUESTIONS, T] after the start token; padding after an end is 1."""
    import torch
    import transformers as hf
    from make_goldens import randomised

    name, said = CASES[case]
    model, of, values = MODELS[name]
    theirs = randomised(getattr(hf, model)(getattr(hf, of)(**values)), seed, scale=0.35)
    theirs.save_pretrained(directory / "generator")
    (directory / "generator/generation_config.json").write_text(json.dumps(said))
    encoder = hf.BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    hf.BertModel(encoder, add_pooling_layer=False).save_pretrained(directory / "encoder")
    theirs = type(theirs).from_pretrained(directory / "generator").eval()
    rng = np.random.default_rng(seed)
    mask = np.arange(L) < rng.integers(3, L + 1, (QUESTIONS, 1))
    ids = np.where(mask, rng.integers(15, VOCABULARY, mask.shape), 1).astype(np.int32)

    source = combine(directory / "encoder", generator=directory / "generator", variant="sequence")
    params = dict(source.params(sharding.make_mesh(), WeightReport()).items())
    cfg = configuration.build(AnswerConfig, source.answering)
    options = pipeline.options_of(cfg, None) | {"mode": "fast", "candidates": 1}  # of one document: its own search

    def generate(params, ids, mask):
        scores = np.zeros((QUESTIONS, 1), np.float32)
        return Rag(source.model).generate(params, ids[:, None], mask[:, None], scores, **options).sequences

    ours = np.asarray(jax.jit(generate)(params, ids, mask))[:, 1:]
    expected = np.ones_like(ours)
    for row, length in enumerate(mask.sum(1)):
        given, both = ids[row, :length].tolist(), theirs.config.is_encoder_decoder
        given += [] if both else [source.model.reader.start_id]
        with torch.no_grad():
            found = theirs.generate(input_ids=torch.tensor([given]))[0].tolist()
        found = found[1:] if both else found[len(given) :]
        expected[row, : len(found)] = found
    return expected, ours


@pytest.mark.parametrize("case", CASES)
def test_the_same_answers(tmp_path, case):
    expected, ours = answers_of_both(case, tmp_path, seed=1)
    np.testing.assert_array_equal(ours, expected)
    assert len(np.unique(expected, axis=0)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("case", CASES)
def test_the_same_answers_of_more_models(tmp_path, case, seed):
    np.testing.assert_array_equal(*answers_of_both(case, tmp_path, seed))
