"""The special tokens of a generator, which its answers begin and end with."""

from dataclasses import dataclass
from typing import Literal

NONE = -1  # no such token


@dataclass(frozen=True, kw_only=True)  # a generator's own fields come first
class SpecialTokens:
    """Special token ids of a generator; NONE (-1) where there is no such token.

    start_id: token that decoding begins with; -1: bos_id.
    eos_id: token that ends a label.
    end_ids: all tokens that end an answer; empty: eos_id alone.
    forced_bos_id: token that decoding forces right after the start.
    forced_eos_id: token that decoding forces at the last position of the greatest length.
    tokens_from: "tokenizer", ids are replaced by those of the corpus' tokenizer; "checkpoint", ids came with the
        weights and are kept.
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
        """ValueError where input and answer together, `length` tokens, are more than the model can attend to."""

    def opening(self, prefix_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
        """First tokens of a label, as in transformers' decoder inputs: the start, then forced_bos_id or the prefix.

        prefix_ids: tokens that the tokenizer begins a text with; they follow the start only where nothing is forced
            and tokens_from is "checkpoint". A start token is not repeated.
        """
        theirs = self.tokens_from == "checkpoint"
        start, after = self.start_id if theirs else self.bos_id, tuple(prefix_ids) if theirs else ()
        after = after if self.forced_bos_id == NONE else (self.forced_bos_id,)
        return (start, *(after if after != (start,) else ()))
