"""Passages as a TensorFlow Datasets builder that needs no tensorflow: writes any corpus input to array_record files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow_datasets as tfds

from rag_jax.data.readers.formats import read_passages
from rag_jax.errors import InputError

_FIELDS = ("id", "title", "text", "document")


@dataclass(eq=False)
class PassagesConfig(tfds.core.BuilderConfig):
    """Configuration of `PassagesBuilder`.

    name: a name for the inputs.
    inputs: files or data sets, as `rag-jax corpus` takes them.
    """

    name: str = ""
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not self.inputs:
            raise InputError(f"PassagesConfig(name={self.name!r}, inputs={self.inputs!r}): both are needed")


class PassagesBuilder(tfds.core.GeneratorBasedBuilder):
    """Builder with one split, `passages`, in the order of the inputs.

    `PassagesBuilder(data_dir=..., config=PassagesConfig(name="wiki", inputs=("psgs_w100.tsv.gz",)))`, then
    `download_and_prepare()`; `rag-jax corpus tfds:passages/wiki/passages?data_dir=...` reads it again.
    """

    name = "passages"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Passages to retrieve from.",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in _FIELDS}),
            disable_shuffling=True,  # the order is that of the inputs
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {"passages": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        config: Any = self.builder_config  # a PassagesConfig
        for key, passage in enumerate(read_passages(config.inputs)):
            yield key, {name: getattr(passage, name) for name in _FIELDS}
