"""Writes what the documentation takes from the code: docs/command-line.md, from the argument parsers, and the code of
docs/extending.md, from tests/test_extending.py.

    python docs/generate.py            write
    python docs/generate.py --check    exit status 1 where something would change
"""

import argparse
import ast
import re
import sys
from pathlib import Path

from rag_jax import __main__ as main

DOCS = Path(__file__).resolve().parent
EXERCISES = DOCS.parent / "tests" / "test_extending.py"
HEAD = """# Command line

Written by `python docs/generate.py` from the argument parsers. Every command has `--help` with an example, and `--json`
prints the figures of its result as one JSON object on standard output; all else goes to standard error. `--verbose`
prints all of the result, and with several processes the lines of each. Exit status: 0, or 2 for bad usage and input,
with one line that says what is wrong and what to do (`verify`: also 2 where something is damaged), 130 when
interrupted. How the options work together is on the pages of the guides.
"""
BLOCK = re.compile(r"(<!-- tests/test_extending\.py: ([\w, ]+) -->\n)```python\n.*?```\n", re.DOTALL)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, by what follows `rag-jax`."""
    made = {name: main.parser_of(name)[1] for name in main.COMMANDS}
    for name, parser in list(made.items()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                made |= {f"{name} {kind}": below for kind, below in action.choices.items()}
    return made


def cell(text: str) -> str:
    """Text within a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def row(action: argparse.Action, parser_prog: str) -> str:
    """An option with what it means."""
    words = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    value = "" if action.nargs == 0 else words
    if action.nargs in ("*", "+"):
        value = f"{words} ..."
    shown = action.option_strings[-1] + (f" {value}" if value else "") if action.option_strings else value
    default = "all cores" if action.dest == "workers" else action.default  # which is that of this machine
    parts = [cell((action.help or "") % {**vars(action), "default": default, "prog": parser_prog})]
    if action.choices is not None:
        parts.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    if action.required and action.option_strings:
        parts.append("required")
    code = shown.replace("|", "\\|")
    return f"| `{code}` | {'; '.join(part for part in parts if part)} |"


def options(parser: argparse.ArgumentParser) -> list[str]:
    """A table a group of options."""
    lines = []
    for group in parser._action_groups:
        shown = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and action.dest not in ("help", "json", "verbose", "what")
        ]
        if not shown:
            continue
        title = group.title if group.title not in ("positional arguments", "options", "optional arguments") else ""
        lines += [f"**{title}**", ""] if title else []
        kind = "option" if shown[0].option_strings else "argument"
        lines += [f"| {kind} | meaning |", "|---|---|", *(row(action, parser.prog) for action in shown), ""]
    return lines


def command_line() -> str:
    """The page of the command line."""
    lines = [HEAD]
    for name, parser in parsers().items():
        level = "###" if " " in name else "##"
        text = (parser.description or "").rstrip(".")
        lines += [f"{level} rag-jax {name}", "", f"{text[:1].upper()}{text[1:]}.", "", *options(parser)]
        if name != "bench" and parser.epilog:
            lines += ["```text", *(line.rstrip() for line in parser.epilog.strip().splitlines()), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def pieces(names: list[str]) -> str:
    """The source text of functions and classes of tests/test_extending.py, with their decorators."""
    source = EXERCISES.read_text(encoding="utf-8")
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return "\n\n\n".join(found[name] for name in names)


def extending(text: str) -> str:
    """docs/extending.md with its code as the tests have it."""
    return BLOCK.sub(lambda match: f"{match[1]}```python\n{pieces(match[2].split(', '))}\n```\n", text)


def pages() -> dict[Path, str]:
    """The generated pages, as they should be now."""
    page = DOCS / "extending.md"
    return {DOCS / "command-line.md": command_line(), page: extending(page.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    new = {path: text for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text}
    if "--check" in sys.argv[1:]:
        sys.exit(f"not up to date, run python docs/generate.py: {', '.join(map(str, new))}" if new else 0)
    for path, text in new.items():
        path.write_text(text, encoding="utf-8")
        print(path)
