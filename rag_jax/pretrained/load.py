"""Models read: run directories, and those of Hugging Face, with no torch: DPR, BERT, sentence-transformers, BART, T5,
GPT-2, Llama and their RAG composites.

    config.json -> configuration; every tensor is loaded, known to be a copy or ignorable, or an error.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rag_jax.data import tokenizers
from rag_jax.data.tokenizer_difference import difference
from rag_jax.errors import InputError
from rag_jax.models.bert import BertConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf import ENCODERS, GENERATORS, composite, decoder_only, generation, naming
from rag_jax.models.hf import tokenizer as tokenizer_settings
from rag_jax.models.hf.naming import Family, spell
from rag_jax.models.hf.sentence import Layout
from rag_jax.models.hf.settings import Account
from rag_jax.pretrained import encoder_files
from rag_jax.pretrained.encoder_files import Asked
from rag_jax.pretrained.tensor_files import FLOATS, Tensors, open_tensors
from rag_jax.rag import Params, Rag, RagConfig
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.system import files, sharding
from rag_jax.system.logs import info

EXPORTED = "Hugging Face model"  # the kind in the manifest of what `saving` writes
CONFIG, GENERATION = "config.json", "generation_config.json"
ARCHITECTURES = {"RagSequenceForGeneration": "sequence", "RagTokenForGeneration": "token"}
SIDES = ("question_encoder", "context_encoder", "generator")
TOKENIZERS = {"encoder": "question_encoder_tokenizer", "generator": "generator_tokenizer"}
OF_TRAINING = ("dropout", "attention_dropout")  # fields of an encoder without effect on the vectors of a trained one
NAMED = 10  # names listed in an error
ENCODER, GENERATOR = "model.encoder.", "model.generator."  # where a part's settings go


class Part(NamedTuple):
    """One of the three models of a RAG model, and where its tensors are: under `base` in a checkpoint. answering: of a
    generator, how it answers by default (fields of AnswerConfig).
    """

    side: str
    family: Family
    config: Any
    tensors: Tensors
    base: str
    answering: Mapping[str, Any] = MappingProxyType({})
    layout: Layout = Layout()  # of an encoder: what its files say beside its configuration


@dataclass(frozen=True)
class LazyParams:
    """Parameters that need not be in memory: the shapes, types and shardings of each part, and a function that gives
    one part's (path with slashes, array), in any order.
    """

    places: dict[str, Any]  # side -> tree
    read: Callable[[str], Iterator[tuple[str, jax.Array]]]

    def items(self) -> Iterator[tuple[str, Any]]:
        """(side, parameters) of each part, one after another."""
        return ((side, unflatten_dict(dict(self.read(side)), sep="/")) for side in self.places)


@dataclass
class Report:
    """What became of the tensors of one or several checkpoints."""

    loaded: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    parameters: int = 0

    def summary(self) -> dict[str, Any]:
        counts = {name: len(getattr(self, name)) for name in ("loaded", "tied", "ignored", "zeros")}
        return counts | {"parameters": self.parameters}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError with the file where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a Hugging Face model directory has one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object")
    return found


def is_hugging_face(directory: Path) -> bool:
    """Whether the directory's config.json is one of transformers."""
    directory = encoder_files.transformer_directory(directory)
    return (directory / CONFIG).is_file() and "model_type" in read_json(directory / CONFIG)


def find(name_or_dir: str | Path) -> Path:
    """A local directory, else one downloaded from the hub (or its cache)."""
    directory = Path(name_or_dir)
    if directory.is_dir():
        files.check_listed(directory, suffixes=(*files.SMALL, ".safetensors"), below=True, kinds=(EXPORTED,))
        return directory
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", str(name_or_dir)):
        raise InputError(
            f"{name_or_dir}: no such directory; a run, a converted model or a Hugging Face model is wanted"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, patterns = str(name_or_dir), ["*.json", "*.safetensors", "*.txt", "*.model", "*/*.json", "*/*.txt"]
    try:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            tokenizers.check_hub(name)
            found = Path(snapshot_download(name, allow_patterns=patterns))
            if not any(found.glob("*.safetensors")):
                found = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
            return found
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{name_or_dir}: no such directory, and not to be had from the hub ({str(error).splitlines()[0]})"
        ) from error


def encoder_part(directory: Path, side: str, account: Account | None = None, asked: Asked | None = None) -> Part:
    """A question or context encoder from a directory of its own: DPR, BERT, or BERT as sentence-transformers has it."""
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
    return Part(side, family, encoder, tensors, "", layout=layout)


def generator_part(directory: Path, account: Account | None = None) -> Part:
    """A generator from a directory of its own."""
    account = account or Account()
    config, where = read_json(directory / CONFIG), str(directory / CONFIG)
    family = pick(GENERATORS, config, where)
    settings, beside = family.settings, generation_beside(directory, family, account)
    known = settings if beside is None else generation.superseded(settings)
    config = account.read(config, known, where, GENERATOR)
    tensors = open_tensors(directory)
    made = family.adapt(family.config(generation.tokens(config, beside), where), tensors.shapes)
    answering = generation.answering(config if beside is None else beside, isinstance(made, LmConfig))
    return Part("generator", family, made, tensors, "", answering)


def generation_beside(directory: Path, family: Family, account: Account) -> dict[str, Any] | None:
    """The content of a generator's generation_config.json, or None where there is none."""
    path = directory / GENERATION
    if not path.is_file():
        return None
    table = generation.GENERATION_LM if family in decoder_only.FAMILIES.values() else generation.GENERATION
    return account.read(read_json(path), table, str(path), GENERATOR)


def pick(families: dict[str, Family], config: dict[str, Any], where: str) -> Family:
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
) -> tuple[RagConfig, list[Part]]:
    """The model and the parts of a RagSequenceForGeneration or RagTokenForGeneration directory."""
    return rag_parts_of(directory, read_json(directory / CONFIG), None, variant, change_variant, account, asked)


def rag_parts_of(
    directory: Path,
    config: dict[str, Any],
    tensors: Tensors | None,
    variant: str | None,
    change_variant: bool,
    account: Account | None = None,
    asked: Asked | None = None,
) -> tuple[RagConfig, list[Part]]:
    """The same, from a configuration that was read, and tensors if they are open already."""
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
        parts.append(Part(key, family, made, tensors, base, answering))
    if asked is not None and asked.pooling:
        parts[0] = parts[0]._replace(config=dataclasses.replace(parts[0].config, pooling=asked.pooling))
    encoder = parts[0].config
    own = any(name.startswith("rag.ctx_encoder.") for name in tensors.shapes)
    if own:
        parts.append(Part("context_encoder", ENCODERS["dpr_context"], encoder, tensors, "rag.ctx_encoder."))
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
    """sequence or token: as stored, or as asked; InputError where the two differ and nobody said to change it."""
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


def spelling(part: Part) -> tuple[str, str]:
    """How this checkpoint writes the family's names: the spelling of which the most are there."""
    names = [entry.theirs for entry in part.family.entries(part.config)]

    def there(option: tuple[str, str]) -> int:
        return sum(stored_name(part, option, name) is not None for name in names)

    return max(part.family.spellings, key=there)


def check_names(parts: list[Part], tensors: Tensors, places: Any) -> None:
    """InputError with their names where tensors are missing, too many, or of another shape or type."""
    missing, known = [], set()
    for part in parts:
        option = spelling(part)
        shapes = {path: leaf.shape for path, leaf in flatten_dict(places[part.side], sep="/").items()}
        for entry in part.family.entries(part.config):
            name = stored_name(part, option, entry.theirs)
            if name is None:
                missing += [] if entry.theirs in part.family.zeros else [part.base + spell(option, entry.theirs)]
                continue
            known.add(name)
            found, kind = tensors.shapes[name]
            wanted = naming.their_shape(entry, [shapes[path] for path in entry.ours])
            if found != wanted:
                raise InputError(f"{tensors.where}: {name} is {found}, the configuration asks for {wanted}")
            if kind not in FLOATS.values():
                raise InputError(
                    f"{tensors.where}: {name} is of type {kind}; weights must be {', '.join(FLOATS.values())}"
                )
        known |= {part.base + name for name in copies(part, option)}
    left = [name for name in tensors.shapes if name not in known]
    left = [name for name in left if not any(ignores(part, name) for part in parts)]
    if missing:
        beside = f", and {listed(left)} there that it does not name" if left else ""
        raise InputError(
            f"{tensors.where}: {listed(missing)} missing{beside}; {CONFIG} and the weights must be of one model, whole"
        )
    if left:
        raise InputError(
            f"{tensors.where}: {listed(left)} not part of the model that {CONFIG} describes; "
            "is it the configuration of another checkpoint?"
        )


def stored_name(part: Part, option: tuple[str, str], theirs: str) -> str | None:
    """The name under which a checkpoint has a tensor of the table, None where it is not there: its own name, that of
    before LayerNorm's weight and bias were called so, or that of a tied copy where only the copy was saved.
    """
    own = spell(option, theirs)
    tied = [copy for copy, source in copies(part, option).items() if source == own]
    names = (part.base + name for name in (own, naming.older_name(own), *tied))
    return next((name for name in names if name in part.tensors.shapes), None)


def copies(part: Part, option: tuple[str, str]) -> dict[str, str]:
    """Names of tied copies, in every spelling, and the name of what they repeat."""
    table = part.family.copies(part.config)
    return {key: spell(option, value) for name, value in table.items() for key in {name, spell(option, name)}}


def ignores(part: Part, name: str) -> bool:
    return name.startswith(part.base) and part.family.ignores(name.removeprefix(part.base))


def listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'}"


def read_finite(tensors: Tensors, name: str) -> np.ndarray:
    tensor = tensors.read(name)
    if not np.isfinite(tensor.astype(np.float32, copy=False)).all():
        raise InputError(f"{tensors.where}: {name} holds NaN or infinity; the checkpoint is damaged")
    return tensor


def read_part(part: Part, places: Any, report: Report) -> Iterator[tuple[str, jax.Array]]:
    """(path, array) of one part, tensor by tensor."""
    option, leaves = spelling(part), flatten_dict(places, sep="/")
    names = [entry.theirs for entry in part.family.entries(part.config)]
    homes = {spell(option, name): stored_name(part, option, name) for name in names}

    def size(entry: naming.Entry) -> int:
        return sum(math.prod(leaves[path].shape) for path in entry.ours)

    # the largest first, while little else is in memory
    for entry in sorted(part.family.entries(part.config), key=size, reverse=True):
        name = homes[spell(option, entry.theirs)]
        if name is None:
            report.zeros.append(part.base + spell(option, entry.theirs))
            arrays = [np.zeros(leaves[path].shape, np.float32) for path in entry.ours]
        else:
            report.loaded.append(name)
            arrays = naming.to_ours(entry, read_finite(part.tensors, name))
        for path, array in zip(entry.ours, arrays, strict=True):
            yield path, put(array, leaves[path])
    for copy, source in copies(part, option).items():
        name, first = part.base + copy, str(homes[source])  # where the source is not, the copy that stands for it
        if name in part.tensors.shapes and name != first:
            if not np.array_equal(part.tensors.read(name), part.tensors.read(first)):
                raise InputError(f"{part.tensors.where}: {name} differs from {first}, of which it should be a copy")
            report.tied.append(name)
    report.ignored += [name for name in part.tensors.shapes if ignores(part, name)]


def put(array: np.ndarray, place: jax.ShapeDtypeStruct) -> jax.Array:
    """A host array as a device array of this type and sharding; each device is given its own part alone."""
    dtype = np.dtype(place.dtype)

    def part(index: Any) -> np.ndarray:
        return np.array(array[index], dtype, order="C")  # a copy: what was read can be let go

    return jax.make_array_from_callback(place.shape, place.sharding, part)


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


def open_source(
    directory: Path,
    variant: str | None = None,
    change_variant: bool = False,
    context_encoder: Path | None = None,
    ignore: Sequence[str] = (),
    asked: Asked | None = None,
) -> Source:
    """A whole model from one directory: a RAG composite, or an encoder as a retriever alone. `context_encoder`: another
    directory, for a composite that has none. ignore: settings to leave out, see `settings.Account`.
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
        return finished(Source(model, parts, directories, account), asked)
    if kind in GENERATORS:
        raise InputError(
            f"{directory}: a generator alone ({kind}); put it together with encoders: rag-jax convert "
            f"--question-encoder A --context-encoder B --generator {directory} --out DIR"
        )
    return combine(directory, context_encoder, ignore=ignore, asked=asked)


def finished(source: Source, asked: Asked | None) -> Source:
    """With lengths and prefixes, when all settings are accounted for."""
    source = source.encoding(asked or Asked())
    source.account.check()
    return source


def combine(
    question_encoder: Path,
    context_encoder: Path | None = None,
    generator: Path | None = None,
    variant: str = "sequence",
    ignore: Sequence[str] = (),
    asked: Asked | None = None,
    **settings: Any,
) -> Source:
    """One model from parts. A BERT alone encodes both questions and passages; a DPR question encoder needs its other
    half. ignore: settings to leave out, see `settings.Account`.
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
    return finished(Source(model, parts, directories, account), asked)


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


def check_form(context: BertConfig, question: BertConfig, context_from: Path, question_from: Path) -> None:
    """InputError with the first field in which the two encoders differ: here they have one configuration. Their dropout
    may differ: it is a setting of training, where the question encoder's is taken for both.
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


def in_dtype(model: RagConfig, dtype: str) -> RagConfig:
    """The model computing in `dtype`."""
    generator = model.generator and dataclasses.replace(model.generator, dtype=dtype)
    return dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, dtype=dtype), generator=generator)


def in_type(places: Any, dtype: str) -> Any:
    """The same places for parameters of another type."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype), sharding=p.sharding), places)


def open_pretrained(
    path: str | Path,
    variant: str | None = None,
    change_variant: bool = False,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Rag, LazyParams]:
    """`from_pretrained` for parameters that need not all be in memory at once."""
    directory = find(path)
    if is_hugging_face(directory):
        source = open_source(directory, variant, change_variant, ignore=ignore)
        model = in_dtype(source.model, dtype) if dtype != "float32" else source.model
        return Rag(model), source.params(mesh or sharding.make_mesh(), Report(), dtype)
    config = runs.read_config(directory)
    rag = runs.run_model(directory, config)
    chosen = choose_variant(directory, rag.variant, variant, change_variant)
    stored = runs.param_places(rag, mesh or sharding.mesh_here(config.mesh))
    checkpoint.check_params(directory / "params", stored)
    places = in_type(stored, dtype)
    model = dataclasses.replace(rag.config, variant=chosen)  # type: ignore[arg-type]
    model = in_dtype(model, dtype) if dtype != "float32" else model
    return Rag(model), LazyParams(places, lambda side: checkpoint.read_part(directory / "params", side, places[side]))


def from_pretrained(
    path: str | Path,
    variant: str | None = None,
    change_variant: bool = False,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Rag, Params]:
    """The model of a run directory, a converted checkpoint, or a Hugging Face directory or hub name; its parameters.

    variant: what is expected (RAG-Sequence or RAG-Token); another one stored is an InputError, unless `change_variant`.
    dtype: of parameters and computation. ignore: settings of a Hugging Face directory to leave out, which are an
    InputError otherwise. InputError for any other directory and for an unfinished run.
    """
    rag, params = open_pretrained(path, variant, change_variant, dtype, mesh, ignore)
    return rag, dict(params.items())
