"""The files of sentence-transformers beside an encoder: its modules, pooling, longest input, and prompts.

Two formats of Pooling are read: the older one with a flag for each kind (`pooling_mode_mean_tokens`), and
`pooling_mode`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from rag_jax.errors import InputError
from rag_jax.models.hf.settings import Account, Table, fates, idle, into, only
from rag_jax.models.protocols import Pooling

MODULES, MODEL = "modules.json", "config_sentence_transformers.json"
# possible names of the settings of the module Transformer, by the version that wrote them
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
PASSAGE_PROMPTS = ("document", "passage", "corpus")  # the first of these that a model has is put before its documents

FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

POOLING: Table = fates({
    "word_embedding_dimension embedding_dimension": idle("the width of the encoder says it"),
    " ".join(FLAGS): into("pooling"),
    "pooling_mode": into("pooling"),
    "include_prompt": into("model.pool_prefix"),
})  # fmt: skip

TRANSFORMER: Table = fates({
    "max_seq_length": into("model.question_length"),
    "do_lower_case": into("tokenizer"),
    "model_args config_args tokenizer_args processor_args config_kwargs model_kwargs processing_kwargs unpad_inputs":
        idle("how transformers loads it"),
    "transformer_task": only("feature-extraction", why="an encoder gives its last hidden states"),
    "modality_config": idle("texts alone are read"),
    "module_output_name": only("token_embeddings", why="an encoder gives its last hidden states"),
})  # fmt: skip

SENTENCES: Table = fates({
    "__version__": idle("what wrote it"),
    "model_type": only("SentenceTransformer", why="one vector a text is searched with"),
    "prompts": into("model.query_prefix and model.passage_prefix"),
    "default_prompt_name": into("model.query_prefix and model.passage_prefix"),
    "similarity_fn_name": into("vector_norm"),
    "truncate_dim": only(why="vectors are kept whole"),
})  # fmt: skip

TABLES: dict[str, Table] = {
    "1_Pooling/config.json": POOLING,
    "sentence_bert_config.json": TRANSFORMER,
    "config_sentence_transformers.json": SENTENCES,
}


@dataclass(frozen=True)
class Layout:
    """Settings of an encoder in the files of sentence-transformers.

    pooling: how hidden states become one vector; None where the files do not say.
    normalise: whether vectors are scaled to length 1.
    length: longest input in tokens; 0 where the files do not say.
    query_prefix, passage_prefix: texts before each question and each passage.
    pool_prefix: whether the prefix's tokens are pooled, too.
    lower_case: whether the text is lower-cased before the tokenizer reads it.
    """

    pooling: Pooling | None = None
    normalise: bool = False
    length: int = 0
    query_prefix: str = ""
    passage_prefix: str = ""
    pool_prefix: bool = True
    lower_case: bool = False


def modules_of(content: Any, where: str) -> list[tuple[str, str]]:
    """(kind, folder) of every module of a modules.json."""
    try:
        return [(module["type"].rpartition(".")[2], module["path"]) for module in content]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: not a list of modules ({error!r})") from error


def config_path(folder: str) -> str:
    """The path of the config.json of a module in this folder."""
    return f"{folder}/config.json" if folder else "config.json"


def read_layout(files: Mapping[str, Any], where: str, account: Account) -> Layout:
    """The layout that these files describe; InputError for a module or a setting that is not supported.

    files: path in the directory `where` -> content. account: records the settings.
    """
    found: dict[str, Any] = {}
    for kind, folder in modules_of(files.get(MODULES, []), f"{where}/{MODULES}"):
        if kind == "Pooling":
            path = config_path(folder)
            found |= read_pooling(account.read(files[path], POOLING, f"{where}/{path}", "model.encoder."), where + path)
        elif kind == "Normalize":
            found["normalise"] = True
        elif kind != "Transformer":
            raise InputError(
                f"{where}/{MODULES}: module {kind} is not supported; Transformer, Pooling and Normalize are"
            )
    for path in files:
        if path.rpartition("/")[2] in TRANSFORMER_FILES:
            settings = account.read(files[path], TRANSFORMER, f"{where}/{path}")
            found["length"] = int(settings.get("max_seq_length") or 0)
            found["lower_case"] = bool(settings.get("do_lower_case"))
    if MODEL in files:
        settings = account.read(files[MODEL], SENTENCES, f"{where}/{MODEL}", "model.encoder.")
        found["query_prefix"], found["passage_prefix"] = prompts_of(settings, f"{where}/{MODEL}")
        similarity = settings.get("similarity_fn_name")
        if similarity not in (None, "cosine", "dot", "dot_product"):
            raise InputError(
                f"{where}/{MODEL}: similarity_fn_name={similarity!r} is not supported; passages are found by inner "
                "product, which is dot, or cosine where vectors have one length"
            )
        found["normalise"] = found.get("normalise", False) or similarity == "cosine"
    return Layout(**found)


def read_pooling(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields `pooling` and `pool_prefix` of the layout, from the config.json of a module Pooling."""
    named = settings.get("pooling_mode")
    if named is None:
        flags = {"pooling_mode_mean_tokens": True} | dict(settings)  # the default of sentence-transformers
        chosen: list[Any] = [way for flag, way in FLAGS.items() if flags.get(flag) is True]
    else:
        chosen = list(named) if isinstance(named, list | tuple) else str(named).lower().split("+")
    if len(chosen) != 1 or chosen[0] not in get_args(Pooling):
        raise InputError(
            f"{where}: pooling {' + '.join(map(str, chosen)) or 'of nothing'} is not supported; one of "
            f"{', '.join(get_args(Pooling))} is"
        )
    return {"pooling": chosen[0], "pool_prefix": bool(settings.get("include_prompt", True))}


def prompts_of(settings: Mapping[str, Any], where: str) -> tuple[str, str]:
    """(prompt before a query, prompt before a document), as encode_query and encode_document choose them.

    A model that names neither has its default prompt before both.
    """
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str) for text in prompts.values()):
        raise InputError(f"{where}: prompts must give a text for every name")
    if default is not None and default not in prompts:
        raise InputError(f"{where}: default_prompt_name={default!r} is none of its prompts: {', '.join(prompts)}")
    otherwise = prompts[default] if default is not None else ""
    passage = next((prompts[name] for name in PASSAGE_PROMPTS if name in prompts), otherwise)
    return prompts.get("query", otherwise), passage


def write_layout(layout: Layout, width: int, original: Mapping[str, Any]) -> dict[str, Any]:
    """The files of sentence-transformers for this layout, path -> content.

    width: of the encoder's vectors. original: the files that it came with, of which only what differs is changed.
    """
    files = dict(original)
    modules = files.get(MODULES) or [module(0, "Transformer"), module(1, "Pooling")]
    cosine = files.get(MODEL, {}).get("similarity_fn_name") == "cosine"
    kinds = [kind for kind, _ in modules_of(modules, MODULES)]
    if layout.normalise and not cosine and "Normalize" not in kinds:
        modules = [*modules, module(len(modules), "Normalize")]
    elif not layout.normalise:
        modules = [one for one, kind in zip(modules, kinds, strict=True) if kind != "Normalize"]
        if cosine:
            files[MODEL] = files[MODEL] | {"similarity_fn_name": "dot"}
    files[MODULES] = modules
    folders = dict(modules_of(modules, MODULES))
    path = config_path(folders.get("Pooling", "1_Pooling"))
    had = files.get(path)
    if had is not None and "pooling_mode" in had:
        ways: dict[str, Any] = (
            {} if read_pooling(had, path)["pooling"] == layout.pooling else {"pooling_mode": layout.pooling}
        )
    else:
        ways = {
            flag: way == layout.pooling
            for flag, way in FLAGS.items()
            if had is None or flag in had or way == layout.pooling
        }
    kept = had or {"word_embedding_dimension": width}
    if had is None or "include_prompt" in had or not layout.pool_prefix:
        ways["include_prompt"] = layout.pool_prefix
    files[path] = {**kept, **ways}
    own = next((name for name in files if name.rpartition("/")[2] in TRANSFORMER_FILES), TRANSFORMER_FILES[0])
    had = files.get(own)
    if had is None or "max_seq_length" in had:
        files[own] = (had or {"do_lower_case": False}) | {"max_seq_length": layout.length}
    prompts = (layout.query_prefix, layout.passage_prefix)
    said = files.get(MODEL, {})
    if prompts_of(said, MODEL) != prompts:
        texts = dict(said.get("prompts") or {}) | dict(zip(("query", "document"), prompts, strict=True))
        files[MODEL] = {"default_prompt_name": None, **said, "prompts": texts}
    return files


def module(number: int, kind: str) -> dict[str, Any]:
    """An entry of modules.json."""
    path = f"{number}_{kind}" if number else ""
    return {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
