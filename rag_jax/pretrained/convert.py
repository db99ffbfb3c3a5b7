"""Converts Hugging Face checkpoints to a run directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_jax.errors import InputError
from rag_jax.pretrained.as_run import write_run
from rag_jax.pretrained.combine import combine, open_source
from rag_jax.pretrained.encoder_files import Asked
from rag_jax.pretrained.hub import find
from rag_jax.system import sharding


def convert(
    out: Path,
    *,
    source: str | None = None,
    question_encoder: str | None = None,
    context_encoder: str | None = None,
    generator: str | None = None,
    variant: str | None = None,
    change_variant: bool = False,
    n_docs: int = 0,
    source_length: int = 0,
    asked: Asked | None = None,
    ignore: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the run directory `out` from a whole model, or from its parts; each is a directory or a hub name.

    source: a whole model. None: the model is combined from question_encoder and the other parts.
    context_encoder: may be given in both cases.
    variant: "sequence" or "token"; by default as stored.
    change_variant: allow another variant than the stored one.
    n_docs: documents a question; 0 for the stored number.
    source_length: tokens of the generator's input; 0 for the stored number.
    asked: settings of the encoder that take precedence over its files.
    ignore: keys of the files to leave out.
    overwrite: replace a model converted earlier.
    Returns the report of `write_run`.
    """
    asked = asked or Asked()
    if (source is None) == (question_encoder is None):
        raise InputError("give either SOURCE, a whole model, or --question-encoder and the other parts")
    for name in ("question_length", "passage_length"):
        length = getattr(asked, name)
        if length < 0 or 0 < length < 8:
            raise InputError(f"--{name.replace('_', '-')} {length}: at least 8 tokens")
    if source is not None:
        if generator:
            raise InputError("--generator is for --question-encoder; SOURCE has its own")
        context = find(context_encoder) if context_encoder else None
        model = open_source(find(source), variant, change_variant, context, tuple(ignore), asked)
    else:
        assert question_encoder is not None
        context, reader = (find(part) if part else None for part in (context_encoder, generator))
        question = find(question_encoder)
        model = combine(question, context, reader, variant or "sequence", tuple(ignore), asked)
    return write_run(model.resized(n_docs, source_length), out, sharding.make_mesh(), overwrite)
