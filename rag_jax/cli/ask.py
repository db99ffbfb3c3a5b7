"""`rag-jax ask`: answers questions, and shows the passages that each answer came from."""

import argparse
import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from rag_jax.cli import answer_options
from rag_jax.inference.pipeline import Answer, Pipeline
from rag_jax.system.plain_text import one_line, visible


def render(question: str, found: Answer) -> str:
    """The answer as text for a terminal: question, answer, and the passages with their prior and posterior."""
    lines = [f"question  {one_line(question)}", f"answer    {one_line(found.text)}   (log p = {found.score:.2f})", ""]
    if not found.passages:
        return "\n".join([*lines, "no passage was found or read: the generator answers from the question alone"])
    lines.append("prior  posterior  passage")
    for passage in found.passages:
        lines.append(
            f"{passage.prior:5.2f}  {passage.posterior:9.2f}  {one_line(passage.title)} [{one_line(passage.id)}]"
        )
        lines.append(textwrap.fill(visible(passage.text), 100, initial_indent=" " * 18, subsequent_indent=" " * 18))
    if found.token_posterior:
        lines += ["", "posterior of the passages above, token by token"]
        for token, shares in zip(found.tokens, found.token_posterior, strict=True):
            lines.append(f"{one_line(token):<16}  {'  '.join(f'{share:4.2f}' for share in shares)}")
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="+", help="one question or several, each in quotation marks")
    parser.add_argument("--run", type=Path, required=True, help="run directory of rag-jax train")
    parser.add_argument("--index", type=Path, help="another index, made by rag-jax index")
    answer_options.add_arguments(parser)
    parser.add_argument("--batch", type=int, help="answer this many at once (default: all)")
    parser.epilog = 'example: rag-jax ask --run runs/world "Who founded the Torvik Guild?"'


def run(args: argparse.Namespace) -> dict[str, Any]:
    pipeline = Pipeline.from_run(args.run, args.index, answer_options.search_from_argument(args.search))
    cfg = answer_options.from_arguments(args, pipeline.answer_config(batch=len(args.question)))
    answers = pipeline.answer(args.question, cfg)
    text = "\n\n".join(render(*pair) for pair in zip(args.question, answers, strict=True))
    found = [{"question": q, **dataclasses.asdict(a)} for q, a in zip(args.question, answers, strict=True)]
    return {"text": text, "answers": found}
