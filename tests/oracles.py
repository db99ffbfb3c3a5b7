"""Simple reference implementations: NumPy float64, loops, probabilities instead of logarithms, no caches."""

import itertools
from collections.abc import Callable

import numpy as np


def softmax(x, axis=-1):
    e = np.exp(np.asarray(x, np.float64) - np.max(x, axis=axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def rag_sequence(p_next, targets, prior, prior_counts=lambda target: True) -> float:
    """p(y|x) of one question under RAG-Sequence: p_next [K][T][V], targets [t, ...] without padding, prior [K]."""
    total = 0.0
    for k, p_z in enumerate(prior):
        p_y = p_z if prior_counts(targets) else 1.0
        for t, token in enumerate(targets):
            p_y *= p_next[k][t][token]
        total += p_y
    return total


def rag_token(p_next, targets, prior) -> float:
    """p(y|x) of one question under RAG-Token, which marginalises at every token; arguments as `rag_sequence`."""
    p_y = 1.0
    for t, token in enumerate(targets):
        p_y *= sum(p_z * p_next[k][t][token] for k, p_z in enumerate(prior))
    return p_y


def sequences(vocabulary: int, steps: int, eos: int) -> list[tuple[int, ...]]:
    """All sequences that can be generated in `steps` tokens: ending with eos, or `steps` tokens without one."""
    found = []
    for n in range(1, steps + 1):
        for tokens in itertools.product(range(vocabulary), repeat=n):
            if eos not in tokens[:-1] and (tokens[-1] == eos or n == steps):
                found.append(tokens)
    return found


NextLogp = Callable[[tuple[int, ...]], np.ndarray]  # the tokens so far, bos included -> [V]


def beam_search(
    next_logp: NextLogp, beams: int, length: int, bos: int, eos: int, length_penalty: float = 1.0
) -> list[tuple[tuple[int, ...], float, float]]:
    """(tokens with bos, score, log-probability) of the beams, best first; plain lists, and no early stopping.

    Of the 2M best continuations, the finished ones among the first M are results; the best M others stay open.
    """
    live, done = [((bos,), 0.0)], []

    def score(tokens, logp):
        return logp / (len(tokens) - 1) ** length_penalty

    for _ in range(length - 1):
        grown = [
            ((*tokens, token), logp + float(step))
            for tokens, logp in live
            for token, step in enumerate(next_logp(tokens))
        ]
        grown = sorted(grown, key=lambda found: -found[1])[: 2 * beams]
        done += [found for found in grown[:beams] if found[0][-1] == eos]
        live = [found for found in grown if found[0][-1] != eos][:beams]
        done = sorted(done, key=lambda found: -score(*found))[:beams]
    ranked = sorted(done + live, key=lambda found: -score(*found))[:beams]
    return [(tokens, score(tokens, logp), logp) for tokens, logp in ranked]


def greedy(next_logp: NextLogp, length: int, bos: int, eos: int) -> tuple[tuple[int, ...], float]:
    """(tokens with bos, log-probability)"""
    tokens, total = (bos,), 0.0
    while len(tokens) < length and (len(tokens) == 1 or tokens[-1] != eos):
        logp = next_logp(tokens)
        tokens, total = (*tokens, int(np.argmax(logp))), total + float(np.max(logp))
    return tokens, total


def pad(tokens, length: int, pad_id: int) -> list[int]:
    return [*tokens, *[pad_id] * (length - len(tokens))]
