"""`rag-jax ask`: one question, its answer, and the passages it came from."""

import argparse
import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from rag_jax.answer import Answer, Pipeline


def render(question: str, answer: Answer) -> str:
    """What a reader sees."""
    lines = [f"question  {question}", f"answer    {answer.text}   (log p = {answer.score:.2f})", ""]
    lines.append("prior  posterior  passage")
    for passage in answer.passages:
        lines.append(f"{passage.prior:5.2f}  {passage.posterior:9.2f}  {passage.title} [{passage.id}]")
        lines.append(textwrap.fill(passage.text, 100, initial_indent=" " * 18, subsequent_indent=" " * 18))
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="+", help="one question or several, each in quotation marks")
    parser.add_argument("--run", type=Path, required=True, help="run directory of rag-jax train")
    parser.add_argument("--index", type=Path, help="another index, made by rag-jax index")
    parser.add_argument("--n-docs", type=int, default=0, help="passages read (default: as trained)")
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--batch", type=int, default=0, help="answer this many at once (default: all)")
    parser.epilog = 'example: rag-jax ask --run runs/world "Who founded the Torvik Guild?"'


def run(args: argparse.Namespace) -> dict[str, Any]:
    pipeline = Pipeline.from_run(args.run, args.index)
    changes = {"n_docs": args.n_docs} if args.n_docs else {}
    cfg = pipeline.answer_config(num_beams=args.num_beams, batch=args.batch or len(args.question), **changes)
    answers = pipeline.answer(args.question, cfg)
    text = "\n\n".join(render(*pair) for pair in zip(args.question, answers, strict=True))
    found = [{"question": q, **dataclasses.asdict(a)} for q, a in zip(args.question, answers, strict=True)]
    return {"text": text, "answers": found}
