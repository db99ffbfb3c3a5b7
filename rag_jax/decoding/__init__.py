"""Decoding: answers from token probabilities.

`search` has greedy search, beam search and sampling over any `step(tokens, cache)`; `rules` restricts the next token;
`rag_decode` decodes RAG-Token and RAG-Sequence (Lewis et al. 2020, section 2.5) with them, inside one jit.
"""
