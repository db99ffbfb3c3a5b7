"""Opens a whole model from one directory, or combines one from the directories of its parts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_jax.errors import InputError
from rag_jax.models.hf import ENCODERS, GENERATORS
from rag_jax.models.hf.settings import Account
from rag_jax.models.protocols import EncoderConfig
from rag_jax.pretrained import encoder_files
from rag_jax.pretrained.encoder_files import Asked
from rag_jax.pretrained.hub import CONFIG, read_json
from rag_jax.pretrained.parts import encoder_part, generator_part, rag_parts
from rag_jax.pretrained.source import ModelSource
from rag_jax.rag import RagConfig
from rag_jax.system.logs import info

OF_TRAINING = ("dropout", "attention_dropout")  # fields that matter in training alone, not for an encoder's vectors


def open_source(
    directory: Path,
    variant: str | None = None,
    change_variant: bool = False,
    context_encoder: Path | None = None,
    ignore: Sequence[str] = (),
    asked: Asked | None = None,
) -> ModelSource:
    """Opens a whole model from one directory: a RAG composite, or an encoder, which makes a retriever alone.

    variant, change_variant: see `from_pretrained`.
    context_encoder: the directory of one to use in place of the composite's own, if it has any.
    ignore: keys of the files to leave out, see `settings.Account`.
    asked: settings of the encoder that take precedence over its files.
    InputError for a generator alone.
    """
    account = Account(ignore)
    config = read_json(encoder_files.transformer_directory(directory) / CONFIG)
    kind = config.get("model_type")
    if kind == "rag":
        model, parts = rag_parts(directory, variant, change_variant, account, asked)
        directories = {"": directory}
        if context_encoder is not None:
            part = encoder_part(context_encoder, "context_encoder", account, asked)
            check_form(part.config, model.encoder, context_encoder, directory)
            model = dataclasses.replace(model, context_encoder=True)
            parts = [*(p for p in parts if p.side != part.side), part]
            directories["context_encoder"] = context_encoder
        return finished(ModelSource(model, parts, directories, account), asked)
    if kind in GENERATORS:
        raise InputError(
            f"{directory}: a generator alone ({kind}); put it together with encoders: rag-jax convert "
            f"--question-encoder A --context-encoder B --generator {directory} --out DIR"
        )
    return combine(directory, context_encoder, ignore=ignore, asked=asked)


def combine(
    question_encoder: Path,
    context_encoder: Path | None = None,
    generator: Path | None = None,
    variant: str = "sequence",
    ignore: Sequence[str] = (),
    asked: Asked | None = None,
    **settings: Any,
) -> ModelSource:
    """Combines one model from the directories of its parts.

    A single BERT encodes both questions and passages; DPR's two encoders are separate.
    generator: None for a retriever alone.
    ignore: keys of the files to leave out, see `settings.Account`.
    asked: settings of the encoder that take precedence over its files.
    settings: further fields of RagConfig.
    """
    account = Account(ignore)
    parts = [encoder_part(question_encoder, "question_encoder", account, asked)]
    directories = {"question_encoder": question_encoder}
    tied = context_encoder is None or context_encoder.resolve() == question_encoder.resolve()
    tied = tied and parts[0].family is ENCODERS["bert"]
    if context_encoder is not None and not tied:
        parts.append(encoder_part(context_encoder, "context_encoder", account, asked))
        check_form(parts[1].config, parts[0].config, context_encoder, question_encoder)
        directories["context_encoder"] = context_encoder
    if generator is not None:
        parts.append(generator_part(generator, account))
        directories["generator"] = generator
    encoder = parts[0].config
    model = RagConfig(
        variant=variant,  # type: ignore[arg-type]
        encoder=encoder,
        generator=parts[-1].config if generator is not None else None,
        tie_encoders=tied,
        context_encoder=tied or context_encoder is not None,
        **settings,
    )
    return finished(ModelSource(model, parts, directories, account), asked)


def finished(source: ModelSource, asked: Asked | None) -> ModelSource:
    """The source with lengths and prefixes set; InputError for a key to be ignored that no file has."""
    source = source.encoding(asked or Asked())
    source.account.check()
    return source


def check_form(context: EncoderConfig, question: EncoderConfig, context_from: Path, question_from: Path) -> None:
    """Raises InputError with the first field in which the two encoders differ, since here they share a configuration.

    Their dropout may differ: it matters in training alone, where the question encoder's is used for both.
    """
    pairs = zip(dataclasses.asdict(context).items(), dataclasses.asdict(question).values(), strict=True)
    for (name, ours), theirs in pairs:
        if ours == theirs:
            continue
        if name not in OF_TRAINING:
            raise InputError(
                f"{context_from}: the context encoder's {name} is {ours}, the question encoder's ({question_from}) is "
                f"{theirs}; both must have one form"
            )
        info(f"{name}: {theirs}, the question encoder's, for both encoders; {context_from} has {ours}")
