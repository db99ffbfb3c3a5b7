"""Says how two tokenizers differ: two encoders that share a token table must read the same ids."""

import json
from itertools import islice

from rag_jax.data.tokenizers import Tokenizer


def difference(one: Tokenizer, other: Tokenizer) -> str:
    """The first difference by which two tokenizers may give different ids to a text, in words; "" if there is none."""
    if one.hash == other.hash:
        return ""
    a, b = (t.backend.get_vocab(with_added_tokens=True) for t in (one, other))
    tokens = [token for token in sorted(a.keys() | b.keys()) if a.get(token) != b.get(token)]
    if tokens:
        shown = [f"{token!r} is {a.get(token, 'none')} and {b.get(token, 'none')}" for token in islice(tokens, 3)]
        return f"{len(tokens)} tokens of their vocabularies: {', '.join(shown)}"
    wraps = [(t.prefix_ids, t.middle_ids, t.suffix_ids, t.pad_id) for t in (one, other)]
    if wraps[0] != wraps[1]:
        return f"how they wrap a sentence: {wraps[0]} and {wraps[1]}"
    first, second = (json.loads(t.backend.to_str()) for t in (one, other))
    for key in ("normalizer", "pre_tokenizer", "model", "added_tokens"):
        if first[key] != second[key]:
            named = [json.dumps(found[key], ensure_ascii=False) for found in (first, second)]
            if max(map(len, named)) > 300:
                return f"their {key}"
            return f"their {key}: {named[0]} and {named[1]}"
    return ""
