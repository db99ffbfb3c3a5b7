"""Writes a model of Hugging Face directories as a run directory without training stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rag_jax.corpus.build import INPUTS
from rag_jax.data import tokenizers
from rag_jax.pretrained.encoder_files import sentence_files, transformer_directory
from rag_jax.pretrained.hub import CONFIG, GENERATION, read_json, write_json
from rag_jax.pretrained.parts import SIDES
from rag_jax.pretrained.source import TOKENIZERS, ModelSource
from rag_jax.pretrained.weights import WeightReport
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.system import files

VERSION = 1
TOKENIZER_SETTINGS = "tokenizers.json"  # role -> {file name -> content} of its tokenizer's files of settings
SENTENCE = "sentence_transformers.json"  # side -> {path -> content} of its files of sentence-transformers


def write_run(source: ModelSource, out: Path, mesh: jax.sharding.Mesh, overwrite: bool = False) -> dict[str, Any]:
    """Writes the model as a run directory without stages, so that every command that takes a run takes it.

    Returns what `rag-jax convert` reports: counts of tensors, settings of the encoder, the fate of each setting.
    """
    report = WeightReport()
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


def provenance(directory: Path) -> dict[str, dict[str, Any]]:
    """The configuration files that a run's parameters came with, name -> content, for `save_pretrained`.

    {} for a model trained from scratch.
    """
    folder = directory / runs.PROVENANCE
    files.check_listed(folder)
    return {path.name: read_json(path) for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}


def without(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The settings without these keys, at every level."""
    kept = {key: value for key, value in settings.items() if key not in keys}
    return {key: without(value, keys) if isinstance(value, Mapping) else value for key, value in kept.items()}


def tokenizer_settings(directory: Path, saved: Path) -> dict[str, Any]:
    """The files of settings beside a tokenizer.json, name -> content, to go with it into an export.

    directory: where the tokenizer came from. saved: where it was saved here.
    {} where the saved tokenizer.json is not the one of `directory`: then it was built from other files, such as
    vocab.txt, which an export does not have.
    """
    path = directory / tokenizers.TOKENIZER_FILE
    if not path.is_file():
        return {}
    one, other = read_json(path), read_json(saved / tokenizers.TOKENIZER_FILE)
    calls = {"truncation": None, "padding": None}  # left from the last call of the tokenizer, so no difference
    names = (tokenizers.CONFIG_FILE, tokenizers.SPECIALS_FILE)
    if one | calls != other | calls:
        return {}
    return {name: read_json(directory / name) for name in names if (directory / name).is_file()}
