"""Models written: directories that transformers loads, and converted ones in the form of a run."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from rag_jax import checkpoint, files
from rag_jax import run as runs
from rag_jax.data import joining, tokenizers
from rag_jax.errors import InputError
from rag_jax.models.bert import BertConfig
from rag_jax.models.hf import ENCODERS, GENERATORS, lm, naming
from rag_jax.models.hf.bart import without_logit_scale
from rag_jax.models.hf.naming import Family, spell
from rag_jax.models.lm import LmConfig
from rag_jax.pretrained import (
    ARCHITECTURES,
    CONFIG,
    EXPORTED,
    GENERATION,
    POOLING,
    SIDES,
    TOKENIZERS,
    LazyParams,
    Report,
    Source,
    read_json,
)
from rag_jax.rag import GeneratorConfig, Params, Rag
from rag_jax.tensors import SHARD_BYTES, Shapes, write_tensors

KIND, VERSION = EXPORTED, 1


def family_name(config: GeneratorConfig) -> str:
    """The model_type that a generator is written as."""
    if isinstance(config, LmConfig):
        return lm.lm_family(config)
    return {"bart": "mbart" if getattr(config, "norm", "") == "pre" else "bart", "t5": "t5"}[config.kind]


class Piece(NamedTuple):
    """One part as it is written: whose parameters, in the form of which family, under which name."""

    side: str
    family: Family
    config: Any
    base: str = ""

    def names(self) -> Iterator[tuple[str, naming.Entry]]:
        """(name, entry) of each tensor, as transformers writes them: no tied copies."""
        for entry in self.family.entries(self.config):
            yield self.base + spell(self.family.spellings[0], entry.theirs), entry


def write_pieces(out: Path, pieces: list[Piece], params: LazyParams, shard_bytes: int) -> None:
    """The weights of a directory, of which one tensor is in memory at a time, if `params` hold no more."""
    shapes: Shapes = {}
    for piece in pieces:
        leaves = flatten_dict(params.places[piece.side], sep="/")
        for name, entry in piece.names():
            shape = naming.their_shape(entry, [leaves[path].shape for path in entry.ours])
            shapes[name] = shape, str(leaves[entry.ours[0]].dtype)
    # chain holds nothing; the variable of a loop would hold a tensor while the next one is made
    tensors = chain.from_iterable(tensors_of(piece, params.read(piece.side)) for piece in pieces)
    write_tensors(out, shapes, tensors, shard_bytes)


def tensors_of(piece: Piece, parameters: Iterator[tuple[str, jax.Array]]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of one part, each when the last of its parameters has come."""
    homes = {path: (name, entry) for name, entry in piece.names() for path in entry.ours}
    waiting: dict[str, np.ndarray] = {}
    for path, parameter in parameters:
        waiting[path] = np.asarray(jax.device_get(without_logit_scale(piece.config, path, parameter)))
        del parameter
        name, entry = homes[path]
        if all(own in waiting for own in entry.ours):
            yield name, naming.to_theirs(entry, [waiting.pop(own) for own in entry.ours])


def describe_part(kind: str, family: Family, config: Any, original: dict[str, Any]) -> dict[str, Any]:
    """config.json of one part; `original`, where the part came from one, keeps what has no place here."""
    model_type = {"dpr_context": "dpr"}.get(kind, kind)
    kept = original if original.get("model_type", model_type) == model_type else {}
    return kept | family.describe(config) | {"model_type": model_type, "architectures": [family.architecture]}


def encoder_kind(config: BertConfig, side: str) -> str:
    """dpr where the vector is that of the first token, as it comes; else bert in the form of sentence-transformers."""
    plain = config.pooling == "cls" and not config.vector_norm
    return ("dpr" if side == "question_encoder" else "dpr_context") if plain else "bert"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_encoder(
    out: Path, rag: Rag, params: LazyParams, side: str, original: dict[str, Any], shard_bytes: int
) -> None:
    """A directory for DPRQuestionEncoder, DPRContextEncoder, or sentence-transformers."""
    config = rag.config.encoder
    kind = encoder_kind(config, side)
    family = ENCODERS[kind]
    described = describe_part(kind, family, config, original)
    out.mkdir(parents=True, exist_ok=True)
    if kind == "bert":
        if config.projection:
            raise InputError("an encoder with a projection and pooling='mean' has no form at Hugging Face")
        modules = ["Transformer", "Pooling", *(["Normalize"] if config.vector_norm else [])]
        paths = ["", "1_Pooling", "2_Normalize"]
        write_json(
            out / "modules.json",
            [
                {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{name}"}
                for i, name in enumerate(modules)
            ],
        )
        (out / "1_Pooling").mkdir(exist_ok=True)
        pooling = {name: config.pooling == way for name, way in POOLING.items()}
        write_json(out / "1_Pooling" / CONFIG, {"word_embedding_dimension": config.width, **pooling})
        write_json(out / "sentence_bert_config.json", {"max_seq_length": config.positions, "do_lower_case": False})
    write_json(out / CONFIG, described)
    own = "question_encoder" if rag.config.tie_encoders else side
    write_pieces(out, [Piece(own, family, config)], params, shard_bytes)


def write_generator(
    out: Path, config: GeneratorConfig, params: LazyParams, original: dict[str, Any], shard_bytes: int
) -> None:
    kind = original.get("model_type") or family_name(config)
    family = GENERATORS[kind]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, describe_part(kind, family, config, original))
    write_pieces(out, [Piece("generator", family, config)], params, shard_bytes)


def write_rag(
    out: Path, rag: Rag, params: LazyParams, original: dict[str, Any], context_inside: bool, shard_bytes: int
) -> None:
    """A directory for RagSequenceForGeneration or RagTokenForGeneration; the context encoder in its own folder, where
    DPRContextEncoder finds it, or inside the checkpoint.
    """
    model, generator = rag.config, rag.config.reader
    parts: dict[str, Any] = {key: original.get(key) or {} for key in ("question_encoder", "generator")}
    kind = parts["generator"].get("model_type") or family_name(generator)
    if isinstance(generator, LmConfig):
        raise InputError(
            "Hugging Face's RAG takes encoder-decoder generators only; write this one with --part generator"
        )
    if encoder_kind(model.encoder, "question_encoder") != "dpr":
        raise InputError(
            "Hugging Face's RAG has DPR encoders only (pooling='cls', vector_norm=0), and this model pools otherwise; "
            "write its parts with --part question_encoder, --part context_encoder and --part generator"
        )
    pieces = [
        Piece("question_encoder", ENCODERS["dpr"], model.encoder, "rag.question_encoder."),
        Piece("generator", GENERATORS[kind], generator, "rag.generator."),
    ]
    if context_inside:
        if "context_encoder" not in params.places:
            raise InputError("this model has no context encoder of its own to write inside")
        pieces.insert(1, Piece("context_encoder", ENCODERS["dpr_context"], model.encoder, "rag.ctx_encoder."))
    described = {
        "question_encoder": describe_part("dpr", ENCODERS["dpr"], model.encoder, parts["question_encoder"]),
        "generator": describe_part(kind, GENERATORS[kind], generator, parts["generator"]),
    }
    ids = {name: described["generator"].get(name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    whole = original | {
        **described,
        **{name: value for name, value in ids.items() if value is not None},
        "decoder_start_token_id": described["generator"].get("decoder_start_token_id"),
        "vocab_size": generator.vocab_size,
        "model_type": "rag",
        "architectures": [name for name, variant in ARCHITECTURES.items() if variant == model.variant],
        "n_docs": model.n_docs,
        "max_combined_length": model.source_length,
        "retrieval_vector_size": model.encoder.output_width,
        "title_sep": joining.TITLE_SEPARATOR,
        "doc_sep": joining.QUESTION_SEPARATOR,
        "is_encoder_decoder": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, whole)
    write_pieces(out, pieces, params, shard_bytes)
    if model.context_encoder and not context_inside:
        write_encoder(out / "context_encoder", rag, params, "context_encoder", {}, shard_bytes)


def save_pretrained(
    path: str | Path,
    rag: Rag,
    params: Params | LazyParams,
    *,
    part: str | None = None,
    tokenizers_from: str | Path | None = None,
    original: dict[str, dict[str, Any]] | None = None,
    context_inside: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a directory that transformers loads: RagSequenceForGeneration or RagTokenForGeneration, or one part alone.

    params: a tree, or those of `open_pretrained`, which are read as they are written. part: question_encoder,
    context_encoder or generator. tokenizers_from: a directory with `encoder` and `generator`, as a run has it.
    original: file name -> content of the configuration files to keep what has no place here (see `provenance`).
    shard_bytes: of weights in one file, also of a part and of the context encoder's folder. InputError for what
    transformers has no class for.
    """
    if part is not None and part not in SIDES:
        raise InputError(f"part {part!r} is not one of {', '.join(SIDES)}")
    if not isinstance(params, LazyParams):
        trees = params
        params = LazyParams(trees, lambda side: iter(flatten_dict(trees[side], sep="/").items()))
    original = original or {}
    config = original.get(CONFIG, {})
    out = Path(path)
    with files.new_directory(out, KIND, overwrite=overwrite) as temporary:
        if part is None and rag.config.generator is not None:
            write_rag(temporary, rag, params, config, context_inside, shard_bytes)
            roles = dict(TOKENIZERS)
        elif part == "generator":
            write_generator(temporary, rag.config.reader, params, config.get("generator", {}), shard_bytes)
            roles = {"generator": ""}
        else:
            side = part or "question_encoder"
            if side == "context_encoder" and not rag.config.context_encoder:
                raise InputError("this model has no context encoder")
            write_encoder(temporary, rag, params, side, config.get("question_encoder", {}), shard_bytes)
            roles = {"encoder": ""}
        if tokenizers_from is not None:
            for role, folder in roles.items():
                tokenizers.load(Path(tokenizers_from) / role).save(temporary / folder)
        if GENERATION in original and (part in (None, "generator")):
            write_json(temporary / GENERATION, original[GENERATION])
        files.write_manifest(temporary, KIND, VERSION, {})
    return out


def provenance(directory: Path) -> dict[str, dict[str, Any]]:
    """The configuration files that a run's parameters came with, for `save_pretrained`; {} for one trained from
    scratch.
    """
    folder = directory / runs.PROVENANCE
    files.check_listed(folder)
    return {path.name: read_json(path) for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}


def write_run(source: Source, out: Path, mesh: jax.sharding.Mesh, overwrite: bool = False) -> dict[str, Any]:
    """Convert: a directory in the form of a run with no stages, so that every command that takes a run takes it."""
    report = Report()
    with files.new_directory(out, "converted model", overwrite=overwrite) as temporary:
        found = {role: source.tokenizer_directory(role) for role in TOKENIZERS}
        identity: dict[str, Any] = {"corpus_hash": ""}
        for role, directory in found.items():
            if directory is not None:
                tokenizer = tokenizers.load(directory)
                tokenizer.save(temporary / "tokenizers" / role)
                identity[f"{role}_tokenizer"] = tokenizers.load(temporary / "tokenizers" / role).hash
        runs.write_empty_run(temporary, source.model, identity)
        checkpoint.save_params(temporary / "params", source.params(mesh, report).items())
        folder = temporary / runs.PROVENANCE
        folder.mkdir()
        whole = source.directories.get("")
        if whole is not None:
            write_json(folder / CONFIG, read_json(whole / CONFIG))
        else:
            keys = [side for side in ("question_encoder", "generator") if side in source.directories]
            write_json(folder / CONFIG, {key: read_json(source.directories[key] / CONFIG) for key in keys})
        settings = (whole or source.directories.get("generator", out)) / GENERATION
        if settings.is_file():
            write_json(folder / GENERATION, read_json(settings))
        files.write_manifest(temporary, "converted model", VERSION, {})
        # not among the files of the manifest: rag-jax evaluate may write its own report over it
        write_json(
            temporary / "report.json",
            report.summary() | {"tied_names": report.tied, "ignored_names": report.ignored} | source.account.summary(),
        )
    missing = [role for role, directory in found.items() if directory is None]
    known = {"out": str(out), "variant": source.model.variant, "no_tokenizer_for": missing}
    return report.summary() | known | source.account.summary()
