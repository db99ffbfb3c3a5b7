"""Opens a trained run and answers a question, with the passages that the answer came from.

    python ask.py runs/towns "On which river does Tirasburg 0 lie?"

RUN is what `rag-jax train --run RUN` or `rag_jax.fit(config, RUN)` wrote, as own_data.py does with `--run`.
"""

import argparse

import rag_jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory")
    parser.add_argument("question")
    parser.add_argument("--n-docs", type=int, default=0, help="passages to read (default: as many as in training)")
    args = parser.parse_args()
    pipeline = rag_jax.Pipeline.from_run(args.run)
    answer = pipeline.ask(args.question, n_docs=args.n_docs)
    print(f"{answer.text}   (log p(y|x) = {answer.score:.2f})\n")
    for number, passage in enumerate(answer.passages, 1):
        print(f"{number}. prior {passage.prior:.2f}, posterior {passage.posterior:.2f}: {passage.title}")
        print(f"   {passage.text}")
    # RAG-Token marginalises at every token, so each token of the answer has a posterior of its own
    for token, posterior in zip(answer.tokens, answer.token_posterior or (), strict=False):
        print(f"{token:<12}", "  ".join(f"{share:.2f}" for share in posterior))


if __name__ == "__main__":
    main()
