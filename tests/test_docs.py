"""README and docs/: links lead somewhere, commands are real, pages that are made from the code are up to date."""

import importlib.util
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

import rag_jax

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# What may stand before a command on its line.
LAUNCHERS = r"(?:rag-jax|scripts/launch_tpu_pod\.sh|.*scripts/launch_slurm\.sh|python scripts/launch_local\.py .*? --) "

spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.fixture(scope="module")
def parsers():
    return generate.parsers()


def text_of(page):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", lambda match: match[0].replace("](", "] ("), FENCE.sub("", page.read_text("utf-8")))


def anchors(page):
    """What a link may name of a page: its headings, as Markdown and GitHub spell them, and names of the Python API."""
    found, text = [], FENCE.sub("", page.read_text("utf-8"))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        found.append(re.sub(r"\s", "-", slug))
    return {*found, *re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    broken = []
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT) or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_navigation_and_reached_from_the_readme():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert re.search(rf"[ :]{re.escape(page.name)}$", navigation, re.MULTILINE), page.name
        assert page.name == "index.md" or f"(docs/{page.name}" in readme, page.name


def test_the_readme_is_short_and_the_pages_say_nothing_of_what_readers_do_not_have():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
    for page in PAGES:
        assert not re.search(r"\.\./shared|REFERENCE|DESIGN\b|/work/", page.read_text("utf-8")), page.name


def commands(page):
    """Arguments after `rag-jax` of every command line in the code of a page."""
    for language, code in FENCE.findall(page.read_text("utf-8")):
        if language in ("", "text", "bash", "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                line = re.sub(r"^\s*(?:examples?: )?", "", line)
                if re.match(LAUNCHERS, line):
                    line = re.sub(r"\s{3,}\(.*\)$", "", line)  # a remark
                    yield shlex.split(re.sub(f"^{LAUNCHERS}", "", line), comments=True)


def test_commands_parse(parsers):
    count = 0
    for page in PAGES:
        for words in commands(page):
            if words[0].startswith("-"):  # rag-jax --version
                assert words == ["--version"]
                continue
            name = " ".join(words[:2]) if words[0] == "bench" else words[0]
            assert name in parsers, f"{page.name}: rag-jax {name}"
            try:
                parsers[name].parse_args(words[len(name.split()) :])
            except SystemExit:
                pytest.fail(f"{page.name}: rag-jax {shlex.join(words)}")
            count += 1
    assert count > 60


def test_options_in_sentences_exist(parsers):
    """`rag-jax NAME ... --option` within a sentence: commands and options that there are. (CHANGELOG.md names former
    ones, too.)
    """
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):
        for words in re.findall(r"`rag-jax ((?:[^`\n]|\n(?!\n))+)`", FENCE.sub("", page.read_text("utf-8"))):
            words = words.split()
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in parsers), None)
            assert name is not None or words[0].startswith("-") or words[0].isupper(), f"{page.name}: {words}"
            known = parsers[name]._option_string_actions if name else ()
            for option in (word for word in words[1:] if name and re.fullmatch(r"--[\w-]+", word)):
                assert option in known, f"{page.name}: rag-jax {name} {option}"


def test_public_names_are_on_the_page_of_the_api():
    page = (DOCS / "python-api.md").read_text("utf-8")
    for name in rag_jax.__all__:
        assert f"`rag_jax.{name}`" in page, name
        if name in rag_jax._PUBLIC:
            assert f"\n::: {rag_jax._PUBLIC[name]}.{name}\n" in page, name


def test_names_on_the_page_of_the_api_exist():
    for name in re.findall(r"^::: (\S+)$", (DOCS / "python-api.md").read_text("utf-8"), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        source = ROOT / f"{module.replace('.', '/')}.py"
        assert re.search(rf"^(?:def|class) {attribute}\b", source.read_text("utf-8"), re.MULTILINE), name


@pytest.mark.parametrize("page", ["command-line.md", "extending.md"])
def test_generated_pages_are_up_to_date(page):
    """Run python docs/generate.py where this fails."""
    assert (DOCS / page).read_text("utf-8") == generate.pages()[DOCS / page]


def test_shipped_configurations_are_listed():
    page = (DOCS / "training.md").read_text("utf-8")
    for file in (ROOT / "configs").glob("*.py"):
        assert f"(../configs/{file.name})" in page, file.name
