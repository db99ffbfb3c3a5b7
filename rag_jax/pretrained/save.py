"""Models written: directories that transformers loads, and converted ones in the form of a run."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from rag_jax.corpus.build import INPUTS
from rag_jax.data import tokenizers
from rag_jax.errors import InputError
from rag_jax.models.bert import BertConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf import ENCODERS, GENERATORS, composite, generation, naming, sentence
from rag_jax.models.hf import decoder_only as decoder_only_models
from rag_jax.models.hf.bart import without_logit_scale
from rag_jax.models.hf.naming import Family, spell
from rag_jax.models.hf.sentence import Layout
from rag_jax.models.special_tokens import SpecialTokens
from rag_jax.pretrained.encoder_files import BY_ARCHITECTURE, sentence_files, transformer_directory
from rag_jax.pretrained.load import (
    ARCHITECTURES,
    CONFIG,
    EXPORTED,
    GENERATION,
    SIDES,
    TOKENIZERS,
    LazyParams,
    Report,
    Source,
    read_json,
)
from rag_jax.pretrained.tensor_files import SHARD_BYTES, Shapes, write_tensors
from rag_jax.rag import GeneratorConfig, Params, Rag, RagConfig
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.system import files

KIND, VERSION = EXPORTED, 1
TOKENIZER_SETTINGS = "tokenizers.json"  # role -> files of settings that its tokenizer came with, name -> content
SENTENCE = "sentence_transformers.json"  # side -> files of sentence-transformers that it came with, path -> content


def family_name(config: GeneratorConfig) -> str:
    """The model_type that a generator is written as."""
    if isinstance(config, LmConfig):
        return decoder_only_models.lm_family(config)
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


def describe_part(
    kind: str,
    family: Family,
    config: Any,
    original: dict[str, Any],
    beside: dict[str, Any] | None = None,
    read: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of one part: `original`, where the part came from one, and over it only what is no longer as that
    says. beside: the generation_config.json that came with it. read: what was read, if not the original alone.
    """
    model_type, now = {"dpr_context": "dpr"}.get(kind, kind), family.describe(config)
    named = {"model_type": model_type, "architectures": [family.architecture]}
    if not original or original.get("model_type", model_type) != model_type:
        return now | named
    was = first_form(family, config, read or original, beside)
    differ = {key: value for key, value in now.items() if value != was.get(key)}
    return original | differ | named


def first_form(family: Family, config: Any, original: dict[str, Any], beside: dict[str, Any] | None) -> dict[str, Any]:
    """What `family.describe` said of the part as it came. Tokens that a tokenizer gave are no change."""
    names = {entry.theirs for entry in family.entries(config)}
    first = family.adapt(family.config(generation.tokens(original, beside), CONFIG), names)
    if isinstance(config, SpecialTokens) and config.tokens_from == "tokenizer":
        first = dataclasses.replace(
            first, **{f.name: getattr(config, f.name) for f in dataclasses.fields(SpecialTokens)}
        )
    return family.describe(first)


def describe_generation(
    config: GeneratorConfig,
    family: Family,
    original: dict[str, Any],
    beside: dict[str, Any] | None,
    answering: Mapping[str, Any],
) -> dict[str, Any]:
    """generation_config.json: the one that came, and over it only what is no longer as it was; {} for no file."""
    decoder_only, now = isinstance(config, LmConfig), naming.describe_tokens(config)
    given = beside if beside is not None else original
    differ = generation.changed(given, answering, decoder_only)
    if original:
        was = first_form(family, config, original, beside)
        said = family.describe(config)
        differ |= {key: now[key] for key in now if key in said and said[key] != was.get(key)}
    if beside is None and differ:  # as there is a file now, it alone is read
        beside = generation.of_config(original) if original else {k: v for k, v in now.items() if v is not None}
    return (beside or {}) | differ


def encoder_kind(config: BertConfig, side: str, original: dict[str, Any]) -> str:
    """bert where it came from one, or pools otherwise than DPR: the first token's vector, as it comes."""
    if original.get("model_type") == "bert" or config.pooling != "cls" or config.vector_norm:
        return "bert"
    return "dpr" if side == "question_encoder" else "dpr_context"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_encoder(
    out: Path,
    rag: Rag,
    params: LazyParams,
    side: str,
    original: dict[str, Any],
    shard_bytes: int,
    beside: dict[str, Any] | None = None,
) -> None:
    """A directory for DPRQuestionEncoder, DPRContextEncoder, BertModel or sentence-transformers. beside: the files of
    the last that the encoder came with.
    """
    model, config = rag.config, rag.config.encoder
    if side == "context_encoder" and not model.tie_encoders:  # dropout is each encoder's own
        theirs = {"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
        config = dataclasses.replace(
            config, **{ours: original.get(key, getattr(config, ours)) for ours, key in theirs.items()}
        )
    kind = encoder_kind(config, side, original)
    family = ENCODERS[kind]
    described = describe_part(kind, family, config, original)
    names = original.get("architectures") or []
    if config.pooling == "mean" and names and set(names) <= set(BY_ARCHITECTURE) and kind == "bert":
        described["architectures"] = names  # Contriever's name says how it pools
    out.mkdir(parents=True, exist_ok=True)
    layout = layout_of(model, side)
    plain = Layout(pooling="cls", length=layout.length)
    if kind == "bert" and (beside or layout != plain):
        if config.projection:
            raise InputError("an encoder with a projection and pooling='mean' has no form at Hugging Face")
        for path, content in sentence.write_layout(layout, config.width, beside or {}).items():
            (out / path).parent.mkdir(exist_ok=True)
            write_json(out / path, content)
    elif layout != plain:
        raise InputError("DPR has no place for a prefix before its questions and passages; this encoder has one")
    write_json(out / CONFIG, described)
    own = "question_encoder" if model.tie_encoders else side
    write_pieces(out, [Piece(own, family, config)], params, shard_bytes)


def layout_of(model: RagConfig, side: str) -> Layout:
    """What sentence-transformers' files say of an encoder of the model; of two with one set of files, both."""
    longest = model.question_length + len(model.query_prefix_ids)
    if side == "context_encoder" and not model.tie_encoders:
        longest = model.passage_length + len(model.passage_prefix_ids)
    return Layout(
        pooling=model.encoder.pooling,
        normalise=bool(model.encoder.vector_norm),
        length=longest,
        query_prefix=model.query_prefix,
        passage_prefix=model.passage_prefix,
        pool_prefix=model.pool_prefix,
    )


def write_generator(
    out: Path,
    config: GeneratorConfig,
    params: LazyParams,
    original: dict[str, Any],
    beside: dict[str, Any] | None,
    answering: Mapping[str, Any],
    shard_bytes: int,
) -> None:
    """A directory for the generator's own class. beside: the generation_config.json that came with it."""
    kind = original.get("model_type") or family_name(config)
    family = GENERATORS[kind]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, describe_part(kind, family, config, original, beside))
    if said := describe_generation(config, family, original, beside, answering):
        write_json(out / GENERATION, said)
    write_pieces(out, [Piece("generator", family, config)], params, shard_bytes)


def write_rag(
    out: Path,
    rag: Rag,
    params: LazyParams,
    original: dict[str, Any],
    beside: dict[str, Any] | None,
    answering: Mapping[str, Any],
    context_inside: bool,
    shard_bytes: int,
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
    if encoder_kind(model.encoder, "question_encoder", {}) != "dpr":
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
    came = original if original.get("model_type") == "rag" else {}
    first = composite.over(came, parts["generator"]) if came else parts["generator"]
    described = {
        "question_encoder": describe_part("dpr", ENCODERS["dpr"], model.encoder, parts["question_encoder"]),
        "generator": describe_part(kind, GENERATORS[kind], generator, parts["generator"], beside, first),
    }
    whole = composite.describe(model, came, described, naming.describe_tokens(generator))
    whole["architectures"] = [name for name, variant in ARCHITECTURES.items() if variant == model.variant]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, whole)
    if said := describe_generation(generator, GENERATORS[kind], first, beside, answering):
        write_json(out / GENERATION, said)
    write_pieces(out, pieces, params, shard_bytes)
    if model.context_encoder and not context_inside:
        write_encoder(
            out / "context_encoder", rag, params, "context_encoder", original.get("context_encoder") or {}, shard_bytes
        )


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
    answering: Mapping[str, Any] | None = None,
) -> Path:
    """Write a directory that transformers loads: RagSequenceForGeneration or RagTokenForGeneration, or one part alone.

    params: a tree, or those of `open_pretrained`, which are read as they are written. part: question_encoder,
    context_encoder or generator. tokenizers_from: a directory with `encoder` and `generator`, as a run has it.
    original: file name -> content of the configuration files to keep what has no place here (see `provenance`).
    shard_bytes: of weights in one file, also of a part and of the context encoder's folder. answering: of the run's
    configuration, for generation_config.json. InputError for what transformers has no class for.
    """
    if part is not None and part not in SIDES:
        raise InputError(f"part {part!r} is not one of {', '.join(SIDES)}")
    if not isinstance(params, LazyParams):
        trees = params
        params = LazyParams(trees, lambda side: iter(flatten_dict(trees[side], sep="/").items()))
    original = original or {}
    config, beside = original.get(CONFIG, {}), original.get(GENERATION)
    answering = answering or {}
    out = Path(path)
    with files.new_directory(out, KIND, overwrite=overwrite) as temporary:
        if part is None and rag.config.generator is not None:
            write_rag(temporary, rag, params, config, beside, answering, context_inside, shard_bytes)
            roles = dict(TOKENIZERS)
        elif part == "generator":
            first = config.get("generator", {})
            first = composite.over(config, first) if config.get("model_type") == "rag" else first
            write_generator(temporary, rag.config.reader, params, first, beside, answering, shard_bytes)
            roles = {"generator": ""}
        else:
            side = part or "question_encoder"
            if side == "context_encoder" and not rag.config.context_encoder:
                raise InputError("this model has no context encoder")
            theirs = config.get(side) or config.get("question_encoder", {})
            files_beside = original.get(SENTENCE, {}).get(side) or original.get(SENTENCE, {}).get("question_encoder")
            write_encoder(temporary, rag, params, side, theirs, shard_bytes, files_beside)
            roles = {"encoder": ""}
        if tokenizers_from is not None:
            for role, folder in roles.items():
                tokenizers.load(Path(tokenizers_from) / role).save(temporary / folder)
                for name, content in original.get(TOKENIZER_SETTINGS, {}).get(role, {}).items():
                    write_json(temporary / folder / name, content)
        files.write_manifest(temporary, KIND, VERSION, {})
    return out


def provenance(directory: Path) -> dict[str, dict[str, Any]]:
    """The configuration files that a run's parameters came with, for `save_pretrained`; {} for one trained from
    scratch.
    """
    folder = directory / runs.PROVENANCE
    files.check_listed(folder)
    return {path.name: read_json(path) for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}


def without(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Settings less the keys that were left out, those of parts too."""
    kept = {key: value for key, value in settings.items() if key not in keys}
    return {key: without(value, keys) if isinstance(value, Mapping) else value for key, value in kept.items()}


def tokenizer_settings(directory: Path, saved: Path) -> dict[str, Any]:
    """The files of settings beside a tokenizer.json, name -> content, where it is the one that was saved here: they go
    with it into an export. {} where the tokenizer was made of other files, which an export does not have.
    """
    path = directory / tokenizers.TOKENIZER_FILE
    if not path.is_file():
        return {}
    one, other = read_json(path), read_json(saved / tokenizers.TOKENIZER_FILE)
    calls = {"truncation": None, "padding": None}  # of a call, as it was last used
    names = (tokenizers.CONFIG_FILE, tokenizers.SPECIALS_FILE)
    if one | calls != other | calls:
        return {}
    return {name: read_json(directory / name) for name in names if (directory / name).is_file()}


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
        kept = {role: tokenizer_settings(home, temporary / "tokenizers" / role) for role, home in found.items() if home}
        if found["encoder"] is not None:
            write_json(temporary / "tokenizers" / INPUTS, {"encoder_length": source.model.passage_length})
        runs.write_empty_run(temporary, source.model, identity, source.answering)
        checkpoint.save_params(temporary / "params", source.params(mesh, report).items())
        folder = temporary / runs.PROVENANCE
        folder.mkdir()
        whole, left_out = source.directories.get(""), source.account.ignore
        if whole is not None:
            write_json(folder / CONFIG, without(read_json(whole / CONFIG), left_out))
        else:
            homes = {side: transformer_directory(home) for side, home in source.directories.items()}
            came: dict[str, Any] = {side: read_json(home / CONFIG) for side, home in homes.items()}
            write_json(folder / CONFIG, without(came, left_out))
        beside = {side: sentence_files(home) for side, home in source.directories.items() if side in SIDES[:2]}
        if any(kept.values()):
            write_json(folder / TOKENIZER_SETTINGS, without(kept, left_out))
        if any(beside.values()):
            write_json(folder / SENTENCE, without(beside, left_out))
        settings = (whole or source.directories.get("generator", out)) / GENERATION
        if settings.is_file():
            write_json(folder / GENERATION, without(read_json(settings), left_out))
        files.write_manifest(temporary, "converted model", VERSION, {})
        # not among the files of the manifest: rag-jax evaluate may write its own report over it
        write_json(
            temporary / "report.json",
            report.summary() | {"tied_names": report.tied, "ignored_names": report.ignored} | source.account.summary(),
        )
    missing = [role for role, directory in found.items() if directory is None]
    model = source.model
    known = {"out": str(out), "variant": model.variant, "no_tokenizer_for": missing, "pooling": model.encoder.pooling}
    for name in ("question_length", "passage_length", "query_prefix", "passage_prefix"):
        known[name] = getattr(model, name)
    return report.summary() | known | source.account.summary()
