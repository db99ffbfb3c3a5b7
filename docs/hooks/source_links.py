"""MkDocs: files of the repository that pages link to (../rag_jax/rag.py, ../configs/world.py) become pages of the site.

On GitHub such a link opens the file; here a copy of it, as text, is part of the site. A link to a file that is not
there is left as it is, and MkDocs fails at it.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)(#[^)\s]*)?(?=\))")


def linked(text):
    """Paths of repository files that a page links to."""
    return {match[1] for match in LINK.finditer(text) if (ROOT / match[1]).is_file()}


def on_files(files, config):
    pages = [file for file in files if file.is_documentation_page()]
    for path in sorted(set().union(*(linked(page.content_string) for page in pages))):
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, f"source/{path}.txt", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    there = linked(markdown)
    return LINK.sub(lambda match: f"source/{match[1]}.txt" if match[1] in there else match[0], markdown)
