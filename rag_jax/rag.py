"""The paper in one file: the Rag model, its loss, how it answers (Lewis et al. 2020, arXiv 2005.11401).

    p(y|x) = sum over z in top-k of p(z|x) p(y|x,z)

A question is embedded, and the K passages with the largest inner products are retrieved. Each is joined with the
question as token ids. The generator scores or writes the answer given each of the K inputs, and the K results are
marginalised. Everything here is a pure function of arrays and of `params`, a dict with keys "question_encoder",
"context_encoder" (absent if tied) and "generator". Nothing is transferred to the host.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rag_jax import losses
from rag_jax.decoding import rag_decode as generating
from rag_jax.decoding import search
from rag_jax.errors import InputError
from rag_jax.models import init_copying
from rag_jax.models.bart import Bart, BartConfig
from rag_jax.models.bert import Bert, BertConfig
from rag_jax.models.decoder_only import Lm, LmConfig
from rag_jax.models.protocols import EncoderConfig, GeneratorConfig
from rag_jax.models.special_tokens import NONE
from rag_jax.models.t5 import T5, T5Config
from rag_jax.system import sharding
from rag_jax.system.configuration import build_fields, one_of

Params = dict[str, Any]


class ModelFamily(NamedTuple):
    """One family of encoders or generators; models.protocols says what its classes must have.

    config: class of its configurations.
    module: class of its Flax modules.
    start: (freshly drawn parameters, boxed or not; configuration) -> parameters that training starts from.
    """

    config: Any
    module: Any
    start: Callable[[Params, Any], Params] = lambda params, config: params


# The keys are the `kind` of model.encoder and of model.generator. A new family is a file in models/ and a row here
# (and, to read released checkpoints, a file in models/hf/ and a row there).
ENCODERS: dict[str, ModelFamily] = {"bert": ModelFamily(BertConfig, Bert)}
GENERATORS: dict[str, ModelFamily] = {
    "bart": ModelFamily(BartConfig, Bart, init_copying.start),
    "t5": ModelFamily(T5Config, T5),
    "lm": ModelFamily(LmConfig, Lm),
}


@dataclass(frozen=True)
class RagConfig:
    """Configuration of the whole model: both encoders, the generator, and the lengths of their inputs.

    variant: how documents are marginalised, RAG-Sequence or RAG-Token.
    encoder: configuration of a family in ENCODERS, for questions and passages alike.
    generator: configuration of a family in GENERATORS; None for a retriever alone.
    tie_encoders: one set of parameters embeds questions and passages.
    context_encoder: False if the parameters have no context encoder, as in the released RAG checkpoints.
    n_docs: K, documents per question.
    source_length: longest joined input of the generator, in tokens.
    question_length: tokens of a question that the encoder reads, with [CLS] and [SEP], without query_prefix.
    question_keeps: which part of a longer question is kept; for a dialogue "end", which has its last turns.
    query_prefix, passage_prefix: text that the encoder reads after [CLS], before every question or passage ("query: ").
    query_prefix_ids, passage_prefix_ids: the token ids of these texts, filled in with a tokenizer.
    pool_prefix: False leaves the prefix, and the [CLS] before it, out of the pooling.
    passage_length: tokens of a passage that the encoder reads, counted likewise; corpora are built with it.
    """

    variant: Literal["sequence", "token"] = "sequence"
    encoder: EncoderConfig = field(default_factory=BertConfig)
    generator: GeneratorConfig | None = field(default_factory=BartConfig)
    tie_encoders: bool = False
    context_encoder: bool = True
    n_docs: int = 5
    source_length: int = 300
    question_length: int = 64
    question_keeps: Literal["start", "end"] = "start"
    query_prefix: str = ""
    passage_prefix: str = ""
    query_prefix_ids: tuple[int, ...] = ()
    passage_prefix_ids: tuple[int, ...] = ()
    pool_prefix: bool = True
    passage_length: int = 160

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> "RagConfig":
        """The configuration built from nested values; errors name `where`.

        The `kind` of encoder and generator selects the family; without one it is the first of the table.
        """
        parts = {}
        for name, rows in (("encoder", ENCODERS), ("generator", GENERATORS)):
            if name in values and not dataclasses.is_dataclass(values[name]):
                parts[name] = one_of([family.config for family in rows.values()], values[name], f"{where}.{name}")
        return build_fields(cls, {**values, **parts}, where)

    @property
    def tail_length(self) -> int:
        """Longest ` // question` part of a generator's input, in tokens.

        At most question_length. It leaves 100 tokens to the passage, or half of source_length if that is less.
        """
        return min(self.question_length, max(self.source_length - 100, self.source_length // 2))

    @property
    def passage_side(self) -> str:
        """Key of the parameters that embed passages."""
        return "question_encoder" if self.tie_encoders else "context_encoder"

    @property
    def passage_form(self) -> str:
        """Pooling, scaling and prefix of passage vectors, as text; an index is only valid for the form it records."""
        c, pooled = self.encoder, "" if self.pool_prefix else " (not pooled)"
        prefix = f" after ids {list(self.passage_prefix_ids)}{pooled}" if self.passage_prefix_ids else ""
        return f"{c.pooling} of length {c.vector_norm:g}{prefix}" if c.vector_norm else f"{c.pooling}{prefix}"

    @property
    def objective(self) -> str:
        return f"rag_{self.variant}"

    def unrolled(self) -> "RagConfig":
        """This configuration without loops over layers, whose stacking of parameters is too much for few tokens."""

        def apart(side: Any) -> Any:
            return dataclasses.replace(side, scan_layers="off") if hasattr(side, "scan_layers") else side

        return dataclasses.replace(self, encoder=apart(self.encoder), generator=apart(self.generator))

    @property
    def reader(self) -> GeneratorConfig:
        """The generator; InputError for a retriever alone."""
        if self.generator is None:
            raise InputError(
                "this model is a retriever without a generator; it can be indexed, searched and trained with "
                "objective='contrastive', and becomes whole with rag-jax convert --generator"
            )
        return self.generator


class TokenTables(NamedTuple):
    """The token table on device: every passage tokenised once for the encoder and once for the generator.

    Rows are right-padded; the lengths are in tokens.
    """

    encoder_ids_NL: jax.Array
    encoder_length_N: jax.Array
    generator_ids_NL: jax.Array
    generator_length_N: jax.Array


def join(
    prefix_ids: tuple[int, ...],
    passage_XL: jax.Array,
    passage_length_X: jax.Array,
    tail_XQ: jax.Array,
    tail_length_X: jax.Array,
    length: int,
    pad_id: int,
    start_X: jax.Array | None = None,
    stop_X: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Ids [X, length] of prefix + passage[start:stop] + tail, right-padded, and their mask (True on real tokens).

    passage_XL, passage_length_X: passages and how many tokens each has.
    tail_XQ, tail_length_X: question and suffix, likewise.
    start_X, stop_X: the part of each passage that is used, in tokens; by default all of it.

    The passage is truncated to fit, the tail never; ValueError if Q + len(prefix) > length.
    """
    head = len(prefix_ids)
    if tail_XQ.shape[1] + head > length:
        raise ValueError(
            f"questions of up to {tail_XQ.shape[1]} tokens after {head} prefix ids do not fit {length} positions"
        )
    start_X = jnp.zeros_like(tail_length_X) if start_X is None else start_X
    stop_X = passage_length_X if stop_X is None else jnp.minimum(stop_X, passage_length_X)
    body_X = jnp.clip(stop_X - start_X, 0, length - head - tail_length_X)
    # Lengths differ by row and shapes must not: every output position gathers from passage and tail, and selects one.
    at_1L = jnp.arange(length)[None]
    in_passage = at_1L - head
    in_tail = in_passage - body_X[:, None]
    passage = jnp.take_along_axis(passage_XL, jnp.clip(in_passage + start_X[:, None], 0, passage_XL.shape[1] - 1), 1)
    tail = jnp.take_along_axis(tail_XQ, jnp.clip(in_tail, 0, tail_XQ.shape[1] - 1), 1)
    ids = jnp.where(in_tail < 0, passage.astype(jnp.int32), tail.astype(jnp.int32))
    prefix = jnp.asarray((*prefix_ids, *([pad_id] * (length - head))), jnp.int32)
    ids = jnp.where(at_1L < head, prefix[None], ids)
    mask = at_1L < (head + body_X + tail_length_X)[:, None]
    return jnp.where(mask, ids, pad_id), mask


def after_first(prefix: tuple[int, ...], ids_BL: jax.Array, mask_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids and mask [B, P + L] with the prefix of P tokens inserted after the first token, [CLS].

    A row that is all padding stays so: the prefix's mask is that of the first token.
    """
    if not prefix:
        return ids_BL, mask_BL
    shape = (len(ids_BL), len(prefix))
    prefix_BP = jnp.broadcast_to(jnp.asarray(prefix, ids_BL.dtype), shape)
    mask_BP = jnp.broadcast_to(mask_BL[:, :1], shape)
    both = ((ids_BL, prefix_BP), (mask_BL, mask_BP))
    ids, mask = (jnp.concatenate([x[:, :1], new, x[:, 1:]], axis=1) for x, new in both)
    return ids, mask


def shift_left(labels_BT: jax.Array, generator: GeneratorConfig) -> tuple[jax.Array, jax.Array]:
    """Targets and mask [B, T] for labels `<s> y </s>`, which are the decoder's input.

    The target of position t is labels[t+1]; that of the last position is padding. The mask is False on padding. Where
    one token is both eos and padding, its first occurrence is eos and counts, and the later ones are padding.
    """
    pad_id = generator.pad_id
    targets_BT = jnp.concatenate([labels_BT[:, 1:], jnp.full_like(labels_BT[:, :1], pad_id)], axis=1)
    is_pad_BT = targets_BT == pad_id
    if pad_id == generator.eos_id:
        before_BT = jnp.cumsum(is_pad_BT, axis=1) - is_pad_BT
        last_1T = jnp.arange(targets_BT.shape[1]) == targets_BT.shape[1] - 1  # no label there, only what was appended
        return targets_BT, (before_BT == 0) & ~last_1T
    return targets_BT, ~is_pad_BT


def spread(x_BX: jax.Array, copies: int) -> jax.Array:
    """[B, ...] -> [B * copies, ...]; the copies of a question are contiguous."""
    return jnp.repeat(x_BX, copies, axis=0)


class Likelihood(NamedTuple):
    """Likelihood of labels [B, T], as a sum, per document and per token.

    nll_B: -log p(y|x), summed over tokens.
    posterior_BK: log p(z_k|x,y), with prior and tokens counted as in nll_B.
    token_logp_BKT: log p(y_t|x,z_k,y_<t); 0 where mask_BT is False.
    mask_BT: False on padding and on tokens that are not scored.
    """

    nll_B: jax.Array
    posterior_BK: jax.Array
    token_logp_BKT: jax.Array
    mask_BT: jax.Array


@dataclass(frozen=True)
class Rag:
    """The model as functions of its parameters; it holds the configuration and no state."""

    config: RagConfig

    @property
    def variant(self) -> str:
        return self.config.variant

    @property
    def encoder(self) -> nn.Module:
        return ENCODERS[self.config.encoder.kind].module(self.config.encoder)

    @property
    def generator(self) -> nn.Module:
        return GENERATORS[self.config.reader.kind].module(self.config.reader)

    def init(self, key: jax.Array) -> Params:
        """Freshly drawn parameters, boxed with their logical axis names (flax.linen.unbox removes the boxes)."""
        ids, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
        keys = jax.random.split(key, 3)
        params = {"question_encoder": self.encoder.init(keys[0], ids, mask)["params"]}
        if self.config.generator is not None:
            drawn = self.generator.init(keys[2], ids, mask, ids)["params"]
            params["generator"] = GENERATORS[self.config.generator.kind].start(drawn, self.config.generator)
        if self.config.context_encoder and not self.config.tie_encoders:
            params["context_encoder"] = self.encoder.init(keys[1], ids, mask)["params"]
        return params

    def _encode(
        self, params: Params, ids_BL: jax.Array, mask_BL: jax.Array, dropout: jax.Array | None, prefix: tuple[int, ...]
    ) -> jax.Array:
        rngs = None if dropout is None else {"dropout": dropout}
        ids_BL, mask_BL = after_first(prefix, ids_BL, mask_BL)
        pooled = slice(None) if self.config.pool_prefix or not prefix else slice(1 + len(prefix), None)
        return self.encoder.apply({"params": params}, ids_BL, mask_BL, dropout is None, pooled, rngs=rngs)

    def embed_questions(
        self, params: Params, ids_BL: jax.Array, mask_BL: jax.Array, dropout: jax.Array | None = None
    ) -> jax.Array:
        """Question vectors q(x) [B, E]; dropout is a random key, or None for evaluation."""
        return self._encode(params["question_encoder"], ids_BL, mask_BL, dropout, self.config.query_prefix_ids)

    def embed_passages(
        self, params: Params, ids_BL: jax.Array, mask_BL: jax.Array, dropout: jax.Array | None = None
    ) -> jax.Array:
        """Passage vectors d(z) [B, E]; InputError where the model has no context encoder."""
        if not self.config.context_encoder:
            raise InputError(
                "this model has no context encoder to embed passages with; give it one: rag-jax convert "
                "--question-encoder A --context-encoder B --generator C --out DIR"
            )
        side = self.config.passage_side
        return self._encode(params[side], ids_BL, mask_BL, dropout, self.config.passage_prefix_ids)

    def logits(
        self,
        params: Params,
        context_ids_BKL: jax.Array,
        context_mask_BKL: jax.Array,
        labels_BT: jax.Array,
        dropout: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, K, T, V] by teacher forcing under every document; position t predicts labels[t+1]."""
        hidden_BKTD = self.states(params, context_ids_BKL, context_mask_BKL, labels_BT, dropout)
        return self.generator.apply({"params": params["generator"]}, hidden_BKTD, method="logits")

    def states(
        self,
        params: Params,
        context_ids_BKL: jax.Array,
        context_mask_BKL: jax.Array,
        labels_BT: jax.Array,
        dropout: jax.Array | None = None,
        doc_chunk: int = 0,
    ) -> jax.Array:
        """The decoder's last hidden states under every document [B, K, T, D], from which `head` computes the logits.

        doc_chunk: documents processed at a time, 0 for all. Their activations are recomputed in the backward pass, so
            that only those of one chunk are in memory. ValueError where K is not a multiple.
        """
        B, K, _ = check_contexts(context_ids_BKL, context_mask_BKL, labels_BT=labels_BT)
        size = doc_chunk or K
        if K % size:
            raise ValueError(f"doc_chunk={doc_chunk} does not divide the {K} documents")

        def read(some: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
            ids_BCL, mask_BCL, key = some
            ids, mask = (x.reshape(-1, x.shape[-1]) for x in (ids_BCL, mask_BCL))
            variables, rngs = {"params": params["generator"]}, None if key is None else {"dropout": key}
            hidden = self.generator.apply(
                variables, ids, mask, spread(labels_BT, size), key is None, rngs=rngs, method="taught"
            )
            return hidden.reshape(B, size, *hidden.shape[1:])

        if size == K:
            return read((context_ids_BKL, context_mask_BKL, dropout))
        ids, mask = (x.reshape(B, K // size, size, -1).swapaxes(0, 1) for x in (context_ids_BKL, context_mask_BKL))
        keys = None if dropout is None else jax.random.split(dropout, K // size)
        # prevent_cse keeps XLA from merging the recomputation with the first pass, which it cannot do across a scan
        read = jax.checkpoint(read, prevent_cse=False)
        hidden_CBSTD = jax.lax.map(read, (ids, mask, keys))
        return hidden_CBSTD.swapaxes(0, 1).reshape(B, K, *hidden_CBSTD.shape[3:])

    def head(self, params: Params, logit_chunk: int = 4096, questions: int = 1) -> losses.OutputLayer:
        """The output layer for losses, split as the mesh in use shards vocabulary and batch.

        logit_chunk: tokens of the vocabulary whose logits are in memory at a time, 0 for all.
        questions: B, the size of the batch axis of the states.
        """
        c, module = self.config.reader, self.generator
        kernel_VD, bias_V = module.apply({"params": params["generator"]}, method="head")
        pieces = sharding.pieces("vocab", len(kernel_VD)), sharding.pieces("batch", questions)
        return losses.OutputLayer(kernel_VD, bias_V, c.logit_scale, logit_chunk, *pieces)

    def nll(
        self,
        params: Params,
        context_ids_BKL: jax.Array,
        context_mask_BKL: jax.Array,
        scores_BK: jax.Array,
        labels_BT: jax.Array,
        hf_compat: bool = False,
        **options: Any,
    ) -> jax.Array:
        """-log p(y|x) [B], summed over tokens.

        labels_BT: `<s> y </s>`, right-padded.
        options: the other arguments of `likelihood`.
        """
        return self.likelihood(
            params, context_ids_BKL, context_mask_BKL, scores_BK, labels_BT, hf_compat, **options
        ).nll_B

    def likelihood(
        self,
        params: Params,
        context_ids_BKL: jax.Array,
        context_mask_BKL: jax.Array,
        scores_BK: jax.Array,
        labels_BT: jax.Array,
        hf_compat: bool = False,
        label_smoothing: float = 0.0,
        dropout: jax.Array | None = None,
        exclude_bos_score: bool = False,
        log_normaliser_B: jax.Array | None = None,
        doc_chunk: int = 0,
        logit_chunk: int = 4096,
    ) -> Likelihood:
        """Likelihood of the labels, with the posteriors and token scores that losses of the retriever need.

        hf_compat: see losses.sequence_joint.
        exclude_bos_score: if every row of the targets begins with bos (labels then begin with two special tokens, as
            in generation from eos), that token is not scored, as in transformers' RAG-Sequence. ValueError for
            RAG-Token, where transformers has no such rule.
        log_normaliser_B: see losses.prior_logp.
        doc_chunk, logit_chunk: see `states` and `head`.
        """
        check_contexts(context_ids_BKL, context_mask_BKL, scores_BK, labels_BT)
        targets_BT, mask_BT = shift_left(labels_BT, self.config.reader)
        hidden_BKTD = self.states(params, context_ids_BKL, context_mask_BKL, labels_BT, dropout, doc_chunk)
        prior: losses.Prior = "hf_compat" if hf_compat else "paper"
        if exclude_bos_score and self.variant != "sequence":
            raise ValueError("exclude_bos_score is of RAG-Sequence; this model is RAG-Token")
        first_counts = ~(targets_BT[:, 0] == self.config.reader.bos_id).all() if exclude_bos_score else True
        nll_B, token_logp_BKT = losses.rag_nll(
            self.config.objective,
            hidden_BKTD,
            self.head(params, logit_chunk, len(hidden_BKTD)),
            targets_BT,
            mask_BT,
            scores_BK,
            prior=prior,
            label_smoothing=label_smoothing,
            first_counts=first_counts,
            log_normaliser_B=log_normaliser_B,
        )
        # RAG-Token's likelihood has the prior at every token under either convention, so hf_compat does not apply to
        # it; in the posterior of a whole answer the prior counts once
        counted = prior if self.variant == "sequence" else "paper"
        scored_BT = mask_BT.at[:, 0].set(mask_BT[:, 0] & first_counts)
        prior_BK = losses.prior_logp(scores_BK)
        logp_BKT = jnp.where(scored_BT[:, None], token_logp_BKT, 0.0)
        posterior_BK = losses.posterior_logp(logp_BKT, prior_BK, mask_BT, counted)
        return Likelihood(nll_B, posterior_BK, logp_BKT, scored_BT)

    def decoding_options(self, n_docs: int, candidates: int = 0, **options: Any) -> tuple[search.DecodingOptions, int]:
        """The options of a search, with the generator's special tokens filled in, and how many answers are returned.

        For RAG-Sequence the options are those of the search per document, whose results are the candidates.
        TypeError for an unknown option, ValueError for one out of range.
        """
        search.DecodingOptions.check_names(list(options))
        c, returned, num_beams = self.config.reader, options.get("num_return_sequences", 1), options["num_beams"]
        if self.variant == "sequence":
            draws = options.get("do_sample", False) and num_beams == 1  # samples of a document may outnumber its beams
            each = candidates or (returned if draws else num_beams)
            if not 0 <= candidates <= (candidates if draws else num_beams):
                raise ValueError(f"candidates={candidates} of each document must be 0 (all) to {num_beams}, its beams")
            if returned > each * n_docs:
                raise ValueError(
                    f"num_return_sequences={returned}, but {n_docs} documents with {each} candidates each give "
                    f"{each * n_docs}"
                )
            options["num_return_sequences"] = each
        special: dict[str, Any] = {"start_id": c.start_id, "eos_id": c.eos_id, "end_ids": c.ends, "pad_id": c.pad_id}
        forced = {"forced_bos_id": c.forced_bos_id, "forced_eos_id": c.forced_eos_id}
        special |= {name: None if token == NONE else token for name, token in forced.items()}
        special |= {"end_ids": ()} if "eos_id" in options else {}
        return search.DecodingOptions(**(special | options)), returned

    def generate(
        self,
        params: Params,
        context_ids_BKL: jax.Array,
        context_mask_BKL: jax.Array,
        scores_BK: jax.Array,
        num_beams: int = 4,
        max_length: int = 32,
        mode: generating.Mode = "thorough",
        *,
        candidates: int = 0,
        doc_chunk: int = 0,
        hf_compat: bool = False,
        tree: search.PrefixTree | None = None,
        key: jax.Array | None = None,
        **options: Any,
    ) -> generating.Generation:
        """Answers by greedy search, beam search or sampling (section 2.5), traceable as one jitted program.

        RAG-Token searches once over the marginal next-token distribution. RAG-Sequence searches once per document for
        candidates, then ranks them by p(y|x).

        max_length: tokens of an answer at most, start token and eos included.
        mode: for RAG-Sequence. `thorough` scores every candidate under every document; `fast` takes p(y|x,z) as 0
            where the beam of z did not produce y.
        candidates: for RAG-Sequence, candidates of each document; 0 for all its beams, or num_return_sequences if
            they are sampled with num_beams=1.
        doc_chunk: documents held in memory at a time, 0 for all.
        hf_compat: the prior as transformers counts it, see losses.sequence_joint.
        tree: the only answers allowed, decoding.search.prefix_tree(token sequences).
        key: random key, for do_sample.
        options: any field of decoding.rules.DecodingOptions (length_penalty, no_repeat_ngram_size, do_sample, ...); the
            special tokens are the generator's by default.

        TypeError for an unknown option; ValueError for one out of range, for shapes that do not fit together, and for
        inputs longer than the generator's positions; InputError for a retriever alone.
        """
        _, K, L = check_contexts(context_ids_BKL, context_mask_BKL, scores_BK)
        c = self.config.reader  # InputError for a retriever alone
        if mode not in ("thorough", "fast"):
            raise ValueError(f"mode must be 'thorough' or 'fast', got {mode!r}")
        given_options = {"num_beams": num_beams, "max_length": max_length} | options
        search_options, returned = self.decoding_options(K, candidates, **given_options)
        self.generator.check_room(L, max_length)
        reader = generating.Reader(self.generator, params["generator"], c.bos_id, hf_compat)
        arguments = (reader, context_ids_BKL, context_mask_BKL, losses.prior_logp(scores_BK), search_options)
        if self.variant == "token":
            answers = generating.rag_token(*arguments, tree, key, doc_chunk)
        else:
            answers = generating.rag_sequence(*arguments, mode, returned, tree, key, doc_chunk)
        return answers if returned > 1 else jax.tree.map(lambda x: x[:, 0], answers)


def check_contexts(
    ids_BKL: jax.Array,
    mask_BKL: jax.Array,
    scores_BK: jax.Array | None = None,
    labels_BT: jax.Array | None = None,
) -> tuple[int, int, int]:
    """(B, K, L) from the shapes of the arrays; ValueError with both shapes where they do not fit together."""
    if ids_BKL.ndim != 3 or mask_BKL.shape != ids_BKL.shape:
        raise ValueError(f"context ids and mask must both be [B, K, L]; got {ids_BKL.shape} and {mask_BKL.shape}")
    B, K, L = ids_BKL.shape
    if scores_BK is not None and scores_BK.shape != (B, K):
        raise ValueError(f"contexts {ids_BKL.shape} need scores [B, K] = {(B, K)}; got {scores_BK.shape}")
    if labels_BT is not None and (labels_BT.ndim != 2 or labels_BT.shape[0] != B):
        raise ValueError(f"contexts {ids_BKL.shape} need labels [B, T] with B = {B}; got {labels_BT.shape}")
    return B, K, L
