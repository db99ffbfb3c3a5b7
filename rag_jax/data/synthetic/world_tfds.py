"""The world as a TensorFlow Datasets builder that needs no tensorflow: array_record files and `as_data_source`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rag_jax.data.synthetic.world import SPLITS, VERSION, World

_TEXTS = ("id", "title", "text", "question", "relation", "entity")
_LISTS = ("answers", "positive_passage_ids", "previous_answers")


@dataclass(eq=False)
class WorldConfig(tfds.core.BuilderConfig):
    """Configuration of `WorldBuilder`: the fields of `World`, which determine the bytes; `name` is made of them."""

    name: str = ""
    entities: int = 2000
    seed: int = 0
    edit: bool = False
    relations: int = 0
    wordings: int = 0

    def world(self) -> World:
        """The world; InputError where it cannot be built."""
        return World(self.entities, self.seed, self.edit, self.relations, self.wordings)

    def __post_init__(self) -> None:
        self.world()
        easier = f"_r{self.relations}_w{self.wordings}" if self.relations or self.wordings else ""
        self.name = f"entities{self.entities}_seed{self.seed}{easier}" + ("_edit" if self.edit else "")


class WorldBuilder(tfds.core.GeneratorBasedBuilder):
    """Builder with splits passages, train, dev and test; a row has the fields of passages and questions, some empty.

    `WorldBuilder(data_dir=..., config=WorldConfig(entities=2000, seed=0), file_format="array_record")`, then
    `download_and_prepare()` and `as_data_source("train")`. Strings come back as bytes.
    """

    name = "world"
    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [WorldConfig()]  # noqa: RUF012  (the attribute is tfds's)

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features: dict[str, Any] = {name: text() for name in _TEXTS}
        features |= {name: tfds.features.Sequence(text()) for name in _LISTS}
        return tfds.core.DatasetInfo(
            builder=self,
            description="A deterministic fictional world of passages and questions; every answer must be read.",
            features=tfds.features.FeaturesDict({**features, "changed": np.bool_}),
            disable_shuffling=True,  # the rows are shuffled already; the order is that of the JSONL files
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {name: self._generate_examples(name) for name in ("passages", *SPLITS)}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config: Any = self.builder_config  # a WorldConfig
        world = config.world()
        empty: dict[str, Any] = {**dict.fromkeys(_TEXTS, ""), **dict.fromkeys(_LISTS, ()), "changed": False}
        for key, row in enumerate(world.rows(split)):
            yield key, empty | row
