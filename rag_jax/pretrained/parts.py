"""Opening the parts of a RAG model: the family, the configuration and the tensors of each.

Every key of config.json and generation_config.json is honoured, known to have no effect here, or refused.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rag_jax.errors import InputError
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf import ENCODERS, GENERATORS, composite, decoder_only, generation
from rag_jax.models.hf.naming import HfFamily
from rag_jax.models.hf.sentence import Layout
from rag_jax.models.hf.settings import Account
from rag_jax.pretrained import encoder_files
from rag_jax.pretrained.encoder_files import Asked
from rag_jax.pretrained.hub import CONFIG, GENERATION, read_json
from rag_jax.pretrained.tensor_files import Tensors, open_tensors
from rag_jax.rag import RagConfig

ARCHITECTURES = {"RagSequenceForGeneration": "sequence", "RagTokenForGeneration": "token"}
SIDES = ("question_encoder", "context_encoder", "generator")
ENCODER, GENERATOR = "model.encoder.", "model.generator."  # prefixes of a part's settings in our configuration


class ModelPart(NamedTuple):
    """One of the three models of a RAG model: question encoder, context encoder or generator.

    side: one of SIDES.
    family: names and settings of its architecture at Hugging Face.
    config: its configuration here.
    tensors: the checkpoint that holds its tensors.
    base: prefix of the names of its tensors in that checkpoint.
    answering: fields of AnswerConfig that a generator's files set.
    layout: settings of an encoder that are in sentence-transformers' files.
    """

    side: str
    family: HfFamily
    config: Any
    tensors: Tensors
    base: str
    answering: Mapping[str, Any] = MappingProxyType({})
    layout: Layout = Layout()


def encoder_part(directory: Path, side: str, account: Account | None = None, asked: Asked | None = None) -> ModelPart:
    """Opens a question or context encoder in its own directory: DPR, BERT, or BERT with sentence-transformers' files.

    InputError for another model_type, and for DPR's encoder of the other side.
    """
    account, asked, whole = account or Account(), asked or Asked(), directory
    directory = encoder_files.transformer_directory(directory)
    config, where = read_json(directory / CONFIG), str(directory / CONFIG)
    tensors = open_tensors(directory)
    kind = config.get("model_type")
    if kind == "dpr":
        theirs = "ctx_encoder." if any(name.startswith("ctx_encoder.") for name in tensors.shapes) else ""
        family = ENCODERS["dpr_context" if theirs else "dpr"]
        other = "context_encoder" if theirs else "question_encoder"
        if any(name.startswith("span_predictor.") for name in tensors.shapes):
            raise InputError(f"{directory}: a DPR reader, not an encoder")
        if other != side:
            raise InputError(f"{directory}: a DPR {other.replace('_', ' ')}, given as {side.replace('_', ' ')}")
    elif kind == "bert":
        family = ENCODERS["bert"]
    else:
        raise InputError(f"{where}: model_type={kind!r} cannot be the {side.replace('_', ' ')}; known: bert, dpr")
    layout = encoder_files.read_layout(whole, account)
    config = account.read(config, family.settings, where, ENCODER)
    pooling = encoder_files.pooling_of(layout, config, where, asked) if kind == "bert" else asked.pooling or "cls"
    encoder = dataclasses.replace(
        family.config(config, where),
        pooling=pooling,
        vector_norm=1.0 if layout.normalise else 0.0,
    )
    return ModelPart(side, family, encoder, tensors, "", layout=layout)


def generator_part(directory: Path, account: Account | None = None) -> ModelPart:
    """Opens a generator in its own directory."""
    account = account or Account()
    config, where = read_json(directory / CONFIG), str(directory / CONFIG)
    family = pick(GENERATORS, config, where)
    settings, beside = family.settings, generation_beside(directory, family, account)
    known = settings if beside is None else generation.superseded(settings)
    config = account.read(config, known, where, GENERATOR)
    tensors = open_tensors(directory)
    made = family.adapt(family.config(generation.tokens(config, beside), where), tensors.shapes)
    answering = generation.answering(config if beside is None else beside, isinstance(made, LmConfig))
    return ModelPart("generator", family, made, tensors, "", answering)


def generation_beside(directory: Path, family: HfFamily, account: Account) -> dict[str, Any] | None:
    """The content of a generator's generation_config.json, its settings recorded; None where there is none."""
    path = directory / GENERATION
    if not path.is_file():
        return None
    table = generation.GENERATION_LM if family in decoder_only.FAMILIES.values() else generation.GENERATION
    return account.read(read_json(path), table, str(path), GENERATOR)


def pick(families: dict[str, HfFamily], config: dict[str, Any], where: str) -> HfFamily:
    """The family with the model_type of the config; InputError where it is not among them."""
    kind = config.get("model_type")
    if kind not in families:
        raise InputError(f"{where}: model_type={kind!r} is not one of {', '.join(families)}")
    return families[kind]


def rag_parts(
    directory: Path,
    variant: str | None,
    change_variant: bool,
    account: Account | None = None,
    asked: Asked | None = None,
) -> tuple[RagConfig, list[ModelPart]]:
    """Opens a RagSequenceForGeneration or RagTokenForGeneration directory: the model's configuration and its parts."""
    return rag_parts_of(directory, read_json(directory / CONFIG), None, variant, change_variant, account, asked)


def rag_parts_of(
    directory: Path,
    config: dict[str, Any],
    tensors: Tensors | None,
    variant: str | None,
    change_variant: bool,
    account: Account | None = None,
    asked: Asked | None = None,
) -> tuple[RagConfig, list[ModelPart]]:
    """As `rag_parts`, with config.json already read; tensors: those of the directory, None to open them."""
    account, where = account or Account(), str(directory / CONFIG)
    beside = generation_beside(directory, GENERATORS["bart"], account)
    known = composite.RAG if beside is None else generation.superseded(composite.RAG)
    config = account.read(config, known, where, "model.")
    answering: dict[str, Any] = {}
    tensors = tensors or open_tensors(directory)
    parts = []
    for key in ("question_encoder", "generator"):
        sub = config.get(key)
        if not isinstance(sub, dict):
            raise InputError(f"{where}: {key} is missing; a RAG configuration holds those of its parts")
        default = {"question_encoder": "dpr", "generator": "bart"}[key]
        families = {"dpr": ENCODERS["dpr"]} if key == "question_encoder" else GENERATORS
        family = pick(families, {"model_type": default} | sub, f"{where}: {key}")
        base = f"rag.{key}."
        names = {name.removeprefix(base) for name in tensors.shapes if name.startswith(base)}
        if key == "generator":
            settings = family.settings if beside is None else generation.superseded(family.settings)
            sub = composite.over(config, account.read(sub, settings, f"{where}: {key}", GENERATOR))
            answering = generation.answering(sub if beside is None else beside, False)
            sub = generation.tokens(sub, beside)
        else:
            sub = account.read(sub, family.settings, f"{where}: {key}", ENCODER)
        made = family.adapt(family.config(sub, f"{where}: {key}"), names)
        parts.append(ModelPart(key, family, made, tensors, base, answering))
    if asked is not None and asked.pooling:
        parts[0] = parts[0]._replace(config=dataclasses.replace(parts[0].config, pooling=asked.pooling))
    encoder = parts[0].config
    own = any(name.startswith("rag.ctx_encoder.") for name in tensors.shapes)
    if own:
        parts.append(ModelPart("context_encoder", ENCODERS["dpr_context"], encoder, tensors, "rag.ctx_encoder."))
    elif (directory / "context_encoder" / CONFIG).is_file():
        parts.append(encoder_part(directory / "context_encoder", "context_encoder", account, asked))
    named = [ARCHITECTURES[name] for name in config.get("architectures") or [] if name in ARCHITECTURES]
    model = RagConfig(
        variant=choose_variant(directory, named[0] if named else None, variant, change_variant),  # type: ignore[arg-type]
        encoder=encoder,
        generator=parts[1].config,
        context_encoder=len(parts) == 3,
        n_docs=config.get("n_docs", 5),
        source_length=config.get("max_combined_length", 300),
    )
    return model, parts


def choose_variant(where: Path, stored: str | None, asked: str | None, change: bool) -> str:
    """The variant, "sequence" or "token": the one asked for, else the one stored.

    InputError where both are given and differ, unless `change`, and where neither is given.
    """
    if asked is not None and asked not in ARCHITECTURES.values():
        raise InputError(f"variant {asked!r} is not one of {', '.join(ARCHITECTURES.values())}")
    if stored is None and asked is None:
        raise InputError(
            f"{where}: names neither {' nor '.join(ARCHITECTURES)} as its architecture; "
            "say --variant sequence or --variant token"
        )
    if stored and asked and stored != asked and not change:
        raise InputError(
            f"{where}: trained as RAG-{stored.title()}, asked for as RAG-{asked.title()}; the weights fit both, but "
            "the answers differ: pass --change-variant (change_variant=True) if that is meant"
        )
    return asked or str(stored)
