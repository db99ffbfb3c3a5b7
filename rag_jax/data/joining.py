"""The generator's input `title / passage // question`, joined from ids so that it equals tokenising the joined text.

The text is that of transformers' RagRetriever (postprocess_docs). Passages are tokenised once, at corpus build, and
questions apart from them. The text is cut at the seam before " // ": its left side ends in a character that is no
space, and its right side starts with exactly one. So double spaces can be replaced on each side alone, and a tokenizer
whose tokens never span two words gives the ids of the left side, then those of the right side, for the whole text.
"""

from collections.abc import Sequence

from rag_jax.data.tokenizers import Tokenizer
from rag_jax.errors import InputError

TITLE_SEPARATOR, QUESTION_SEPARATOR = " / ", " // "

# What follows the seam, for the check at corpus build: words, punctuation, digits, spaces, another script, nothing.
_QUESTIONS = (
    "who wrote it?", "When was the 2nd one founded, and where?", "'s name of", "?", "(what is it)", "  two spaces",
    "1984", "/ slash", "éa où", "谁写的？", "من كتبه؟", "A: hello\nB: hi", "", "<mask> is it?", "...and then",
)  # fmt: skip


def normalize_title(title: str) -> str:
    """The title without surrounding space and without one leading and one trailing double quote."""
    return title.strip().removeprefix('"').removesuffix('"').strip()


def passage_text(title: str, text: str) -> str:
    """The text left of the seam; title and text as the corpus stores them (normalised, stripped)."""
    return (title + TITLE_SEPARATOR + text).replace("  ", " ")


def question_text(question: str) -> str:
    """The text right of the seam."""
    return (QUESTION_SEPARATOR + question).replace("  ", " ")


def joined_text(title: str, text: str, question: str) -> str:
    """The generator's input as one text; title and text as the corpus stores them."""
    return (title + TITLE_SEPARATOR + text + QUESTION_SEPARATOR + question).replace("  ", " ")


def join_tail(tokenizer: Tokenizer, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of " // " + question and the suffix, a row for each question."""
    suffix = list(tokenizer.suffix_ids)
    return [ids + suffix for ids in tokenizer.encode_batch([question_text(question) for question in questions])]


def join(
    prefix_ids: Sequence[int],
    passage_ids: Sequence[int],
    tail_ids: Sequence[int],
    max_length: int,
    suffix_length: int = 1,
) -> list[int]:
    """prefix + passage + tail, in at most `max_length` ids.

    The passage is cut to fit; the tail only if it is too long even without a passage, and then before its suffix.
    InputError where not even one id of a question fits.
    """
    room = max_length - len(prefix_ids) - len(tail_ids)
    if room >= 0:
        return [*prefix_ids, *passage_ids[:room], *tail_ids]
    kept = max_length - len(prefix_ids) - suffix_length
    if kept < 1:
        raise InputError(f"length {max_length} leaves no room for a question beside {max_length - kept} special tokens")
    return [*prefix_ids, *tail_ids[:kept], *tail_ids[len(tail_ids) - suffix_length :]]


def check_join(tokenizer: Tokenizer, passages: Sequence[tuple[str, str]]) -> None:
    """Raises InputError if the joined ids of a (title, text) passage differ from the ids of the joined text."""
    pairs = [(*passage, _QUESTIONS[(i + j) % len(_QUESTIONS)]) for i, passage in enumerate(passages) for j in (0, 7)]
    left = tokenizer.encode_batch([passage_text(title, text) for title, text, _ in pairs])
    right = join_tail(tokenizer, [question for *_, question in pairs])
    whole = tokenizer.encode_batch([joined_text(*pair) for pair in pairs])
    for pair, left_ids, tail, expected in zip(pairs, left, right, whole, strict=True):
        if left_ids + tail != expected + list(tokenizer.suffix_ids):
            raise InputError(
                f"the generator's tokenizer carries tokens over the seam between passage and question (for example "
                f"{joined_text(*pair)[-60:]!r}), so passages cannot be tokenised beforehand; "
                "choose one that splits at spaces, such as byte-level BPE (BART, GPT-2) or WordPiece"
            )
