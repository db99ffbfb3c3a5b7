"""How passages are searched: the settings of `search`, which a run's configuration and the command line fill in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from rag_jax.errors import InputError
from rag_jax.retrieval.bm25 import Bm25Config
from rag_jax.retrieval.hybrid import Fusion
from rag_jax.retrieval.scann_index import AnnConfig
from rag_jax.system.configuration import changed


@dataclass(frozen=True)
class SearchConfig:
    """How passages are searched.

    kind: `exact` searches on the devices, inside the step; the others on the host, between steps.
    dtype: type of the index on the devices.
    recall_target: recall that suffices; below 1 the search may miss the rest where that is faster (TPU).
    dense: the dense half of a `hybrid` search.
    scann, bm25: how those two indexes are built.
    fusion: how `hybrid` makes one ranking from those of the `dense` search and BM25.
    """

    kind: Literal["exact", "scann", "bm25", "hybrid"] = "exact"
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    recall_target: float = 1.0
    dense: Literal["exact", "scann"] = "exact"
    scann: AnnConfig = field(default_factory=AnnConfig)
    bm25: Bm25Config = field(default_factory=Bm25Config)
    fusion: Fusion = field(default_factory=Fusion)

    @property
    def in_graph(self) -> bool:
        """Whether the step itself searches, on the devices; else the host does, between steps."""
        return self.kind == "exact"


# Fields of SearchConfig that only one kind reads: (is this search of that kind, the kind as the error names it). The
# sections scann, bm25 and fusion are not among them: they may be filled in whichever kind is chosen.
SEARCHED_BY: dict[str, tuple[Callable[[SearchConfig], bool], str]] = {
    "dtype": (lambda search: search.in_graph, "kind='exact'"),
    "recall_target": (lambda search: search.in_graph, "kind='exact'"),
    "dense": (lambda search: search.kind == "hybrid", "kind='hybrid'"),
}


def check_search_config(search: SearchConfig) -> None:
    """Raise InputError where a field is set that only another kind of search reads."""
    for name, value in changed(search).items():
        belongs, place = SEARCHED_BY.get(name, (None, ""))
        if belongs is not None and not belongs(search):
            raise InputError(f"search.{name}={value!r} is only for search.{place}; it is kind={search.kind!r}")
