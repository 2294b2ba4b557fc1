"""Count what makes prose hard to read: `python docs/check_prose.py` fails where a text exceeds a limit.

A sentence ends at `.`, `!`, `?`, `:` or `;` in front of a capital, a digit or code. Blocks of code, lines of tables and
HTML comments are not prose. Words are what spaces separate.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md")
MAX_WORDS = 40
MAX_LINES = {"README.md": 120, "docs/design.md": 250}
VAGUE = re.compile(r"(What|Where|Whether|How)\b")
"""Opening words of a docstring that names neither a thing nor an action."""


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a Markdown document."""
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    text = "\n".join("" if line.lstrip().startswith(("|", "<!--")) else line for line in text.splitlines())
    for block in re.split(r"\n\s*\n|\n\s*- |\n#", text):
        yield from re.split(r"(?<=[.!?:;])\s+(?=[A-Z`0-9])", " ".join(block.split()))


def check_document(name: str, text: str) -> Iterator[str]:
    """Yield a line for each sentence that is too long, and one if the document is."""
    for sentence in sentences(text):
        if (num_words := len(sentence.split())) > MAX_WORDS:
            yield f"{name}: a sentence of {num_words} words, at most {MAX_WORDS}: {sentence[:80]}..."
    if (num_lines := len(text.splitlines())) > MAX_LINES.get(name, num_lines):
        yield f"{name}: {num_lines} lines, at most {MAX_LINES[name]}"


def check_docstrings(name: str, source: str) -> Iterator[str]:
    """Yield a line for each docstring of a Python file that opens vaguely, also those behind attributes."""
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str) and VAGUE.match(node.value.value):
            yield f"{name}:{node.lineno}: a docstring starts with a noun or a verb: {node.value.value[:60]!r}"


def main() -> None:
    """Check all documents and the sources, and print what is wrong."""
    faults: list[str] = []
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            faults += check_document(str(path.relative_to(ROOT)), path.read_text())
    for path in sorted((ROOT / "src").rglob("*.py")):
        faults += check_docstrings(str(path.relative_to(ROOT)), path.read_text())
    print("\n".join(faults) if faults else "prose: nothing to mend")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
