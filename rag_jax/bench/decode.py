"""Benchmark of decoding, beside transformers and against the limits of the machine.

Weights, documents and scores are random and the same on both sides; torch and transformers are used where they are
installed. The limit is the time of the matmuls that every exact decoder must do, at the machine's measured rate, or of
the bytes that it must read, at the measured rate of reading, whichever is longer.
"""

import dataclasses
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from rag_jax.bench.machine_limits import in_turn, matmul_limit, reading_limit, spread
from rag_jax.decoding.rag_decode import Mode
from rag_jax.errors import InputError
from rag_jax.models.bart import BartConfig
from rag_jax.models.bert import BertConfig
from rag_jax.pretrained.export import save_pretrained
from rag_jax.rag import Params, Rag, RagConfig

Variant = Literal["sequence", "token"]
MODES: dict[Variant, tuple[Mode, ...]] = {"token": ("thorough",), "sequence": ("thorough", "fast")}
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class DecodeLoad:
    """Inputs of decoding, and the shape of the BART that decodes.

    questions, docs: B and K.
    source: L, tokens of a document.
    length: T, longest answer in tokens, with start token and eos.
    beams: M.
    layers: of encoder and decoder, each.
    """

    questions: int = 8
    docs: int = 5
    source: int = 128
    length: int = 24
    beams: int = 4
    width: int = 128
    layers: int = 2
    hidden: int = 512
    heads: int = 4
    vocabulary: int = 8192
    dtype: str = "float32"

    @property
    def model(self) -> BartConfig:
        return BartConfig(
            vocab_size=self.vocabulary, width=self.width, encoder_layers=self.layers, decoder_layers=self.layers,
            heads=self.heads, hidden=self.hidden, positions=max(self.source, self.length) + 2, dropout=0.0,
            dtype=self.dtype,
        )  # fmt: skip


LOADS = {
    "small": DecodeLoad(),
    "medium": DecodeLoad(
        questions=4, width=256, layers=4, hidden=1024, heads=4, vocabulary=30522
    ),
    "bart-large": DecodeLoad(
        questions=8, source=256, width=1024, layers=12, hidden=4096, heads=16, vocabulary=50265, dtype="bfloat16"
    ),
}  # fmt: skip


def drawn(rag: Rag, seed: int = 0) -> Params:
    """Random parameters, at a scale at which documents lead to different answers."""
    shapes = nn.unbox(jax.eval_shape(rag.init, jax.random.key(0)))
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed), len(paths))

    def draw(path: Any, x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if x.ndim < 2:
            return jax.random.normal(key, x.shape) * 0.05 + ("scale" in name)
        return jax.random.normal(key, x.shape) * (0.3 if "embedding" in name else 1.5 / x.shape[0] ** 0.5)

    return jax.tree.unflatten(structure, [draw(*pair, key) for pair, key in zip(paths, keys, strict=True)])


def random_model(load: DecodeLoad, variant: Variant, seed: int = 0) -> tuple[Rag, Params]:
    """A model of this load with a minimal encoder, and random parameters."""
    encoder = BertConfig(vocab_size=64, width=16, layers=1, heads=2, hidden=16, positions=16)
    rag = Rag(
        RagConfig(variant, encoder, load.model, n_docs=load.docs, source_length=load.source, context_encoder=False)
    )
    return rag, drawn(rag, seed)


def random_inputs(load: DecodeLoad, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random context ids and mask [B, K, L] and scores [B, K]; all documents have full length."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, load.vocabulary, (load.questions, load.docs, load.source)).astype(np.int32)
    return ids, np.ones(ids.shape, bool), rng.normal(0, 1, ids.shape[:2]).astype(np.float32)


def needed(load: DecodeLoad, variant: Variant, mode: str) -> dict[str, float]:
    """Matmul FLOPs and bytes read that every exact decoder needs, for answers of full length.

    Every source is encoded once. The first step has one beam, the others M. For RAG-Sequence thorough, K * M candidates
    are scored, each under the K - 1 documents that did not produce it. Prefixes that candidates share are counted for
    each of them, so a decoder that computes them once may beat this limit. The matmuls of attention are counted,
    softmax and top-k are not.
    """
    c, B, K, L, M, steps = load, load.questions, load.docs, load.source, load.beams, load.length - 1
    D, F = c.width, c.hidden
    size = BYTES[c.dtype]
    sources = B * K * L
    encode = sources * c.layers * 2.0 * (4 * D * D + 2 * D * F + 2 * L * D)
    cross = sources * c.layers * 2.0 * 2 * D * D
    token = c.layers * 2.0 * (6 * D * D + 2 * D * F + 2 * L * D) + 2.0 * D * c.vocabulary
    own = c.layers * 2.0 * 2 * D  # attention of one token to one earlier token of its answer
    searched = 1 + M * (steps - 1)
    flops = encode + cross + B * K * (searched * token + M * own * steps * (steps + 1) / 2)
    decoder = c.layers * (8 * D * D + 2 * D * F) + D * c.vocabulary
    reread = size * (decoder + sources * c.layers * 2.0 * D)
    read = size * c.layers * (4 * D * D + 2 * D * F) + steps * reread
    if variant == "sequence" and mode == "thorough":
        scored = B * K * M * (K - 1)
        flops += scored * (steps * token + own * steps * (steps + 1) / 2)
        read += reread
    return {"flops": flops, "bytes_read": float(read)}


def theirs(rag: Rag, params: Params, directory: str) -> Any:
    """transformers' model with the same weights, exported to `directory`."""
    import transformers

    save_pretrained(directory, rag, params)
    kind = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}[rag.variant]
    return getattr(transformers, kind).from_pretrained(directory).eval()


def their_answers(model: Any, load: DecodeLoad, given: tuple[np.ndarray, ...]) -> np.ndarray:
    """Sequences that transformers' model writes; given: ids, mask and scores, see `random_inputs`."""
    import torch

    device = next(model.parameters()).device
    ids, mask, scores = (torch.tensor(x).to(device) for x in given)
    with torch.inference_mode():
        answers = model.generate(
            context_input_ids=ids.reshape(-1, load.source).long(),
            context_attention_mask=mask.reshape(-1, load.source).long(),
            doc_scores=scores,
            n_docs=load.docs,
            num_beams=load.beams,
            max_length=load.length,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
            do_sample=False,
        )
        return answers.cpu().numpy()


def same(ours: np.ndarray, answers: np.ndarray, load: DecodeLoad) -> float:
    """Share of questions with the same tokens; shorter answers are padded."""
    padded = np.full(ours.shape, load.model.pad_id)
    padded[:, : answers.shape[1]] = answers
    return float((ours == padded).all(1).mean())


def ours(program: Any, params: Params, placed: list[Any], i: int) -> Any:
    """The compiled program's answers to input i, when they are there."""
    return jax.block_until_ready(program(params, *placed[i]))


def bench(
    load: DecodeLoad, variant: Variant, modes: tuple[Mode, ...], repeats: int, rival: bool
) -> list[dict[str, Any]]:
    """Results of each mode; our programs and the rival take turns, so that other load on the machine affects both."""
    rag, params = random_model(load, variant)
    inputs = [random_inputs(load, seed) for seed in range(repeats)]
    calls: dict[str, Callable[[int], Any]] = {}
    compiled: dict[str, float] = {}
    for mode in modes:
        generate = partial(rag.generate, num_beams=load.beams, max_length=load.length, mode=mode, hf_compat=True)
        begun = time.perf_counter()
        program = jax.jit(generate).lower(params, *inputs[0]).compile()
        compiled[mode] = time.perf_counter() - begun
        placed = [jax.device_put(x) for x in inputs]
        calls[mode] = partial(ours, program, params, placed)
    with tempfile.TemporaryDirectory() as directory:
        if rival:
            model = theirs(rag, params, directory)
            if jax.default_backend() == "gpu":
                import torch

                model = model.to("cuda", getattr(torch, load.dtype))
            calls["transformers"] = lambda i: their_answers(model, load, inputs[i])
        seconds, answers = in_turn(calls, repeats, f"bench decode {variant}")
    rate, reading = matmul_limit(dtype=load.dtype), reading_limit()
    results = []
    for mode in modes:
        work, times = needed(load, variant, mode), seconds[mode][1:]
        limit = max(work["flops"] / rate, work["bytes_read"] / reading)
        median = statistics.median(times)
        result = {
            "variant": variant,
            "mode": mode if variant == "sequence" else "",
            **dataclasses.asdict(load),
            "seconds": spread(times),
            "questions_per_second": load.questions / median,
            "compile_seconds": round(compiled[mode], 2),
            "limit_ms": 1e3 * limit,
            "fraction_of_limit": limit / median,
            **work,
            "matmul_limit_flops_per_second": rate,
            "reading_limit_bytes_per_second": reading,
        }
        if rival:
            times = seconds["transformers"][1:]
            pairs = zip(answers[mode][1:], answers["transformers"][1:], strict=True)
            result["transformers"] = spread(times)
            result["times_faster"] = statistics.median(times) / median
            result["same_answers"] = float(np.mean([same(np.asarray(a.sequences), b, load) for a, b in pairs]))
        results.append(result)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results as a readable table, one line per program."""
    lines = [f"{'':<22}{'median':>11}{'questions/s':>13}{'of the limit':>14}{'compile':>10}"]
    lines[0] += f"{'transformers':>15}{'faster':>9}{'same answers':>14}" if "times_faster" in results[0] else ""
    for r in results:
        name = f"RAG-{r['variant'].capitalize()} {r['mode']}"
        line = f"{name:<22}{r['seconds']['median_ms']:>8.0f} ms{r['questions_per_second']:>13.2f}"
        line += f"{r['fraction_of_limit']:>14.0%}{r['compile_seconds']:>8.1f} s"
        if "times_faster" in r:
            line += f"{r['transformers']['median_ms']:>12.0f} ms{r['times_faster']:>8.1f}x{r['same_answers']:>14.0%}"
        lines.append(line)
    return "\n".join(lines)


def report(load: DecodeLoad, variants: Sequence[Variant], repeats: int, alone: bool) -> dict[str, Any]:
    """Results of `bench` for each variant, with a table as `text`; alone: without transformers, even if installed.

    InputError for a load whose values do not fit together.
    """
    if load.width % load.heads or load.dtype not in BYTES:
        raise InputError(
            f"--width {load.width} --heads {load.heads} --dtype {load.dtype}: the width must be a multiple of the "
            f"heads, and the type {' or '.join(BYTES)}"
        )
    rival = not alone and importlib.util.find_spec("torch") is not None
    results = [r for variant in variants for r in bench(load, variant, MODES[variant], repeats, rival)]
    device = jax.devices()[0].device_kind
    shape = f"B={load.questions} K={load.docs} L={load.source} T={load.length} M={load.beams} D={load.width}"
    head = f"{shape} layers={load.layers}+{load.layers} V={load.vocabulary} {load.dtype}, {device}"
    return {"text": f"{head}\n{table(results)}", "device": device, "jax": jax.__version__, "results": results}
