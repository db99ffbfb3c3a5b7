"""A model read from Hugging Face directories: its configuration, tokenizers, lengths and prefixes, its parameters."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from rag_jax.data import tokenizers
from rag_jax.data.tokenizer_difference import difference
from rag_jax.errors import InputError
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf import tokenizer as tokenizer_settings
from rag_jax.models.hf.sentence import Layout
from rag_jax.models.hf.settings import Account
from rag_jax.pretrained import encoder_files
from rag_jax.pretrained.encoder_files import Asked
from rag_jax.pretrained.hub import read_json
from rag_jax.pretrained.parts import Part
from rag_jax.pretrained.weights import LazyParams, Report, check_names, in_type, read_part
from rag_jax.rag import Rag, RagConfig
from rag_jax.runs import directory as runs

TOKENIZERS = {"encoder": "question_encoder_tokenizer", "generator": "generator_tokenizer"}


@dataclass(frozen=True)
class Source:
    """A model read from Hugging Face directories, and what else was there."""

    model: RagConfig
    parts: list[Part]
    directories: dict[str, Path]  # side -> directory; "" for that of the whole
    account: Account = field(default_factory=Account)

    @property
    def answering(self) -> dict[str, Any]:
        """Fields of AnswerConfig that the checkpoint says."""
        return {name: value for part in self.parts for name, value in part.answering.items()}

    def tokenizer_directory(self, role: str) -> Path | None:
        """Where the tokenizer of `encoder`, `generator` or `context` is, or None; context: where the context encoder
        has files of its own for it.
        """
        whole = self.directories.get("")
        if role == "context":
            folder = self.directories.get("context_encoder", whole and whole / "context_encoder")
        elif whole is not None:
            folder = whole / TOKENIZERS[role]
        elif role == "generator" and "generator" not in self.directories:
            folder = self.directories["question_encoder"]  # a retriever alone: a corpus needs both
        else:
            folder = self.directories["question_encoder" if role == "encoder" else "generator"]
        folders = () if folder is None else (folder, encoder_files.transformer_directory(folder))
        marks = (tokenizers.TOKENIZER_FILE, tokenizers.CONFIG_FILE, "vocab.txt", "vocab.json", "spiece.model")
        return next((folder for folder in folders if any((folder / mark).is_file() for mark in marks)), None)

    def encoding(self, asked: Asked) -> "Source":
        """With lengths and prefixes as asked, or as the files of the encoders and of their tokenizer say; each honoured
        or refused.
        """
        found = {side: part.layout for part in self.parts if (side := part.side) != "generator"}
        question, context = found["question_encoder"], found.get("context_encoder", found["question_encoder"])
        if question.pool_prefix != context.pool_prefix:
            raise InputError("one encoder pools its prompt (include_prompt) and the other does not; both must be alike")
        folder = self.tokenizer_directory("encoder")
        self.check_tokenizers(folder)
        query = question.query_prefix if asked.query_prefix is None else asked.query_prefix
        passage = context.passage_prefix if asked.passage_prefix is None else asked.passage_prefix
        model = dataclasses.replace(
            self.model, query_prefix=query, passage_prefix=passage, pool_prefix=question.pool_prefix
        )
        if query or passage or question.lower_case or context.lower_case:
            if folder is None:
                raise InputError("prompts and do_lower_case need the encoder's tokenizer beside its weights")
            tokenizer = tokenizers.load(folder)
            model = dataclasses.replace(
                model,
                query_prefix_ids=tokenizers.before(tokenizer, query),
                passage_prefix_ids=tokenizers.before(tokenizer, passage),
            )
            if (question.lower_case or context.lower_case) and not lowers(tokenizer):
                raise InputError(
                    f"{folder}: do_lower_case is set for texts, and the tokenizer keeps capitals; save it as one that "
                    "lower-cases"
                )
        limits = [model.encoder.positions, *([encoder_files.token_limit(folder)] if folder else [])]

        def length(named: int, layout: Layout, prefix: tuple[int, ...]) -> int:
            longest = min(limit for limit in (*limits, layout.length) if limit)
            if named + len(prefix) > model.encoder.positions:
                raise InputError(f"length {named} is more than the {model.encoder.positions} positions of the encoder")
            return named or longest - len(prefix)

        model = dataclasses.replace(
            model,
            question_length=length(asked.question_length, question, model.query_prefix_ids),
            passage_length=length(asked.passage_length, context, model.passage_prefix_ids),
        )
        return dataclasses.replace(self, model=model)

    def check_tokenizers(self, encoder: Path | None) -> None:
        """Accounts for the settings of the tokenizers; InputError where the context encoder has one of its own that
        reads a text otherwise: a corpus has one table of ids, and both encoders one vocabulary.
        """
        generator, own = (self.tokenizer_directory(role) for role in ("generator", "context"))
        tables = {generator: tokenizer_settings.READER, encoder: tokenizer_settings.TOKENIZER}
        for folder, table in tables.items():
            for name in (tokenizers.CONFIG_FILE, tokenizers.SPECIALS_FILE):
                if folder is not None and (folder / name).is_file():
                    self.account.read(read_json(folder / name), table, str(folder / name))
        if own is None or encoder is None or same_files(own, encoder):
            return
        if differ := difference(tokenizers.load(encoder), tokenizers.load(own)):
            raise InputError(
                f"{own}: the context encoder has a tokenizer of its own, which differs from that of the question "
                f"encoder ({encoder}) in {differ}; here both read the same ids. Use encoders with one tokenizer"
            )

    def resized(self, n_docs: int, source_length: int) -> "Source":
        """With other settings of the model; 0 leaves them."""
        model = dataclasses.replace(
            self.model,
            n_docs=n_docs or self.model.n_docs,
            source_length=source_length or self.model.source_length,
        )
        if isinstance(model.generator, LmConfig) and 0 < model.generator.window < model.source_length:
            raise InputError(
                f"the generator attends to a window of {model.generator.window} tokens, and model.source_length is "
                f"{model.source_length}; inputs shorter than the window are the same without it: pass --source-length, "
                "with room for the answer too"
            )
        return dataclasses.replace(self, model=model)

    def params(self, mesh: jax.sharding.Mesh, report: Report, dtype: str = "float32") -> LazyParams:
        """The parameters, each in its type and on its shards; what is wrong with any of them is said before the first
        is read. Fills the report.
        """
        places = in_type(runs.param_places(Rag(self.model), mesh), dtype)
        for tensors in {id(part.tensors): part.tensors for part in self.parts}.values():
            check_names([part for part in self.parts if part.tensors is tensors], tensors, places)
        report.parameters += sum(leaf.size for leaf in jax.tree.leaves(places))
        parts = {part.side: part for part in self.parts}
        largest_first = sorted(parts, key=lambda side: side != "generator")
        return LazyParams(
            {side: places[side] for side in largest_first},
            lambda side: read_part(parts[side], places[side], report),
        )


def lowers(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether capitals make no difference to it."""
    one, other = tokenizer.encode_batch(["The CAT sat In Āþens", "the cat sat in āþens"])
    return one == other


def same_files(one: Path, other: Path) -> bool:
    """Whether two tokenizer directories hold the same tokenizer.json, byte for byte, of one class."""
    names = (tokenizers.TOKENIZER_FILE, tokenizers.CONFIG_FILE)
    if not all((folder / name).is_file() for folder in (one, other) for name in names):
        return one == other
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
