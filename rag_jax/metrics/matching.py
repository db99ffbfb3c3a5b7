"""Compares answers with gold answers: SQuAD's and MLQA's exact match and F1, DPR's `has_answer` for texts and regular
expressions.
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import regex

from rag_jax.errors import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)

# DPR's `[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]`, except that each letter of a script without spaces is a token of its own.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKENS = regex.compile(
    rf"[{_SPACELESS}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_SPACELESS}]]+|[^\p{{Z}}\p{{C}}]", regex.VERSION1
)

_ANY_PUNCTUATION = regex.compile(rf"[\p{{P}}{re.escape(string.punctuation)}]")
_MLQA_CHARACTER = re.compile("[\u4e00-\u9fa5]")
_MLQA_ARTICLES = {
    "en": _ARTICLES,
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "hi": None,
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "ar": re.compile("ال"),  # wherever it stands, as in MLQA's script
    "zh": None,
}


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def normalize_mlqa(text: str, language: str) -> str:
    """MLQA's normal form (Lewis et al. 2020, arXiv 1910.07475; mlqa_evaluation_v1.py): lower case, no punctuation of
    any script, no articles of the language, single spaces; for Chinese, every character is a word.
    """
    text = _ANY_PUNCTUATION.sub("", text.lower())
    articles = _MLQA_ARTICLES[language]
    text = articles.sub(" ", text) if articles else text
    return " ".join((_MLQA_CHARACTER.sub(r" \g<0> ", text) if language == "zh" else text).split())


def exact_match(prediction: str, golds: Sequence[str], match: str = "string") -> float:
    """1.0 where the prediction equals any gold answer in normal form, else 0.0. ValueError without gold answers."""
    form = NORMAL_FORMS[match]
    return _best(lambda gold: float(form(prediction) == form(gold)), golds)


def f1(prediction: str, golds: Sequence[str], match: str = "string") -> float:
    """The best F1 over the gold answers, on bags of words of the normal forms. ValueError without gold answers."""
    form = NORMAL_FORMS[match]
    return _best(lambda gold: _f1_of_words(form(prediction).split(), form(gold).split()), golds)


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the tokens of any answer occur one after another in the text, as DPR counts it (NFD, lower case).

    DPR reads a whole Chinese, Japanese or Thai phrase as one token, so that hardly any answer is found; here each of
    their letters is one. All other text gives exactly DPR's result. An answer without tokens is never found.
    """
    joined = _join_tokens(text)
    return any(len(wanted) > 1 and wanted in joined for wanted in map(_join_tokens, answers))


def has_pattern(text: str, patterns: Iterable[str]) -> bool:
    """Whether any answer, a regular expression, is found in the text: DPR's regex mode, as CuratedTREC is scored."""
    normal = unicodedata.normalize("NFD", text)
    return any(_compiled(pattern).search(normal) is not None for pattern in patterns)


def pattern_match(prediction: str, patterns: Sequence[str]) -> float:
    """1.0 where any answer, a regular expression, fits the beginning of the prediction (DrQA), else 0.0."""
    normal = unicodedata.normalize("NFD", prediction)
    return _best(lambda pattern: float(_compiled(pattern).match(normal) is not None), patterns)


def tokens(text: str) -> list[str]:
    """DPR's tokens of a text: words and signs in NFD, lower case."""
    return [token.lower() for token in _TOKENS.findall(unicodedata.normalize("NFD", text))]


# How answers are compared, by the name of the rule: SQuAD's, regular expressions, or MLQA's for a language.
NORMAL_FORMS: dict[str, Callable[[str], str]] = {
    "string": normalize_answer,
    **{f"mlqa_{language}": functools.partial(normalize_mlqa, language=language) for language in _MLQA_ARTICLES},
}
MATCHERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string": exact_match,
    "regex": pattern_match,
    **{name: functools.partial(exact_match, match=name) for name in NORMAL_FORMS if name != "string"},
}
FINDERS: dict[str, Callable[[str, Iterable[str]], bool]] = {
    name: has_pattern if name == "regex" else has_answer for name in MATCHERS
}


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(unicodedata.normalize("NFD", pattern), re.IGNORECASE | re.UNICODE | re.MULTILINE)
    except re.error as error:
        raise InputError(f"answer {pattern!r} is not a regular expression ({error}); use --match string") from error


def _best(score: Callable[[str], float], golds: Sequence[str]) -> float:
    if isinstance(golds, str) or not golds:
        raise ValueError(f"a non-empty list of gold answers wanted, got {golds!r}")
    return max(score(gold) for gold in golds)


def _f1_of_words(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:  # as SQuAD 2: both empty is right, so that F1 is never below exact match
        return float(prediction == gold)
    common = (Counter(prediction) & Counter(gold)).total()
    return 2 * common / (len(prediction) + len(gold))


def _join_tokens(text: str) -> str:
    # A newline, which no token contains, between and around the tokens: consecutive tokens are then a substring.
    return "\n" + "".join(token + "\n" for token in tokens(text))
