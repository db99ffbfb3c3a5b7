"""Claims to be classified by evidence: FEVER, and CLIMATE-FEVER, whose files contain the evidence."""

from collections.abc import Iterator

from rag_jax.data.readers.rows import (
    BadLine,
    Fields,
    Passage,
    Question,
    content_id,
    each,
    every,
    optional,
    rest,
    string,
    unique,
)
from rag_jax.data.readers.simple_rows import numbered


def question(fields: Fields, own_id: str) -> list[Question]:
    """{"claim", "label" or "claim_label"}, perhaps "evidences": the label is the answer, and also a field `label`.

    The right passages are the evidence with the label of the claim; for a disputed claim, all that supports or refutes.
    """
    label = string(fields, "claim_label" if "claim_label" in fields else "label")
    says = ("SUPPORTS", "REFUTES") if label == "DISPUTED" else (label,) if label != "NOT_ENOUGH_INFO" else ()
    found = every(each({"evidences": []} | fields, "evidences", lambda one: [(_evidence(one), one)]))
    right = unique(passage.id for passage, one in found if one.get("evidence_label") in says)
    made = {"question": string(fields, "claim"), "answers": [label], "label": label}
    sides = {"positive_passage_ids": list(right)}
    return numbered(rest(fields, "claim", "claim_label", "evidences") | made | sides, own_id)


def passages(fields: Fields, own_id: str) -> Iterator[Passage | BadLine]:
    """The sentences of evidence, each a passage."""
    return each({"evidences": []} | fields, "evidences", lambda one: [_evidence(one)])


def _evidence(fields: Fields) -> Passage:
    title, text = optional(fields, "article"), string(fields, "evidence")
    name = content_id(title, text)
    return Passage(name, title, text, name)
