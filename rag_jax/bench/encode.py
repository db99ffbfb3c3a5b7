"""Benchmark of embedding passages, beside transformers and against the machine's rate of matmuls.

Weights are random and the same on both sides. The rival works like sentence-transformers: passages sorted by length,
batches padded to their longest passage, the mean over the tokens of transformers' BertModel. Only the work of real
tokens is counted, so padding lowers the fraction of the measured rate of matmuls.
"""

import dataclasses
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from rag_jax.bench.machine_limits import in_turn, matmul_limit, spread
from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.index import encode
from rag_jax.models.bert import BertConfig
from rag_jax.pretrained.export import save_pretrained
from rag_jax.rag import Params, Rag, RagConfig

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class EncodeLoad:
    """Passages to embed, and the shape of the BERT that embeds them.

    passages: number of passages, whose lengths are uniform from `shortest` to `length` tokens.
    batch: passages at once.
    """

    passages: int = 1024
    shortest: int = 16
    length: int = 160
    batch: int = 64
    width: int = 128
    layers: int = 2
    hidden: int = 512
    heads: int = 4
    vocabulary: int = 8192
    dtype: str = "float32"

    @property
    def model(self) -> BertConfig:
        return BertConfig(
            vocab_size=self.vocabulary, width=self.width, layers=self.layers, heads=self.heads, hidden=self.hidden,
            positions=max(512, self.length), dropout=0.0, pooling="mean", dtype=self.dtype,
        )  # fmt: skip


LOADS = {
    "small": EncodeLoad(),
    "minilm": EncodeLoad(passages=512, width=384, layers=6, hidden=1536, heads=12, vocabulary=30522),
    "bert-base": EncodeLoad(
        passages=16384, batch=512, width=768, layers=12, hidden=3072, heads=12, vocabulary=30522, dtype="bfloat16"
    ),
}  # fmt: skip


def drawn(load: EncodeLoad, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N, L] and lengths [N] of random passages."""
    rng = np.random.default_rng(seed)
    length_N = rng.integers(load.shortest, load.length + 1, load.passages).astype(np.uint16)
    return rng.integers(1, load.vocabulary, (load.passages, load.length)).astype(np.uint16), length_N


def read(load: EncodeLoad, corpus: Corpus) -> tuple[EncodeLoad, np.ndarray, np.ndarray]:
    """The load with number, lengths and vocabulary of the first passages of a corpus, and their ids and lengths."""
    ids_NL, length_N = (
        np.asarray(corpus.encoder_ids[: load.passages]),
        np.asarray(corpus.encoder_length[: load.passages]),
    )
    vocabulary = max(load.vocabulary, corpus.encoder_tokenizer.vocab_size)
    shape = {"passages": len(ids_NL), "shortest": int(length_N.min()), "length": ids_NL.shape[1]}
    return dataclasses.replace(load, vocabulary=vocabulary, **shape), ids_NL, length_N


def flops(load: EncodeLoad, length_N: np.ndarray) -> float:
    """Floating-point operations of the matmuls for passages of these lengths, without padding; 2 per multiply-add."""
    D, tokens = load.width, np.asarray(length_N, np.float64)
    return float(load.layers * 2 * ((4 * D * D + 2 * D * load.hidden) * tokens + 2 * D * tokens**2).sum())


def padded_tokens(load: EncodeLoad, length_N: np.ndarray) -> int:
    """Tokens that our programs process, padding included."""
    size = -(-load.batch // jax.local_device_count()) * jax.local_device_count()
    return sum(size * wide for _, wide in encode.plan(length_N, size, load.length))


def random_model(load: EncodeLoad) -> tuple[Rag, Params]:
    """A model with only an encoder, and random parameters."""
    rag = Rag(RagConfig(encoder=load.model, generator=None, tie_encoders=True))
    return rag, nn.unbox(jax.jit(rag.init)(jax.random.key(0)))


def ours(
    load: EncodeLoad, rag: Rag, params: Params, ids_NL: np.ndarray, length_N: np.ndarray
) -> Callable[[int], np.ndarray]:
    """call(round) -> vectors [N, E] of all passages, by our encoder."""
    encoder = rag.encoder
    embed_rows = encode.row_embedder(
        lambda p, ids, mask: encoder.apply({"params": p}, ids, mask),
        params["question_encoder"], ids_NL, length_N, load.batch,
    )  # fmt: skip
    return lambda i: embed_rows(0, len(length_N), lambda more: None)


def theirs(
    load: EncodeLoad, rag: Rag, params: Params, ids_NL: np.ndarray, length_N: np.ndarray, directory: Path
) -> Callable[[int], np.ndarray]:
    """call(round) -> vectors [N, E] of all passages, by the same model in transformers, exported to `directory`."""
    import torch
    import transformers

    save_pretrained(directory, rag, params, part="question_encoder")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = transformers.BertModel.from_pretrained(directory, add_pooling_layer=False).eval()
    model = model.to(device, getattr(torch, load.dtype))
    order = np.argsort(-length_N.astype(int), kind="stable")
    ids_all, lengths_all = (torch.tensor(x.astype(np.int64)) for x in (ids_NL, length_N))

    def call(i: int) -> np.ndarray:
        out = np.empty((len(order), load.width), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), load.batch):
                here = order[start : start + load.batch]
                length = lengths_all[here].to(device)
                ids = ids_all[here, : int(length.max())].to(device)
                mask = torch.arange(ids.shape[1], device=device)[None] < length[:, None]
                hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
                out[here] = ((hidden * mask[..., None]).sum(1) / length[:, None]).cpu().numpy()
        return out

    return call


def bench(load: EncodeLoad, ids_NL: np.ndarray, length_N: np.ndarray, repeats: int, rival: bool) -> dict[str, Any]:
    """Measures ours and, with `rival`, transformers in turn, and how far their vectors differ."""
    rag, params = random_model(load)
    calls = {"ours": ours(load, rag, params, ids_NL, length_N)}
    with tempfile.TemporaryDirectory() as directory:
        if rival:
            calls["transformers"] = theirs(load, rag, params, ids_NL, length_N, Path(directory) / "model")
        seconds, found = in_turn(calls, repeats, "bench encode")
    limit = matmul_limit(dtype=load.dtype) * jax.local_device_count()
    times = seconds["ours"][1:]
    median, tokens, work = statistics.median(times), int(length_N.sum(dtype=np.int64)), flops(load, length_N)
    result: dict[str, Any] = {
        **dataclasses.asdict(load),
        "device": jax.devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "jax": jax.__version__,
        "seconds": spread(times),
        "passages_per_second": load.passages / median,
        "tokens_per_second": tokens / median,
        "warm_up_seconds": round(seconds["ours"][0] - median, 2),
        "padding_share": 1 - tokens / padded_tokens(load, length_N),
        "flops": work,
        "flops_per_second": work / median,
        "matmul_limit_flops_per_second": limit,
        "fraction_of_limit": work / median / limit,
    }
    if rival:
        their = seconds["transformers"][1:]
        one, other = found["ours"][-1], found["transformers"][-1]
        difference = np.abs(one - other).max() / np.abs(other).max()
        result["transformers"] = spread(their)
        result["times_faster"] = statistics.median(their) / median
        result["largest_difference"] = float(difference)
    return result


def table(r: dict[str, Any]) -> str:
    """The results as readable lines."""
    lines = [
        f"{r['passages']:,} passages of {r['shortest']} to {r['length']} tokens, {r['batch']} at once; "
        f"D={r['width']} layers={r['layers']} {r['dtype']}, {r['devices']} x {r['device']}",
        f"{r['seconds']['median_ms']:,.0f} ms ({r['seconds']['min_ms']:,.0f} to {r['seconds']['max_ms']:,.0f}); "
        f"{r['passages_per_second']:,.0f} passages/s, {r['tokens_per_second']:,.0f} tokens/s",
        f"{r['flops_per_second'] / 1e9:,.1f} GFLOP/s, {r['fraction_of_limit']:.0%} of the matmul limit; "
        f"padding {r['padding_share']:.1%}; compiling and the like {r['warm_up_seconds']:.1f} s",
    ]
    if "times_faster" in r:
        lines.append(
            f"transformers {r['transformers']['median_ms']:,.0f} ms, {r['times_faster']:.2f} times as long; "
            f"largest difference {r['largest_difference']:.1e} of the largest value"
        )
    return "\n".join(lines)


def report(load: EncodeLoad, corpus: Path | None, repeats: int, alone: bool) -> dict[str, Any]:
    """Results of `bench` on random passages or the first of a corpus, with a table as `text`.

    corpus: directory of a corpus; None: random passages.
    alone: without transformers, even if torch is installed.

    InputError for a load whose values do not fit together.
    """
    if load.width % load.heads or load.dtype not in DTYPES or load.shortest > load.length or load.vocabulary > 2**16:
        raise InputError(
            f"--width {load.width} --heads {load.heads} --dtype {load.dtype} --shortest {load.shortest} --length "
            f"{load.length} --vocabulary {load.vocabulary}: the width must be a multiple of the heads, the type "
            f"{' or '.join(DTYPES)}, the shortest no longer than the length, the vocabulary at most 65536"
        )
    if corpus is not None:
        load, ids_NL, length_N = read(load, Corpus.open(corpus))
    else:
        ids_NL, length_N = drawn(load)
    rival = not alone and importlib.util.find_spec("torch") is not None
    return {"text": table(result := bench(load, ids_NL, length_N, repeats, rival)), **result}
