"""The fate of every setting in a checkpoint's files: for each kind of file and family, a table key -> fate.

A key is honoured (it becomes a setting here), without effect (for a stated reason), or refused (for a stated reason)
unless it has a value that changes nothing. A key that is not in the table is an error that names it, unless
`--ignore-setting KEY` leaves it out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rag_jax.errors import InputError


class Fate(NamedTuple):
    """The fate of a key: honoured, without effect, or refused.

    text: the setting here that it becomes, if it is honoured; else the reason.
    values: the values that are accepted of a refused key, null aside, which always is.
    inner: the table of its keys, where the value is an object.
    """

    kind: Literal["honoured", "without effect", "refused"]
    text: str
    values: tuple[Any, ...] = ()
    inner: "dict[str, Fate] | None" = None


Table = dict[str, Fate]


def into(setting: str, inner: Table | None = None) -> Fate:
    """A fate: honoured, the value becomes this setting here; inner: the table of its keys if the value is an object."""
    return Fate("honoured", setting, inner=inner)


def idle(why: str) -> Fate:
    """A fate: the key is known and has no effect on what is computed here, for this reason."""
    return Fate("without effect", why)


def only(*values: Any, why: str) -> Fate:
    """A fate: refused for this reason, unless the value is null or one of these, which change nothing."""
    return Fate("refused", why, values)


def fates(of: Mapping[str, Fate]) -> Table:
    """The table key -> fate from one whose keys may be several, separated by white space."""
    return {key: fate for keys, fate in of.items() for key in keys.split()}


class Taken(NamedTuple):
    """An honoured setting: its name here, and the file, key and value that it came from."""

    setting: str
    where: str
    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.setting} <- {self.where}: {self.key}"


@dataclass
class Account:
    """A record of how the settings of the files that were read were used.

    ignore: keys to leave out, in any file.
    taken: settings that were honoured.
    idle: ("file: key", value, reason) of settings without effect, except empty and false ones.
    ignored: ("file: key", value) of settings that were left out.
    """

    ignore: Sequence[str] = ()
    taken: list[Taken] = field(default_factory=list)
    idle: list[tuple[str, Any, str]] = field(default_factory=list)
    ignored: list[tuple[str, Any]] = field(default_factory=list)

    def read(self, config: Mapping[str, Any], known: Table, where: str, prefix: str = "") -> dict[str, Any]:
        """The config without the keys to be left out, after recording the fate of each key.

        known: the table of the file.
        where: the file, for messages.
        prefix: put before the names of settings here that have no dot, such as "model.generator.".
        InputError for a key that is unknown, and for one whose value is refused.
        """
        kept: dict[str, Any] = {}
        for key, value in config.items():
            if key in self.ignore:
                self.ignored.append((f"{where}: {key}", value))
                continue
            fate = known.get(key)
            if fate is None:
                raise InputError(
                    f"{where}: {key}={value!r} is not known here, and what is left out may change the model's answers; "
                    f"if this may be, pass --ignore-setting {key}"
                )
            if fate.kind == "refused" and value is not None and value not in fate.values:
                accepted = " or ".join(map(repr, fate.values)) or "null"
                raise InputError(
                    f"{where}: {key}={value!r} is not supported; only {accepted} is ({fate.text}). To leave it out all "
                    f"the same, pass --ignore-setting {key}"
                )
            if fate.kind == "honoured" and value is not None:
                self.taken.append(Taken(fate.text if "." in fate.text else prefix + fate.text, where, key, value))
            elif fate.kind == "without effect" and value not in (None, False, "", [], {}):
                self.idle.append((f"{where}: {key}", value, fate.text))
            nested = fate.inner is not None and isinstance(value, Mapping)
            kept[key] = self.read(value, fate.inner or {}, f"{where}: {key}", prefix) if nested else value
        return kept

    def check(self) -> None:
        """Raises InputError for a key of `ignore` that was in none of the files."""
        found = {where.rpartition(": ")[2] for where, _ in self.ignored}
        if left := [key for key in self.ignore if key not in found]:
            raise InputError(f"--ignore-setting {left[0]}: none of the checkpoint's files has this key")

    def summary(self) -> dict[str, Any]:
        """The record for reports: setting -> "file: keys"; keys without effect -> reason; keys left out -> value."""
        found: dict[str, dict[str, list[str]]] = {}
        for one in self.taken:
            found.setdefault(one.setting, {}).setdefault(one.where, []).append(one.key)
        lines = {
            setting: "; ".join(f"{where}: {', '.join(keys)}" for where, keys in files.items())
            for setting, files in found.items()
        }
        return {
            "settings": lines,
            "without_effect": {name: why for name, _, why in self.idle},
            "ignored_settings": dict(self.ignored),
        }


# --- keys that every config.json may have -----------------------------------------------------------------------------

COMMON: Table = fates({
    "model_type": into("kind"),
    "architectures": idle("the class that wrote it"),
    "_name_or_path name_or_path _commit_hash transformers_version":
        idle("where the file comes from"),
    "torch_dtype dtype": idle("parameters are float32 here, and `dtype` says what is computed in"),
    "id2label label2id num_labels _num_labels problem_type finetuning_task":
        idle("of a head for classification, which is not read"),
    "classifier_dropout classif_dropout": idle("of a head for classification, which is not read"),
    "output_attentions output_hidden_states return_dict output_past output_scores return_dict_in_generate torchscript":
        idle("what transformers returns, not what is computed"),
    "use_cache cache_implementation": idle("how transformers decodes; caches are always used here"),
    "chunk_size_feed_forward gradient_checkpointing tf_legacy_loss use_bfloat16 xla_device attn_implementation "
    "_attn_implementation _attn_implementation_autoset _experts_implementation":
        idle("how transformers computes, not what"),
    "tokenizer_class": idle("the tokenizer's own files say it"),
    "initializer_range init_std initializer_factor": idle("of new weights; those of the checkpoint are read"),
    "task_specific_params": idle("for the pipelines of transformers; say what shall hold with answering.KEY"),
    "language license tags datasets name unsloth_version unsloth_fixed transformers.js_config":
        idle("a note of its makers"),
    "auto_map": only(why="the model has code of its own, which is never run here"),
    "custom_pipelines": idle("code of its makers, which is never run here"),
    "quantization_config compression_config": only(why="weights are read as float32, float16 or bfloat16"),
    "pruned_heads": only({}, why="all layers have the same heads here"),
    "tie_encoder_decoder": only(False, why="encoder and decoder have weights of their own here"),
    "cross_attention_hidden_size": only(why="the decoder attends to states of its own width"),
    "per_layer_config": only(why="all layers have one form here"),
    "sep_token_id mask_token_id": idle("the tokenizer has it"),
})  # fmt: skip


def document(tables: Mapping[str, Table]) -> str:
    """The Markdown of docs/settings.md: all tables as one; a test compares the file with it.

    tables: name of the kind of file -> its table.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    for name, known in tables.items():
        for key, fate in known.items():
            text = f"into `{fate.text}`" if fate.kind == "honoured" else fate.text
            if fate.kind == "refused":
                text = f"but {' or '.join(f'`{json.dumps(value)}`' for value in fate.values) or '`null`'}: {text}"
            rows.setdefault((key, f"{fate.kind} | {text}"), []).append(name)
    configs = [name.removeprefix(CONFIG_OF) for name in tables if name.startswith(CONFIG_OF)]
    lines = [HEAD, "| key | | | of |", "|---|---|---|---|"]
    for (key, text), names in sorted(rows.items()):
        of = [name.removeprefix(CONFIG_OF) for name in names]
        of = ["every config.json", *(name for name in of if name not in configs)] if set(configs) <= set(of) else of
        lines.append(f"| `{key}` | {text} | {', '.join(of)} |")
    return "\n".join(lines) + "\n"


CONFIG_OF = "config.json of "
HEAD = """# What becomes of every setting of a checkpoint

Written by `python scripts/settings_table.py`, from the tables that `rag-jax convert` decides by. A key that they do not
have for a file is an error that names it; `--ignore-setting KEY` leaves a key out, and the report says so. What is
refused is so for all values but those named; null always passes. A name in the last column is a config.json's
model_type, if it is no file's.
"""
