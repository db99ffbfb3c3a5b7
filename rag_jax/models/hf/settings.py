"""What becomes of every setting of a checkpoint's files: a table a kind of file and family, key -> fate.

A key is honoured (into which setting here), without effect here (why), or refused unless it has a value that changes
nothing (why). A key that the table does not have is refused by name. `--ignore-setting KEY` leaves one out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rag_jax.errors import InputError


class Fate(NamedTuple):
    """What becomes of a key. text: where it goes (honoured), else the reason; values: those that are not refused."""

    kind: Literal["honoured", "without effect", "refused"]
    text: str
    values: tuple[Any, ...] = ()


Table = dict[str, Fate]


def into(setting: str) -> Fate:
    """Honoured: the key's value becomes this setting here."""
    return Fate("honoured", setting)


def idle(why: str) -> Fate:
    """Known, and without effect on what is computed here."""
    return Fate("without effect", why)


def only(*values: Any, why: str) -> Fate:
    """Refused, unless null or one of these values, which change nothing."""
    return Fate("refused", why, values)


def fates(of: Mapping[str, Fate]) -> Table:
    """A table, written with several keys of one fate in one string."""
    return {key: fate for keys, fate in of.items() for key in keys.split()}


class Taken(NamedTuple):
    """A setting here, and the file and key that it came from."""

    setting: str
    where: str
    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.setting} <- {self.where}: {self.key}"


@dataclass
class Account:
    """What became of the settings of the files that were read.

    ignore: keys to leave out, in any file. taken: what was honoured. idle: (file: key, value, why) of what has no
    effect here and says more than its default. ignored: (file: key, value) of what was left out.
    """

    ignore: Sequence[str] = ()
    taken: list[Taken] = field(default_factory=list)
    idle: list[tuple[str, Any, str]] = field(default_factory=list)
    ignored: list[tuple[str, Any]] = field(default_factory=list)

    def read(self, config: Mapping[str, Any], known: Table, where: str, prefix: str = "") -> dict[str, Any]:
        """The config without the keys to be left out; InputError for a key that is unknown, or refused with its value.

        where: the file, as errors name it. prefix: of the names of settings here, as in "model.generator."; a name with
        a dot is whole.
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
            kept[key] = value
        return kept

    def check(self) -> None:
        """InputError for a key to be left out that no file had."""
        found = {where.rpartition(": ")[2] for where, _ in self.ignored}
        if left := [key for key in self.ignore if key not in found]:
            raise InputError(f"--ignore-setting {left[0]}: none of the checkpoint's files has this key")

    def summary(self) -> dict[str, Any]:
        """For reports: setting -> "file: keys"; what has no effect, and why; what was left out."""
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


# --- what every config.json may have ----------------------------------------------------------------------------------

COMMON: Table = fates({
    "model_type": into("kind"),
    "architectures": idle("the class that wrote it; `rag_variant` where the model is a RAG composite"),
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
