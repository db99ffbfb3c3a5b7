"""The programs of a configuration, with shapes as arguments: training steps, search, and embedding of passages.

They are those of training and evaluation. Nothing is allocated, and the corpus need not exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rag_jax import retrieve
from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.index import refresh
from rag_jax.index.device_index import Index
from rag_jax.rag import Rag, TokenTables
from rag_jax.runs import directory as runs
from rag_jax.system import sharding
from rag_jax.training import train_step
from rag_jax.training.config import TrainConfig
from rag_jax.training.stage import StageConfig, StepSetting
from rag_jax.training.train_step import TrainState


@dataclass(frozen=True)
class Sizes:
    """Sizes of the corpus and its token table.

    passages: rows, with the spare ones of a live corpus.
    encoder_length, generator_length: tokens of a passage for the encoder and the generator.
    encoder_dtype, generator_dtype: types of the token tables.
    prefix_ids: special ids at the start of a generator's input.
    live: whether the index has a mask of valid rows (not deleted).
    """

    passages: int
    encoder_length: int
    generator_length: int
    encoder_dtype: str
    generator_dtype: str
    prefix_ids: tuple[int, ...]
    live: bool = False


class TracedProgram(NamedTuple):
    """A function with its arguments as ShapeDtypeStructs with shardings.

    call: the function, to be traced as call(*arguments).
    jitted: the same, to be compiled for the arguments.
    groups: the arguments by what they are (parameters, index, ...), for reports.
    questions, tokens, passages: of one run; all tokens count as if none were padding, passages are those embedded.
    """

    name: str
    call: Any
    jitted: Any
    arguments: tuple[Any, ...]
    groups: dict[str, Any]
    questions: int
    tokens: int
    passages: int = 0


def sizes(cfg: TrainConfig, passages: int, encoder_length: int, generator_length: int) -> tuple[Rag, Sizes]:
    """The model with its vocabulary sizes filled in, and the sizes of the corpus.

    passages, encoder_length, generator_length: of a corpus that is not built yet; passages, if not 0, also replaces the
        size of one that is.

    InputError where neither the corpus nor the arguments give a size.
    """
    if Path(cfg.corpus).is_dir():
        corpus = Corpus.open(cfg.corpus)
        rag = Rag(runs.resolve(cfg.model, corpus.encoder_tokenizer, corpus.generator_tokenizer))
        runs.check_length(rag, corpus)
        prefix_ids = corpus.generator_tokenizer.prefix_ids
        n = passages or len(corpus)
        n = runs.capacity(n) if cfg.live else n
        lengths = (int(corpus.encoder_ids.shape[1]), int(corpus.generator_ids.shape[1]))
        dtypes = (str(corpus.encoder_ids.dtype), str(corpus.generator_ids.dtype))
        return rag, Sizes(n, *lengths, *dtypes, prefix_ids, cfg.live or corpus.live_N is not None)
    if passages < 1:
        raise InputError(f"{cfg.corpus}: no such corpus; build it, or say how large it will be: --passages 21015300")
    sides = {"encoder": cfg.model.encoder, "generator": cfg.model.generator}
    for side, model in sides.items():
        if model is not None and not model.vocab_size:
            raise InputError(
                f"model.{side}.vocab_size is that of a corpus that is not there ({cfg.corpus}); "
                f"give it: --set model.{side}.vocab_size=30522"
            )
    wide = [model is not None and model.vocab_size > 2**16 for model in sides.values()]
    dtypes = ("uint32" if wide[0] else "uint16", "uint32" if wide[1] else "uint16")
    n = runs.capacity(passages) if cfg.live else passages
    prefix_ids = (cfg.model.generator.bos_id,) if cfg.model.generator is not None else ()
    return Rag(cfg.model), Sizes(n, encoder_length, generator_length, *dtypes, prefix_ids, cfg.live)


def array(mesh: Mesh, shape: tuple[int, ...], dtype: str, *names: str | None) -> Any:
    """A ShapeDtypeStruct of an array whose axes have these logical names; axes without one are not sharded."""
    names = (*names, *[None] * (len(shape) - len(names)))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding.sharding(mesh, names))


def state(rag: Rag, stage: StageConfig, mesh: Mesh) -> TrainState:
    """Shapes of the state that `train_step.first_state` returns."""
    opt_state = sharding.described(mesh, jax.eval_shape(lambda: train_step.first_optimizer_state(rag, stage)))
    return TrainState(array(mesh, (), "int32"), runs.param_places(rag, mesh), opt_state)


def batch(cfg: TrainConfig, stage: StageConfig, rag: Rag, size: Sizes, mesh: Mesh) -> dict[str, Any]:
    """Shapes of the batch of a stage, with one gold passage per question."""
    objective = stage.objective
    shapes = objective.batch_shapes(stage.batch, cfg, size.encoder_length, len(size.prefix_ids))
    if objective.asks and not cfg.search.in_graph:  # found between steps
        shapes |= dict.fromkeys(("documents", "document_rows"), objective.documents_shape(stage.batch))
    return {name: array(mesh, shape, "int32", "batch") for name, shape in shapes.items()}


def tables(size: Sizes, mesh: Mesh, rows: int, name: str = "rows") -> TokenTables:
    """Shapes of the token table; name: logical axis of its rows."""
    return TokenTables(
        array(mesh, (rows, size.encoder_length), size.encoder_dtype, name),
        array(mesh, (rows,), "uint16", name),
        array(mesh, (rows, size.generator_length), size.generator_dtype, name),
        array(mesh, (rows,), "uint16", name),
    )


def index(cfg: TrainConfig, rag: Rag, size: Sizes, mesh: Mesh) -> Index:
    """Shapes of an index on the devices, as in `device_index.blank`."""
    rows, width, dtype = padded(size, mesh), rag.config.encoder.output_width, cfg.search.dtype
    return Index(
        array(mesh, (rows, width), dtype, "rows"),
        array(mesh, (rows,), "int32", "rows"),
        array(mesh, (rows,), "float32", "rows") if dtype == "int8" else None,
        array(mesh, (rows,), "bool", "rows") if size.live else None,
        array(mesh, (width,), "float32"),
    )


def padded(size: Sizes, mesh: Mesh) -> int:
    """Number of rows of the tables, a multiple of the devices."""
    return -(-size.passages // mesh.size) * mesh.size


def setting(cfg: TrainConfig, stage: StageConfig, rag: Rag, size: Sizes, mesh: Mesh) -> StepSetting:
    """Static settings of the step of a stage; its epoch, which `refresh` counts in, is at most Natural Questions'."""
    rows = padded(size, mesh) if cfg.live else size.passages
    questions = min(stage.questions or 79_168, 79_168)
    return StepSetting(rag, stage, mesh, rows, size.prefix_ids, cfg.search, max(1, questions // stage.batch))


def step(cfg: TrainConfig, stage: StageConfig, rag: Rag, size: Sizes, mesh: Mesh) -> TracedProgram:
    """The training step of a stage."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if stage.batch % shards:
        raise InputError(
            f"stage {stage.name}: batch={stage.batch} does not divide over {shards} devices; make it a multiple: "
            f"--set stages.{stage.name}.batch={-(-stage.batch // shards) * shards}"
        )
    s = setting(cfg, stage, rag, size, mesh)
    train_state, questions = state(rag, stage, mesh), batch(cfg, stage, rag, size, mesh)
    table: Index | None = index(cfg, rag, size, mesh) if stage.objective.searches else None
    passages = tables(size, mesh, padded(size, mesh))
    if not cfg.search.in_graph:
        rows, width = stage.objective.rows_per_question * stage.batch, rag.config.encoder.output_width
        passages = tables(size, mesh, rows, "batch")
        kept = array(mesh, (rows, width), "float32", "batch"), array(mesh, (rows,), "int32", "batch")
        table = Index(*kept) if stage.objective.searches else None
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    groups = {
        "parameters": train_state.params, "optimiser": (train_state.step, train_state.opt_state), "index": table,
        "token table": passages, "batch": (questions, key),
    }  # fmt: skip
    return TracedProgram(
        stage.name,
        train_step.make_step(s, 0),
        train_step.jit_step(s, 0, train_state, table),
        (train_state, questions, table, passages, key),
        groups,
        stage.batch,
        stage.objective.tokens(stage.batch, cfg, size.encoder_length),
    )


def search(cfg: TrainConfig, rag: Rag, size: Sizes, mesh: Mesh, questions: int, k: int) -> TracedProgram:
    """The search of `questions` questions at once, as in evaluation."""
    s, table = setting(cfg, cfg.stages[-1], rag, size, mesh), index(cfg, rag, size, mesh)
    q_BE = array(mesh, (questions, rag.config.encoder.output_width), "float32", "batch")

    def find(q_BE: jax.Array, index: Index) -> Any:
        return retrieve.find(s, q_BE, index, k)

    return TracedProgram("search", find, jax.jit(find), (q_BE, table), {"index": table, "batch": q_BE}, questions, 0)


def encode(cfg: TrainConfig, rag: Rag, size: Sizes, mesh: Mesh) -> TracedProgram:
    """One block of rebuilding the index on the devices; the encoder is replicated on all of them."""
    side = rag.config.passage_side
    whole = sharding.replicated(mesh)
    encoder = {
        side: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), runs.param_places(rag, mesh)[side]
        )
    }
    table, passages = (
        index(cfg, rag, size, mesh)._replace(live_N=None, drift_E=None),
        tables(size, mesh, padded(size, mesh)),
    )
    number = array(mesh, (), "int32")

    def block(params: Any, index: Index, passages: TokenTables, number: Any, step: Any) -> Index:
        return refresh.embed_block(rag, mesh, params, index, passages, number, step, refresh.BLOCK)

    n = min(refresh.BLOCK * mesh.size, padded(size, mesh))
    groups = {"parameters": encoder, "index": table, "token table": passages, "batch": (number, number)}
    arguments = (encoder, table, passages, number, number)
    return TracedProgram(
        "encode", block, jax.jit(block, donate_argnums=1), arguments, groups, 0, n * size.encoder_length, n
    )


def every(
    cfg: TrainConfig, rag: Rag, size: Sizes, mesh: Mesh, stages: Sequence[str], questions: int, k: int
) -> dict[str, TracedProgram]:
    """The programs named in `stages`, by name; all where it is empty. InputError for an unknown name."""
    known = [stage.name for stage in cfg.stages]
    graph = cfg.search.in_graph
    embeds = graph and (rag.config.context_encoder or rag.config.tie_encoders)
    known += ["search"] * graph + ["encode"] * embeds
    unknown = [name for name in stages if name not in known]
    if unknown:
        raise InputError(f"--stage {unknown[0]}: no such program; there are {', '.join(known)}")
    wanted = stages or known
    found = {s.name: step(cfg, s, rag, size, mesh) for s in cfg.stages if s.name in wanted}
    if "search" in wanted and "search" not in found:
        found["search"] = search(cfg, rag, size, mesh, questions, k)
    if "encode" in wanted and "encode" not in found:
        found["encode"] = encode(cfg, rag, size, mesh)
    return found
