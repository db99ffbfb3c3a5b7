"""The interfaces of encoders and generators that rag_jax relies on; a new family must provide them.

Modules are Flax Linen modules (`init`, `apply` with `method`) with one field, their configuration. A model of another
library is wrapped in a Linen module that calls it (docs/extending.md).
"""

from typing import Any, ClassVar, Literal, Protocol

import jax

from rag_jax.ops.kv_cache import KeyValues, Tree

Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


class ModelConfig(Protocol):
    """Configuration of an encoder or a generator, a frozen dataclass.

    kind: the family's name in rag.ENCODERS or rag.GENERATORS.
    vocab_size: tokens; 0: as many as the corpus' tokenizer has.
    positions: longest input in tokens, [CLS] and [SEP] included; of a generator, longest source and longest target.
    init: how parameters are drawn. `hf`: as Hugging Face does; `lexical` (encoders): from the corpus' inverse document
      frequencies; `copy` (generators): with heads that copy, where the family has them.
    dtype: type of the matmuls' operands.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def init(self) -> str: ...
    @property
    def dtype(self) -> str: ...


class EncoderConfig(ModelConfig, Protocol):
    """Configuration of an encoder.

    output_width: E, the number of dimensions of a vector.
    dropout, weights_dropout: dropout rates of activations and of attention weights.
    pooling, vector_norm: how hidden states are pooled, and the length that vectors are scaled to (0: not scaled); an
      index is only valid for the values that it was built with.
    """

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


class Encoder(Protocol):
    """An encoder of token ids into one vector per row."""

    def __call__(
        self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True, pooled: slice = slice(None)
    ) -> jax.Array:
        """Vectors [B, E] float32.

        mask_BL: True on real tokens.
        deterministic: without dropout.
        pooled: only these positions are pooled; attention still sees all.
        """


class GeneratorConfig(ModelConfig, Protocol):
    """Configuration of a generator.

    Special tokens and methods are those of models.special_tokens.SpecialTokens, which it usually inherits.

    logit_scale: factor of the output layer's matmul.
    """

    @property
    def logit_scale(self) -> float: ...
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
    """An encoder-decoder, or a decoder that reads the source as its prefix.

    B rows, L source and T target tokens, V tokens in the vocabulary. models.layers.GeneratorBase implements the last
    three methods with the others.
    """

    def encode(self, ids_BL: jax.Array, mask_BL: jax.Array, deterministic: bool = True) -> Any:
        """Encoding of the source, any pytree of arrays whose first axis is B; mask_BL: True on real tokens."""

    def cross(self, encoded: Any) -> KeyValues:
        """Keys and values that the decoder attends to, from the result of `encode`; computed once per source."""

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
        """Last hidden states [B, T, D] of the target tokens, and the updated cache (None without one).

        mask_BL: of the source, True on real tokens.
        cache: keys and values of earlier target tokens; those of ids_BT are written from `slot` on.
        tree: positions and visibility of tokens that do not follow one another in the cache.
        """

    def head(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [V, D] and bias [V] of the logits: kernel @ state * logit_scale + bias."""

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] float32 of hidden states."""

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
        """Logits [B, T, V] float32 for the tokens after ids_BT, and the cache; arguments as in `states`."""

    def taught(
        self, ids_BL: jax.Array, mask_BL: jax.Array, target_BT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Last hidden states [B, T, D] by teacher forcing; the state at t predicts the token after target_BT[:, t]."""

    def __call__(
        self, ids_BL: jax.Array, mask_BL: jax.Array, target_BT: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Logits [B, T, V] by teacher forcing; `init` draws the parameters through this call."""
