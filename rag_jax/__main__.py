"""The command line: a table of commands, each a module with `configure(parser)` and `run(args)`.

A module is imported only when its command is used, so that help is printed without delay.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_jax import __version__
from rag_jax.cli import output_options
from rag_jax.errors import InputError
from rag_jax.system import disk_errors, malloc, paths, plain_text, program_cache

COMMANDS = {
    "world": ("rag_jax.cli.world", "write the built-in fictional world: passages and questions as JSONL"),
    "corpus": ("rag_jax.cli.corpus", "read passages and tokenise them once, into a corpus directory"),
    "encode": ("rag_jax.cli.encode", "embed every passage of a corpus shard by shard; killed, it goes on"),
    "index": (
        "rag_jax.cli.index",
        "make an index directory: of an encode job, of a corpus and a run, or by updating another",
    ),
    "train": ("rag_jax.cli.train", "train question encoder, context encoder and generator together"),
    "evaluate": ("rag_jax.cli.evaluate", "answer a file of questions and score the answers and the retrieval"),
    "compare": ("rag_jax.cli.compare", "put evaluations side by side, with paired bootstrap significance"),
    "ask": ("rag_jax.cli.ask", "answer one question and show the passages the answer came from"),
    "convert": (
        "rag_jax.cli.convert",
        "make a model from Hugging Face checkpoints: RAG, or DPR, BERT, BART, T5, GPT-2, Llama",
    ),
    "export": ("rag_jax.cli.export", "write a model as a directory that transformers loads"),
    "compile": (
        "rag_jax.cli.compile",
        "will it fit, how fast can it be: compile a configuration for a pod that is not here",
    ),
    "verify": (
        "rag_jax.cli.verify",
        "read every file of a corpus, index, job, run or export, and name what is damaged",
    ),
    "bench": ("rag_jax.cli.bench", "time the steps of training and search against the limits of the machine"),
}
COMPUTES = ("train", "evaluate", "encode", "index", "bench")  # long enough to be worth the restart of `malloc.keep`


def help_text() -> str:
    """The text that `rag-jax` prints without a command."""
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    head = ["usage: rag-jax COMMAND [options]", "       rag-jax COMMAND --help", "       rag-jax --version"]
    example = "example: rag-jax world --out data/world --entities 1000 --seed 0"
    return "\n".join([*head, "", "Retrieval-augmented generation in JAX and Flax.", "", *lines, "", example])


def parser_of(name: str) -> tuple[Any, argparse.ArgumentParser]:
    """The module of a command and the parser of its arguments."""
    module_name, text = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"rag-jax {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output_options.add_arguments(parser)
    module = importlib.import_module(module_name)
    module.configure(parser)
    return module, parser


def parse(name: str, argv: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """The module of a command and its parsed arguments; exits with status 2 on bad usage."""
    module, parser = parser_of(name)
    args = parser.parse_args(argv)
    for option, value in vars(args).items():
        setattr(args, option, [found(one) for one in value] if isinstance(value, list) else found(value))
    return module, args


def found(value: Any) -> Any:
    """An argument as it is, but a path in which `..` follows a missing directory is resolved, see `paths.real`."""
    return paths.real(value) if isinstance(value, Path) and paths.crosses_missing(value) else value


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(result: dict[str, Any], as_json: bool, verbose: bool = False) -> str:
    """The `text` of a result, or its other fields as JSON; `verbose`, or without a text: text and fields as lines."""
    if as_json:
        return json.dumps(finite({key: value for key, value in result.items() if key != "text"}))
    text = [result["text"]] if "text" in result else []
    if verbose or not text:
        text += [f"{key}: {value}" for key, value in result.items() if key != "text"]
    return plain_text.visible("\n".join(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    argv: the arguments; by default those of the process.
    Status: 0 (or the `exit_status` of the result), 2 for bad usage or input, 130 when interrupted, 141 when the reader
    of our output has closed the pipe.
    """
    if argv is None and sys.argv[1:2] and sys.argv[1] in COMPUTES:
        malloc.keep(os.environ)
    argv = list(sys.argv[1:] if argv is None else argv)
    disk_errors.without_echoes()
    status = 0
    try:
        if not argv or argv[0] in ("-h", "--help"):
            output = help_text()
        elif argv[0] == "--version":
            output = f"rag-jax {__version__}"
        elif argv[0] not in COMMANDS:
            print(f"rag-jax: unknown command {argv[0]!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
            return 2
        else:
            program_cache.keep(os.environ)
            module, args = parse(argv[0], argv[1:])
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result alone
                result = module.run(args)
            if result is None:  # with several processes, one of them alone prints the result
                return 0
            status = result.pop("exit_status", 0)
            output = render(result, args.json, args.verbose)
        return show(output) or status
    except KeyboardInterrupt:
        said, status = "interrupted", 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        words = str(error) if isinstance(error, InputError) else disk_errors.words(error)
        if words is None:
            raise
        said, status = words, 2
    say(said)  # outside the handler: the error's frames are gone, so progress bars have printed their last lines
    return status


def say(message: str) -> None:
    """Prints a last line to standard error, if that can still be written to."""
    with contextlib.suppress(OSError):
        print(f"rag-jax: {plain_text.one_line(message)}", file=sys.stderr, flush=True)


def show(output: str) -> int:
    """Prints the result to standard output and returns the exit status."""
    try:
        print(output, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        if isinstance(error, BrokenPipeError):
            raise
        say(disk_errors.words(error, "standard output: cannot be written") or f"standard output: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
