"""Makes a tokenizer read special tokens in a text as text: `<s>`, `[SEP]` or `<|im_end|>` in a passage is what a user
wrote, no control token.
"""

import json
from typing import Any

from tokenizers import Tokenizer as Backend

_UNREACHABLE = "\ufdd0"  # a code point that Unicode keeps out of texts


def text_backend(backend: Backend) -> Backend:
    """A copy of a tokenizer that finds no special tokens in a text and adds none; all other ids are the same.

    The library's `encode_special_tokens` does half of it: a special token that the vocabulary itself holds (Unigram,
    WordLevel) would still be matched as a word. So special tokens get names in the copy that no text contains.
    """
    made = json.loads(backend.to_str())
    made["post_processor"] = made["truncation"] = made["padding"] = None
    model: dict[str, Any] = made["model"]
    merged = set()  # tokens of merges keep their names, which the merges refer to: ordinary text may become them
    for pair in model.get("merges") or ():
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        merged |= {left, right, left + right}
    specials = [token for token in made["added_tokens"] if token["special"] and token["content"] not in merged]
    names = {token["content"]: f"{_UNREACHABLE}{token['id']}" for token in specials}
    for token in specials:
        token["content"] = names[token["content"]]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    plain = Backend.from_str(json.dumps(made))
    plain.encode_special_tokens = True
    return plain
