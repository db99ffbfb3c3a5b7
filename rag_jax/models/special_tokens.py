"""The special tokens of a generator: what its answers begin and end with."""

from dataclasses import dataclass
from typing import Literal

NONE = -1  # no such token


@dataclass(frozen=True, kw_only=True)  # a generator's own fields come first
class SpecialTokens:
    """Ids of the vocabulary; -1: none.

    start_id: what decoding begins with (-1: bos_id). eos_id: what ends a label; end_ids: all tokens that end an answer
    (empty: eos_id alone). forced_bos_id: the first token after the start, forced_eos_id: the last one at the greatest
    length. tokens_from: `tokenizer`, these ids are replaced by those of the corpus' tokenizer; `checkpoint`, they came
    with the weights and stay.
    """

    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    start_id: int = NONE
    end_ids: tuple[int, ...] = ()
    forced_bos_id: int = NONE
    forced_eos_id: int = NONE
    tokens_from: Literal["tokenizer", "checkpoint"] = "tokenizer"

    def __post_init__(self) -> None:
        if self.start_id == NONE:
            object.__setattr__(self, "start_id", self.bos_id)

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return self.end_ids or (self.eos_id,)

    def check_length(self, length: int) -> None:
        """ValueError where an input and its answer of so many tokens together are more than the model can see."""

    def opening(self, prefix_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
        """What a label begins with: the start, then what is forced, else what the tokenizer begins a text with, as
        transformers makes decoder inputs. prefix_ids: those of the tokenizer.
        """
        theirs = self.tokens_from == "checkpoint"
        start, after = self.start_id if theirs else self.bos_id, tuple(prefix_ids) if theirs else ()
        after = after if self.forced_bos_id == NONE else (self.forced_bos_id,)
        return (start, *(after if after != (start,) else ()))
