"""A model in Hugging Face directories: its configuration, tokenizers, lengths, prefixes and parameters."""

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
from rag_jax.pretrained.parts import ModelPart
from rag_jax.pretrained.weights import LazyParams, WeightReport, check_names, in_type, read_part
from rag_jax.rag import Rag, RagConfig
from rag_jax.runs import directory as runs

TOKENIZERS = {"encoder": "question_encoder_tokenizer", "generator": "generator_tokenizer"}


@dataclass(frozen=True)
class ModelSource:
    """A model in Hugging Face directories, opened but with its tensors not yet read.

    model: its configuration.
    parts: those of question encoder, context encoder and generator that it has.
    directories: side -> directory; the key "" stands for the directory of a whole RAG model.
    account: which settings of the files were honoured, had no effect, or were left out.
    """

    model: RagConfig
    parts: list[ModelPart]
    directories: dict[str, Path]
    account: Account = field(default_factory=Account)

    @property
    def answering(self) -> dict[str, Any]:
        """The fields of AnswerConfig that the checkpoint sets, by name."""
        return {name: value for part in self.parts for name, value in part.answering.items()}

    def tokenizer_directory(self, role: str) -> Path | None:
        """The directory with the tokenizer of `role`, or None.

        role: encoder, generator, or context (the context encoder's own, if it has one).
        """
        whole = self.directories.get("")
        if role == "context":
            folder = self.directories.get("context_encoder", whole and whole / "context_encoder")
        elif whole is not None:
            folder = whole / TOKENIZERS[role]
        elif role == "generator" and "generator" not in self.directories:
            folder = self.directories["question_encoder"]  # a retriever alone; a corpus needs a tokenizer for both
        else:
            folder = self.directories["question_encoder" if role == "encoder" else "generator"]
        folders = () if folder is None else (folder, encoder_files.transformer_directory(folder))
        marks = (tokenizers.TOKENIZER_FILE, tokenizers.CONFIG_FILE, "vocab.txt", "vocab.json", "spiece.model")
        return next((folder for folder in folders if any((folder / mark).is_file() for mark in marks)), None)

    def encoding(self, asked: Asked) -> "ModelSource":
        """The source with lengths and prefixes set: those of `asked`, else of the files of encoders and tokenizer.

        InputError for a setting that cannot be honoured.
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
        """Records the settings of the tokenizers; InputError if the context encoder's own one gives other token ids.

        A corpus has one table of token ids for the encoders, so both must read the same ids.
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

    def resized(self, n_docs: int, source_length: int) -> "ModelSource":
        """The source with another number of documents and length of the generator's input in tokens; 0 keeps each."""
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

    def params(self, mesh: jax.sharding.Mesh, report: WeightReport, dtype: str = "float32") -> LazyParams:
        """The parameters in `dtype`, sharded over the mesh; adds to the report what is read.

        Names and shapes of all tensors are checked first, so that an error comes before the first one is read.
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
    """Whether the tokenizer lower-cases its input."""
    one, other = tokenizer.encode_batch(["The CAT sat In Āþens", "the cat sat in āþens"])
    return one == other


def same_files(one: Path, other: Path) -> bool:
    """Whether two directories have the same tokenizer.json and tokenizer_config.json, byte for byte."""
    names = (tokenizers.TOKENIZER_FILE, tokenizers.CONFIG_FILE)
    if not all((folder / name).is_file() for folder in (one, other) for name in names):
        return one == other
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
