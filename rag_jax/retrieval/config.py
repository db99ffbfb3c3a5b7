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
    """How passages are searched. `exact`: on the devices, inside the step; the others on the host, between steps.

    dtype: of the index on the devices. recall_target: below 1, the search may miss that share where this is faster
    (TPU). scann, bm25: how those are built. fusion: how `hybrid` makes one ranking of BM25's and that of the `dense`
    search.
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


# The same of SearchConfig. Its sections are each of the search they are named after, whichever is chosen now.
SEARCHED_BY: dict[str, tuple[Callable[[SearchConfig], bool], str]] = {
    "dtype": (lambda search: search.in_graph, "kind='exact'"),
    "recall_target": (lambda search: search.in_graph, "kind='exact'"),
    "dense": (lambda search: search.kind == "hybrid", "kind='hybrid'"),
}


def check_search_config(search: SearchConfig) -> None:
    """InputError for what is set of a search of another kind."""
    for name, value in changed(search).items():
        belongs, place = SEARCHED_BY.get(name, (None, ""))
        if belongs is not None and not belongs(search):
            raise InputError(f"search.{name}={value!r} is only for search.{place}; it is kind={search.kind!r}")
