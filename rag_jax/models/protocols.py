"""What the rest of rag_jax reads of an encoder and of a generator; a family of your own has to have it.

Modules are Flax Linen modules (`init`, `apply` with `method`) with one field, their configuration. A model of another
library stands behind a Linen module that calls it (docs/extending.md).
"""

from typing import Any, ClassVar, Literal, Protocol

import jax

from rag_jax.ops.kv_cache import KeyValues, Tree

Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


class EncoderConfig(Protocol):
    """A frozen dataclass, the shape of an encoder.

    kind: the family's name in rag.ENCODERS.
    vocab_size: tokens; 0: as many as the corpus' tokenizer has.
    positions: tokens that it can read, [CLS] and [SEP] among them.
    output_width: E, the length of a vector.
    dropout, weights_dropout: shares that training drops of activations and of attention's weights.
    pooling, vector_norm: how hidden states become a vector, and the length that it is scaled to (0: none); an index is
      bound to both.
    init: `lexical` starts from the corpus' inverse document frequencies, `hf` as Hugging Face does.
    dtype: of matrix products.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def output_width(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def weights_dropout(self) -> float: ...
    @property
    def pooling(self) -> Pooling: ...
    @property
    def vector_norm(self) -> float: ...
    @property
    def init(self) -> str: ...
    @property
    def dtype(self) -> str: ...


class Encoder(Protocol):
    """Token ids -> one vector."""

    def __call__(
        self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True, pooled: slice = slice(None)
    ) -> jax.Array:
        """Vectors [B, E] float32. mask_BL: True on real tokens. deterministic: without dropout. pooled: only these
        positions are pooled; all are read.
        """


class GeneratorConfig(Protocol):
    """A frozen dataclass, the shape of a generator; the special tokens and both methods are those of
    models.special_tokens.SpecialTokens, which it usually inherits.

    kind: the family's name in rag.GENERATORS.
    vocab_size: tokens; 0: as many as the corpus' tokenizer has.
    positions: source and target tokens that it can read, each.
    logit_scale: what the output layer's product is multiplied by.
    init: `copy` starts with heads that copy, where the family has them, `hf` as Hugging Face does.
    dtype: of matrix products.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def logit_scale(self) -> float: ...
    @property
    def init(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def start_id(self) -> int: ...
    @property
    def end_ids(self) -> tuple[int, ...]: ...
    @property
    def forced_bos_id(self) -> int: ...
    @property
    def forced_eos_id(self) -> int: ...
    @property
    def tokens_from(self) -> Literal["tokenizer", "checkpoint"]: ...
    @property
    def ends(self) -> tuple[int, ...]: ...

    def check_length(self, length: int) -> None: ...

    def opening(self, prefix_ids: tuple[int, ...] = ()) -> tuple[int, ...]: ...


class Generator(Protocol):
    """An encoder-decoder, or a decoder that reads the source as its prefix. B rows, L source and T target tokens, V in
    the vocabulary.

    models.layers.GeneratorBase has the last three methods, made of the others.
    """

    def encode(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> Any:
        """What is read of a source; mask_BL: True on real tokens. Its arrays have an axis of B rows first."""

    def cross(self, encoded: Any) -> KeyValues:
        """Of that, the keys and values that the decoder attends to, computed once per source."""

    def check_room(self, source: int, target: int) -> None:
        """ValueError where the positions are too few for so many source and target tokens."""

    def init_cache(self, batch: int, length: int) -> KeyValues:
        """An empty cache for `length` target tokens."""

    def states(
        self,
        ids_BT: jax.Array,
        cross: KeyValues,
        mask_BL: jax.Array,
        cache: KeyValues | None = None,
        slot: jax.Array | int = 0,
        deterministic: bool = True,
        tree: Tree | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Hidden states [B, T, D] of the target tokens, and the cache with them from `slot` on, if there is one.
        tree: where the tokens stand that do not simply follow one another.
        """

    def head(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [V, D] and bias [V] of the logits: kernel @ state * logit_scale + bias."""

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The same of hidden states: [B, T, V] float32."""

    def decode(
        self,
        ids_BT: jax.Array,
        cross: KeyValues,
        mask_BL: jax.Array,
        cache: KeyValues | None = None,
        slot: jax.Array | int = 0,
        deterministic: bool = True,
        tree: Tree | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Logits [B, T, V] float32 for the tokens after ids_BT; the rest as of `states`."""

    def taught(
        self, ids_BL: jax.Array, mask_BL: jax.Array, target_BT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Teacher forcing: last states [B, T, D]; those at t are for the token after target_BT[:, t]."""

    def __call__(
        self, ids_BL: jax.Array, mask_BL: jax.Array, target_BT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Teacher forcing: logits [B, T, V]; what the parameters are drawn with."""
