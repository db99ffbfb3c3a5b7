"""griffe: lines `name: what it is` of a docstring as a list, so that each field has a line of its own."""

import re

from griffe import Extension

FIELD = re.compile(r"^((?:`?\w+`?)(?:, `?\w+`?)*): (?=\S)")


def as_list(text):
    """The docstring in Markdown."""
    lines, inside = [], False
    for line in text.splitlines():
        field = FIELD.match(line)
        if field and "`" not in field[1]:
            names = ", ".join(f"`{name}`" for name in field[1].split(", "))
            lines += [] if inside or not lines or not lines[-1].strip() else [""]
            lines.append(f"- {names}: {line[field.end() :]}")
            inside = True
        else:
            inside = inside and bool(line.strip())
            lines.append(f"  {line.strip()}" if inside else line)
    return "\n".join(lines)


class Fields(Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
