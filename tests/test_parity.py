"""Comparison with transformers over random shapes, converted and exported; needs torch (extra `parity`)."""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import rag_jax
from rag_jax.__main__ import main
from rag_jax.errors import InputError
from rag_jax.models.hf.bart import bart_copies
from rag_jax.pretrained.combine import combine
from rag_jax.pretrained.parts import generator_part
from rag_jax.pretrained.weights import WeightReport
from rag_jax.rag import Rag
from rag_jax.system import sharding

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
pytestmark = pytest.mark.parity
VOCABULARY, B, L, T = 37, 2, 8, 6


def config_of(family: str, rng: np.random.Generator):
    """A small random configuration of transformers."""
    import transformers as hf

    heads = int(rng.choice([1, 2, 4]))
    width = heads * int(rng.choice([4, 6, 8]))
    layers, decoder_layers = (int(n) for n in rng.integers(1, 4, 2))
    hidden = int(rng.integers(8, 32))
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    if family in ("bart", "mbart"):
        kind = {"bart": hf.BartConfig, "mbart": hf.MBartConfig}[family]
        return kind(
            **ids, d_model=width, encoder_layers=layers, decoder_layers=decoder_layers, encoder_attention_heads=heads,
            decoder_attention_heads=heads, encoder_ffn_dim=hidden, decoder_ffn_dim=hidden, max_position_embeddings=24,
            decoder_start_token_id=2, scale_embedding=bool(rng.integers(2)),
            activation_function=str(rng.choice(["gelu", "relu", "silu", "gelu_new"])),
        )  # fmt: skip
    if family == "t5":  # with fewer decoder than encoder layers, transformers' RAG cannot reorder its cache
        decoder_layers = max(layers, decoder_layers)
        return hf.T5Config(
            **ids | {"pad_token_id": 0}, d_model=width, d_kv=int(rng.integers(2, 9)), d_ff=hidden, num_layers=layers,
            num_decoder_layers=decoder_layers, num_heads=heads, decoder_start_token_id=0,
            relative_attention_num_buckets=8, relative_attention_max_distance=10,
            feed_forward_proj=str(rng.choice(["relu", "gated-gelu", "gated-silu"])),
        )  # fmt: skip
    if family == "gpt2":
        return hf.GPT2Config(**ids, n_embd=width, n_layer=layers, n_head=heads, n_positions=24, n_inner=hidden)
    groups = int(rng.choice([g for g in (1, 2, 4) if heads % g == 0]))
    shape = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": hidden,
        "num_key_value_heads": groups, "max_position_embeddings": 24, "tie_word_embeddings": bool(rng.integers(2)),
    }  # fmt: skip
    if family == "qwen2":
        return hf.Qwen2Config(**ids, **shape)
    return hf.LlamaConfig(**ids, **shape, attention_bias=bool(rng.integers(2)), mlp_bias=bool(rng.integers(2)))


def model_of(config, seed: int):
    import transformers as hf
    from make_goldens import randomised

    automatic = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    return randomised(automatic.from_config(config), seed, scale=0.2)


def their_logits(model, ids, mask, target):
    import torch

    def long(x):
        return torch.tensor(x).long()

    with torch.no_grad():
        if model.config.is_encoder_decoder:
            given = {"input_ids": long(ids), "attention_mask": long(mask), "decoder_input_ids": long(target)}
            return model(**given).logits.numpy()
        rows = []
        for row, length, answer in zip(ids, mask.sum(1), target, strict=True):
            whole = long(np.concatenate([row[:length], answer]))[None]
            rows.append(model(input_ids=whole).logits[0, length:].numpy())
        return np.stack(rows)


def same_files(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["bart", "mbart", "t5", "gpt2", "llama", "qwen2"])
def test_generators(tmp_path, family, seed):
    """Equal logits; the export has the same tensors, and transformers reads all of it with equal logits."""
    import transformers as hf

    rng = np.random.default_rng(seed)
    theirs = model_of(config_of(family, rng), seed)
    theirs.save_pretrained(tmp_path / "theirs")
    part = generator_part(tmp_path / "theirs")
    encoder = hf.BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    hf.BertModel(encoder, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    source = combine(tmp_path / "encoder", generator=tmp_path / "theirs")
    rag = Rag(source.model)
    report = WeightReport()
    params = dict(source.params(sharding.make_mesh(), report).items())
    assert len(report.loaded) == len(load_file(tmp_path / "theirs/model.safetensors")) + len(
        load_file(tmp_path / "encoder/model.safetensors")
    )
    mask = np.arange(L) < np.array([L, int(rng.integers(2, L))])[:, None]
    ids = np.where(mask, rng.integers(3, VOCABULARY, (B, L)), part.config.pad_id)
    target = rng.integers(3, VOCABULARY, (B, T))
    found = jax.jit(rag.generator.apply)({"params": params["generator"]}, ids, mask, target)
    expected = their_logits(theirs, ids, mask, target)
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)
    rag_jax.save_pretrained(tmp_path / "back", rag, params, part="generator")
    same_files(tmp_path / "theirs", tmp_path / "back")
    again, loading = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values()), loading
    np.testing.assert_array_equal(their_logits(again.eval(), ids, mask, target), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", ["Sequence", "Token"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_rag(tmp_path, family, variant, seed):
    """Equal losses; after conversion and export, transformers gives the same losses and answers."""
    import torch
    import transformers as hf
    from make_goldens import randomised

    rng = np.random.default_rng(seed)
    heads, K = int(rng.choice([1, 2])), int(rng.integers(1, 5))
    encoder = hf.DPRConfig(
        vocab_size=VOCABULARY, hidden_size=4 * heads, num_hidden_layers=int(rng.integers(1, 3)),
        num_attention_heads=heads, intermediate_size=8, max_position_embeddings=12,
        projection_dim=int(rng.choice([0, 6])),
    )  # fmt: skip
    generator = config_of(family, rng)
    config = hf.RagConfig.from_question_encoder_generator_configs(encoder, generator, n_docs=K, max_combined_length=20)
    kind = getattr(hf, f"Rag{variant}ForGeneration")
    theirs = randomised(kind(config), seed)
    theirs.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
    same_files(tmp_path / "theirs", tmp_path / "back")
    again, loading = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values()), loading

    bos, pad, eos = generator.decoder_start_token_id, generator.pad_token_id, generator.eos_token_id
    bos = 0 if family == "bart" else bos
    mask = np.arange(L) < rng.integers(2, L + 1, B * K)[:, None]
    ids = np.where(mask, rng.integers(3, VOCABULARY, (B * K, L)), pad)
    scores = rng.normal(0, 2, (B, K)).astype(np.float32)
    lengths = rng.integers(1, T - 2, B)
    labels = np.array([[bos, *rng.integers(3, VOCABULARY, n), eos, *[pad] * (T - 2 - n)] for n in lengths])
    given = {
        "context_input_ids": torch.tensor(ids).long(),
        "context_attention_mask": torch.tensor(mask).long(),
        "doc_scores": torch.tensor(scores),
        "n_docs": K,
    }
    model, params = rag_jax.from_pretrained(tmp_path / "ours")
    nll = jax.jit(partial(model.nll, hf_compat=True))
    found = nll(params, ids.reshape(B, K, L), mask.reshape(B, K, L), scores, labels)
    answers = []
    for torch_model in (theirs, again.eval()):
        with torch.no_grad():
            loss = torch_model(**given, labels=torch.tensor(labels).long(), reduce_loss=False).loss.reshape(-1)
            np.testing.assert_allclose(found, loss, rtol=1e-5)
            answers.append(torch_model.generate(**given, num_beams=2, max_length=7))
    assert torch.equal(*answers)


def test_weights_in_a_bin_are_read_with_torch(tmp_path):
    import torch
    import transformers as hf
    from make_goldens import BART, randomised

    model = randomised(hf.BartForConditionalGeneration(hf.BartConfig(**BART)))
    model.save_pretrained(tmp_path)
    whole = generator_part(tmp_path).tensors
    expected = {name: whole.read(name) for name in whole.shapes}
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # as before safetensors: copies are there too
    old = generator_part(tmp_path).tensors
    assert set(old.shapes) - set(whole.shapes) == set(bart_copies(None))
    for name in whole.shapes:
        assert old.shapes[name] == whole.shapes[name]
        np.testing.assert_array_equal(old.read(name), expected[name])
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"pytorch_model.bin: not a checkpoint of plain weights"):
        generator_part(tmp_path)
