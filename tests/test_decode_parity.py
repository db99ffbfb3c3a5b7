"""Decoding token for token against transformers' RAG over random models, documents and options; needs torch."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import rag_jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
pytestmark = pytest.mark.parity
VOCABULARY, B, L = 41, 4, 9
NAMES = {"forced_bos_id": "forced_bos_token_id", "forced_eos_id": "forced_eos_token_id", "bad_words": "bad_words_ids"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Shapes and options of one program; weights, documents and scores are random for every case."""

    variant: str
    docs: int
    width: int
    layers: tuple[int, int]
    heads: int
    start: int
    beams: int
    length: int
    options: tuple[tuple[str, object], ...]


def setting(variant: str, number: int) -> Setting:
    rng = np.random.default_rng([number, variant == "Token"])

    def sometimes(share, *values):
        return values[rng.integers(len(values))] if rng.random() < share else None

    beams, start = int(rng.choice([1, 2, 4, 8])), int(rng.choice([0, 2]))
    length = int(rng.integers(4, 13))
    options = {
        "length_penalty": sometimes(0.6, 0.0, 0.5, 2.0, -1.0),
        "early_stopping": sometimes(0.6, True, "never"),
        "min_length": sometimes(0.3, 3, 5),
        "forced_bos_id": sometimes(0.2, 0),
        "forced_eos_id": sometimes(0.3, 2),
        "bad_words": sometimes(0.25, ((7,), (5, 6), (3, 4, 9)), ((8, 8), (11,)), ((2,), (12, 13), (14,))),
        "repetition_penalty": sometimes(0.25, 1.3, 0.8),
        "no_repeat_ngram_size": sometimes(0.25, 1, 2, 3),
        "num_return_sequences": sometimes(0.3, *range(1, beams + 1)),
    }
    if beams == 1:
        options["length_penalty"] = options["early_stopping"] = None  # these options are for beams
    heads = int(rng.choice([1, 2, 4]))
    return Setting(
        variant, int(rng.choice([1, 2, 3, 5, 10])), heads * int(rng.choice([4, 6, 8])),
        (int(rng.integers(1, 3)), int(rng.integers(1, 4))), heads, start, beams, length,
        tuple((name, value) for name, value in options.items() if value is not None),
    )  # fmt: skip


def theirs(s: Setting, seed: int):
    """A random model of transformers; some of its answers end soon and some never."""
    import torch
    import transformers as hf
    from make_goldens import randomised

    encoder = hf.DPRConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=12,
    )  # fmt: skip
    generator = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=s.width, encoder_layers=s.layers[0], decoder_layers=s.layers[1],
        encoder_attention_heads=s.heads, decoder_attention_heads=s.heads, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_position_embeddings=24, bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=s.start,
        forced_eos_token_id=None,
    )  # fmt: skip
    config = hf.RagConfig.from_question_encoder_generator_configs(
        encoder, generator, n_docs=s.docs, max_combined_length=20
    )
    model = randomised(getattr(hf, f"Rag{s.variant}ForGeneration")(config), seed, scale=0.35)
    with torch.no_grad():
        model.generator.final_logits_bias[0, 2] = float(np.random.default_rng(seed).choice([-3.0, 0.0, 2.0, 4.0]))
    if s.variant == "Sequence":  # 5.23 passes it attention_mask=None, and then padding is attended to
        plain = model.generator.generate
        model.generator.generate = lambda ids, **given: plain(ids, **given | {"attention_mask": (ids != 1).long()})
    return model


def their_answers(s: Setting, model, ids, mask, scores) -> np.ndarray:
    """Transformers' answers [B, N, T]; padding after the end is 1."""
    import torch

    options = {NAMES.get(name, name): value for name, value in s.options}
    if "bad_words_ids" in options:
        options["bad_words_ids"] = [list(word) for word in options["bad_words_ids"]]
    with torch.no_grad():
        answers = model.generate(
            context_input_ids=torch.tensor(ids.reshape(-1, L)).long(),
            context_attention_mask=torch.tensor(mask.reshape(-1, L)).long(),
            doc_scores=torch.tensor(scores),
            n_docs=s.docs,
            num_beams=s.beams,
            max_length=s.length,
            do_sample=False,
            decoder_start_token_id=s.start,
            **options,
        ).numpy()
    padded = np.ones((len(answers), s.length), int)
    padded[:, : answers.shape[1]] = answers
    return padded.reshape(B, -1, s.length)


def inputs(s: Setting, seed: int):
    rng = np.random.default_rng(seed)
    mask = np.arange(L) < rng.integers(2, L + 1, (B, s.docs, 1))
    ids = np.where(mask, rng.integers(3, VOCABULARY, mask.shape), 1)
    return ids.astype(np.int32), mask, rng.normal(0, 1.5, (B, s.docs)).astype(np.float32)


def differences(s: Setting, seeds, tmp_path) -> tuple[int, list]:
    """(questions compared, those whose answers differ); every seed is another model with B other questions."""
    program, compared, different = None, 0, []
    for seed in seeds:
        model = theirs(s, seed)
        model.save_pretrained(tmp_path / str(seed))
        ours, params = rag_jax.from_pretrained(tmp_path / str(seed))
        if program is None:
            generate = partial(ours.generate, num_beams=s.beams, max_length=s.length, hf_compat=True, **dict(s.options))
            program = jax.jit(generate)
        given = inputs(s, seed)
        expected = their_answers(s, model, *given)
        found = program(params, *given)
        sequences = np.asarray(found.sequences).reshape(expected.shape)
        for b in range(B):
            compared += 1
            if not np.array_equal(sequences[b], expected[b]):
                different.append((seed, b, sequences[b].tolist(), expected[b].tolist(), np.asarray(found.scores)[b]))
    return compared, different


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("variant", ["Token", "Sequence"])
def test_the_same_tokens(variant, number, tmp_path):
    s = setting(variant, number)
    compared, different = differences(s, range(2), tmp_path)
    assert compared == 2 * B
    assert not different, (s, different)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["Token", "Sequence"])
def test_hundreds_of_cases(variant, tmp_path):
    """66 settings with 2 models of 4 questions each: 528 questions for a variant, in about six minutes."""
    compared, wrong = 0, []
    for number in range(66):
        s = setting(variant, number)
        count, different = differences(s, range(2), tmp_path / str(number))
        compared, wrong = compared + count, [*wrong, *[(s, case) for case in different]]
    assert compared == 528 and not wrong, wrong
