"""A run directory: its files, and the model, corpus and index that it loads onto devices.

config.json   the configuration              corpus.json   hashes of the corpus and tokenizers it was trained with
manifest.json checksums of these two, tokenizers/ and hf/, as they were when the run began
checkpoints/  everything needed to resume    params/       parameters after the last stage
index/        snapshot of the corpus by these parameters
metrics.jsonl, tensorboard/, report.json, ...
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rag_jax.corpus.directory import Corpus
from rag_jax.data import tokenizers
from rag_jax.data.tokenizers import Tokenizer
from rag_jax.errors import InputError
from rag_jax.index import encode, encode_job
from rag_jax.index import snapshot as snapshots
from rag_jax.index.device_index import Index, encoded
from rag_jax.models.protocols import GeneratorConfig
from rag_jax.rag import Params, Rag, RagConfig, TokenTables
from rag_jax.runs import checkpoint
from rag_jax.runs import config as run_config
from rag_jax.runs.config import RunConfig
from rag_jax.system import distributed, files, sharding
from rag_jax.system.logs import info

KIND, VERSION = "run", 1
CONFIG, IDENTITY = "config.json", "corpus.json"
PROVENANCE = "hf"  # the configuration files that converted parameters came with, for an export


def resolve(model: RagConfig, encoder: Tokenizer, generator: Tokenizer) -> RagConfig:
    """The model with vocabulary sizes and special ids filled in from the corpus' tokenizers.

    InputError where a vocabulary size that the model sets is smaller than that of its tokenizer.
    """
    for side, vocab, tokenizer in (
        ("encoder", model.encoder.vocab_size, encoder),
        ("generator", model.generator.vocab_size if model.generator else 0, generator),
    ):
        if vocab and vocab < tokenizer.vocab_size:
            raise InputError(
                f"model.{side}.vocab_size is {vocab}, but the corpus was tokenised with {tokenizer.vocab_size} tokens; "
                "set it to 0 to take the tokenizer's, or build the corpus with the model's tokenizer"
            )
    resolved = model.generator and with_tokens(model.generator, generator)
    resolved_encoder = dataclasses.replace(model.encoder, vocab_size=model.encoder.vocab_size or encoder.vocab_size)
    return dataclasses.replace(
        model,
        encoder=resolved_encoder,
        generator=resolved,
        query_prefix_ids=tokenizers.before(encoder, model.query_prefix),
        passage_prefix_ids=tokenizers.before(encoder, model.passage_prefix),
    )


def with_tokens(c: GeneratorConfig, tokenizer: Tokenizer) -> GeneratorConfig:
    """The generator with the special tokens of the tokenizer.

    If its special tokens came with the weights (tokens_from="checkpoint") they stay, and only eos_id, which ends a
    label, is chosen among its end tokens. InputError for an id that is not in the vocabulary.
    """
    c = dataclasses.replace(c, vocab_size=c.vocab_size or tokenizer.vocab_size)
    if c.tokens_from == "checkpoint":
        names = ("bos_id", "pad_id", "start_id", "forced_bos_id", "forced_eos_id")
        for name, token in [*((name, getattr(c, name)) for name in names), ("end_ids", max(c.ends))]:
            if token >= c.vocab_size:
                raise InputError(f"model.generator.{name}={token} is not one of the {c.vocab_size} tokens of the model")
        return dataclasses.replace(c, eos_id=tokenizer.eos_id if tokenizer.eos_id in c.ends else c.ends[0])
    from_eos = c.start_id == c.eos_id != c.bos_id  # as a model converted by an earlier version may have it
    return dataclasses.replace(
        c,
        bos_id=tokenizer.start_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        start_id=tokenizer.eos_id if from_eos else tokenizer.start_id,
        end_ids=(),
    )


def answered(model: RagConfig, corpus: Corpus) -> Corpus:
    """The corpus, whose tokenizer gives labels the start, end and padding tokens of the generator."""
    if model.generator is None:
        return corpus
    tokenizer = corpus.generator_tokenizer
    c, usual = with_tokens(model.generator, tokenizer), tokenizer.labels
    closing = (c.eos_id,) if c.tokens_from == "checkpoint" else usual.closing
    wrapping = tokenizers.Wrapping(c.opening(tokenizer.prefix_ids), closing, c.pad_id)
    return corpus if wrapping == usual else corpus.with_labels(wrapping)


def capacity(n: int) -> int:
    """Rows of the tables for n passages of a live corpus: the next multiple above n of an eighth of 2^floor(log2 n).

    So tables have up to an eighth of spare rows, and few different sizes: programs are rarely compiled again.
    """
    step = 1 << max(n.bit_length() - 4, 0)
    return (n // step + 1) * step


@dataclass(frozen=True)
class Loaded:
    """A model with its corpus on a mesh.

    passages: token tables, rows sharded over all devices; None: they stay on the host.
    live: the tables have spare rows for later versions of the corpus.
    """

    rag: Rag
    corpus: Corpus
    mesh: jax.sharding.Mesh
    passages: TokenTables | None
    live: bool = False

    @property
    def n_rows(self) -> int:
        """Rows that a search scans; `live_N` says which of them are valid."""
        return self.table_rows() if self.live else len(self.corpus)

    def table_rows(self, n: int = 0) -> int:
        """Rows of the tables on the devices, a multiple of the devices; n: passages, 0 for those of the corpus."""
        n = n or len(self.corpus)
        return -(-(capacity(n) if self.live else n) // self.mesh.size) * self.mesh.size

    @property
    def live_N(self) -> np.ndarray | None:
        """Valid rows: bool [n_rows], False for deleted passages and spare rows; None where there are neither."""
        live_N = self.corpus.live_N
        if not self.live:
            return live_N
        live_R = np.arange(self.n_rows) < len(self.corpus)
        live_R[: len(self.corpus)] &= True if live_N is None else live_N
        return live_R


def load(
    model: RagConfig, corpus: Corpus, mesh: jax.sharding.Mesh, on_devices: bool = True, live: bool = False
) -> Loaded:
    """The model for a corpus; on_devices: put the token tables there, for a search in graph; live: see Loaded."""
    rag = Rag(resolve(model, corpus.encoder_tokenizer, corpus.generator_tokenizer))
    corpus = answered(model, corpus)
    check_length(rag, corpus)
    loaded = Loaded(rag, corpus, mesh, None, live)
    return dataclasses.replace(loaded, passages=token_tables(loaded)) if on_devices else loaded


def token_tables(loaded: Loaded) -> TokenTables:
    """The corpus' token tables, rows sharded over all devices."""
    columns = token_columns(loaded.corpus)
    return TokenTables(*(sharding.shard_rows(loaded.mesh, table, fill, loaded.n_rows) for table, fill in columns))


def token_columns(corpus: Corpus) -> tuple[tuple[Any, int], ...]:
    """The tables of `TokenTables` on the host, each with the value that fills padding rows."""
    return (
        (corpus.encoder_ids, corpus.encoder_tokenizer.pad_id),
        (corpus.encoder_length, 1),
        (corpus.generator_ids, corpus.generator_tokenizer.pad_id),
        (corpus.generator_length, 0),
    )


def check_length(rag: Rag, corpus: Corpus) -> None:
    """InputError where the corpus' passages are longer than what the encoder can embed."""
    longest = int(corpus.encoder_ids.shape[1])
    room = rag.config.encoder.positions - len(rag.config.passage_prefix_ids)
    if longest > room:
        raise InputError(
            f"{corpus.directory}: up to {longest} tokens a passage for the encoder, which has room for {room} "
            f"(model.encoder.positions, without the prefix); rebuild the corpus with --encoder-length {room}"
        )


@functools.lru_cache(maxsize=8)  # tracing what draws them takes seconds
def abstract_params(rag: Rag) -> Any:
    """Shapes of the parameters, boxed with their logical axis names."""
    return jax.eval_shape(rag.init, jax.random.key(0))


def index_on_device(loaded: Loaded, snapshot: snapshots.Snapshot, dtype: str = "float32") -> Index:
    """A snapshot's embeddings on the devices, converted to `dtype`; all rows have the snapshot's step."""

    def placed(array_NX: Any) -> jax.Array:
        return sharding.shard_rows(loaded.mesh, array_NX, 0, loaded.n_rows)

    step_N = placed(np.full(len(snapshot.embeddings_NE), snapshot.manifest.step, np.int32))
    live_N = live_on_device(loaded)
    if dtype == "int8" and snapshot.scale_N is not None:
        return Index(placed(snapshot.rows_NE), step_N, placed(snapshot.scale_N), live_N)
    rows, scale_N = placed(snapshot.embeddings_NE), None
    if dtype != str(rows.dtype):
        rows, scale_N = _encode_program(loaded.mesh, dtype)(rows)
    return Index(rows, step_N, scale_N, live_N)


def live_on_device(loaded: Loaded) -> jax.Array | None:
    """`Loaded.live_N` sharded over the devices, as an index has it."""
    live_N = loaded.live_N
    return None if live_N is None else sharding.shard_rows(loaded.mesh, live_N, False)


@functools.lru_cache(maxsize=8)
def _encode_program(mesh: jax.sharding.Mesh, dtype: str) -> Any:
    """Jitted conversion of float rows_NE to (rows, scales or None) of an index of this type."""
    places = sharding.sharding(mesh, ("rows", None)), sharding.sharding(mesh, ("rows",)) if dtype == "int8" else None
    return jax.jit(lambda x: encoded(x, jnp.dtype(dtype)), out_shardings=places)


def identity(corpus: Corpus) -> dict[str, Any]:
    """Hashes of the corpus and its tokenizers, which a run is bound to."""
    return {
        "corpus_hash": corpus.hash,
        "encoder_tokenizer": corpus.encoder_tokenizer.hash,
        "generator_tokenizer": corpus.generator_tokenizer.hash,
    }


def read_identity(run_dir: Path) -> dict[str, Any]:
    """The `identity` that a run was started with; InputError where its file is missing or damaged."""
    check_written(run_dir)
    path, wanted = run_dir / IDENTITY, "make one with rag-jax train"
    try:
        content = path.read_bytes()
        found = json.loads(content) if content else None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{run_dir}: not a run directory ({IDENTITY}: {error}); {wanted}") from error
    if not isinstance(found, dict) or not isinstance(found.get("corpus_hash"), str):
        why = "names no corpus" if content else "is empty"
        raise InputError(f"{path}: damaged: it {why}; restore it from a copy, or {wanted}")
    return found


def check_written(run_dir: Path) -> None:
    """InputError where the configuration files of a run were altered after they were written."""
    there = files.check_listed(run_dir, (CONFIG, IDENTITY), kinds=(KIND, "converted model"))
    if not there and (run_dir / CONFIG).is_file():
        files.told_without_sums(run_dir, KIND)


def write_manifest(run_dir: Path, known: Mapping[str, Path]) -> None:
    """Writes manifest.json with checksums of the small files that a run has from its beginning.

    known: files by name that are still at a temporary path.
    """
    kept = {IDENTITY: run_dir / IDENTITY, **known}
    for folder in ("tokenizers", PROVENANCE):
        kept |= {p.relative_to(run_dir).as_posix(): p for p in sorted((run_dir / folder).rglob("*")) if p.is_file()}
    entries = {name: files.entry_of(path) for name, path in kept.items()}
    files.write_sealed(run_dir / files.MANIFEST, KIND, VERSION, {"files": entries})


def check_tokenizers(run_dir: Path, corpus: Corpus) -> None:
    """InputError with both hashes where the corpus has other tokenizers than the one that the run was trained on."""
    known, now = read_identity(run_dir), identity(corpus)
    for name in ("encoder_tokenizer", "generator_tokenizer"):
        if name not in known:
            raise InputError(
                f"{run_dir}: was converted from weights without the {name.replace('_', ' ')}, so no corpus can be "
                "matched to it; put the tokenizer's files beside the weights and convert again"
            )
        if known[name] != now[name]:
            raise InputError(
                f"{corpus.directory}: tokenised with {name} {now[name][:16]}, but {run_dir} was trained with "
                f"{known[name][:16]}; "
                f"build the corpus with: rag-jax corpus INPUT --out DIR --tokenizers-from {run_dir / 'tokenizers'}"
            )


def read_config(run_dir: Path) -> RunConfig:
    """The RunConfig of a run; InputError where its file was altered after it was written."""
    check_written(run_dir)
    return run_config.read(run_dir / CONFIG)


def trained_steps(run_dir: Path) -> int:
    """Total steps of all stages of a run's configuration; 0 for a converted model."""
    return sum(stage["steps"] for stage in run_config.stored(run_dir / CONFIG).get("stages", []))


def param_places(rag: Rag, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, types and shardings of the parameters."""
    return sharding.described(mesh, abstract_params(rag))


def read_params(run_dir: Path, rag: Rag, mesh: jax.sharding.Mesh) -> Params:
    """Reads a run's parameters onto the mesh."""
    return checkpoint.load_params(run_dir / "params", param_places(rag, mesh))


def check_init(run_dir: Path, model: RagConfig, corpus: Corpus, mesh: jax.sharding.Mesh) -> None:
    """InputError where the parameters of a run cannot initialise this model on this corpus."""
    check_tokenizers(run_dir, corpus)
    rag = Rag(resolve(model, corpus.encoder_tokenizer, corpus.generator_tokenizer))
    checkpoint.check_params(run_dir / "params", param_places(rag, mesh))


def run_model(directory: Path, config: RunConfig) -> Rag:
    """The model of a run, with vocabulary sizes and special ids of its tokenizers."""
    if not (directory / "tokenizers" / "generator").is_dir():  # converted from weights that came without
        return Rag(config.model)
    return Rag(
        resolve(config.model, *(tokenizers.load(directory / "tokenizers" / r) for r in ("encoder", "generator")))
    )


def write_empty_run(
    directory: Path, model: RagConfig, identity: dict[str, Any], answering: Mapping[str, Any] | None = None
) -> None:
    """Writes the configuration files of a run without stages, whose parameters come from elsewhere."""
    made = RunConfig(corpus="", dev="", model=model, answering=answering or {})
    run_config.save(made, directory / CONFIG)
    (directory / IDENTITY).write_text(json.dumps(identity, indent=2) + "\n")


def encoder_hash(loaded: Loaded, params: Params) -> str:
    """Hash of the parameters that embed passages."""
    return checkpoint.tree_hash(params[loaded.rag.config.passage_side])


def stored_encoder_hash(run_dir: Path, rag: Rag) -> str:
    """The `encoder_hash` of a run's saved parameters, of which only those are read; "" where it has none of them."""
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    side = rag.config.passage_side
    like = param_places(rag, mesh)
    if side not in like:
        return ""
    part = dict(checkpoint.read_part(run_dir / "params", side, like[side]))
    return checkpoint.tree_hash(unflatten_dict(part, sep="/"))


def check_snapshot(loaded: Loaded, params: Params, snapshot: snapshots.Snapshot) -> None:
    """InputError, with both hashes, for an index of another corpus, encoder or tokenizer."""
    corpus = loaded.corpus
    form = loaded.rag.config.passage_form
    snapshots.check(snapshot, corpus.hash, encoder_hash(loaded, params), corpus.encoder_tokenizer.hash, form)


def is_of(snapshot: snapshots.Snapshot, manifest: snapshots.Manifest) -> bool:
    """Whether a snapshot is of the same encoder and corpus."""
    found = snapshot.manifest
    same = (found.encoder_hash, found.corpus_hash) == (manifest.encoder_hash, manifest.corpus_hash)
    return same and snapshots.same_form(found.form, manifest.form)


def write_index(
    loaded: Loaded,
    params: Params,
    step: int,
    out: Path,
    overwrite: bool = False,
    known: snapshots.Snapshot | None = None,
) -> snapshots.Snapshot:
    """Embeds the corpus, shared by all processes, and writes the index snapshot.

    step: updates the parameters were trained for.
    known: a snapshot that is taken over without embedding anything, if it is of the same encoder and corpus.
    """
    rag, corpus = loaded.rag, loaded.corpus
    side = sharding.fetched(params[rag.config.passage_side])  # from however many devices and processes it lies on
    width = rag.config.encoder.output_width
    manifest = snapshots.Manifest.of(corpus, checkpoint.tree_hash(side), step, width, form=rag.config.passage_form)
    if known is not None and is_of(known, manifest):
        if distributed.first():
            dtype = known.manifest.dtype
            snapshots.update(known, dataclasses.replace(manifest, dtype=dtype), corpus, (), out, overwrite)
        distributed.barrier("index written")
        return snapshots.open_snapshot(out)
    info("embedding the corpus for the run's index")
    embed_rows = encode.row_embedder(
        lambda p, ids, mask: rag.embed_passages({loaded.rag.config.passage_side: p}, ids, mask),
        side,
        corpus.encoder_ids,
        corpus.encoder_length,
    )
    blocks = encode_job.blocks(embed_rows, range(len(corpus)))
    if distributed.first():
        snapshots.write(out, manifest, blocks, overwrite)
    else:
        collections.deque(blocks, maxlen=0)  # takes part in embedding, and drops the result
    distributed.barrier("index written")
    return snapshots.open_snapshot(out)
