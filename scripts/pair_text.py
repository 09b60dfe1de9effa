"""Text for the models of `train_pair`: reading it, splitting it and converting it to tokens.

A *document* is one string: a source file, a topic of the language reference, or a question with its answer. Nothing
here downloads anything.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from question_answers import Record, Tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
SMALLEST_VOCABULARY = 258  # 256 bytes and the two special tokens
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".jsonl"}
GSM8K_HINT = "GSM8K's train.jsonl is in https://github.com/openai/grade-school-math (MIT licence)"

# Folders that are not typical code: installed packages, test data, tables of code points, and the fine-tune's text.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings", "pydoc_data"}
_LONGEST_DOCUMENT = 20_000  # characters; longer files are cut, so that one big file still leaves text to hold out
_LONGEST_PASSAGE = 3_000  # characters; the same for the language reference, which is shorter
_SHORTEST_REPEAT = 60  # characters; shorter paragraphs ("For example:") may repeat


class PairError(ValueError):
    """Bad input, described in one line."""


# ---- reading -------------------------------------------------------------------------------------------------------


def standard_library(max_characters: int = 4_000_000) -> list[str]:
    """Return source files of this Python's standard library, sorted by path, about `max_characters` in all."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in sorted(root.rglob("*.py")) if not _SKIPPED_FOLDERS.intersection(p.relative_to(root).parts))
    documents: list[str] = []
    total = 0
    for text in filter(str.strip, map(_read, files)):
        documents.append(text)
        total += len(text)
        if total >= max_characters:
            break
    if not documents:
        raise PairError(f"{root} holds no source files of the standard library; give your own text with --base-text")
    return documents


def language_reference() -> list[str]:
    """Return passages of the topics of Python's `help()`, in sorted order.

    Paragraphs that several topics share are kept once, so that held-out text is not also trained on.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise PairError("this Python has no pydoc_data.topics; give your own text with --finetune-text") from None
    seen: set[str] = set()
    documents: list[str] = []
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                kept.append(paragraph)
            if len(key) >= _SHORTEST_REPEAT:
                seen.add(key)
        documents += _cut("\n\n".join(kept).strip("\n"), _LONGEST_PASSAGE)
    # Once shared paragraphs are removed, a topic may be reduced to its title.
    return [text for text in documents if len(text) >= 2 * _SHORTEST_REPEAT]


def encoding_tables(max_characters: int = 1_000_000) -> list[str]:
    """Return passages of the tables of character encodings in this Python's standard library, in sorted order.

    Neither `standard_library` nor `language_reference` contains this text.
    """
    root = Path(sysconfig.get_path("stdlib"), "encodings")
    texts = filter(None, map(_read, sorted(root.glob("*.py"))))
    documents = [passage for text in texts for passage in _cut(text, _LONGEST_PASSAGE)]
    if not documents:
        raise PairError(f"{root} holds no tables of encodings; give your own text with --second-text")
    share = max(1, sum(map(len, documents)) // max_characters)
    return documents[::share]


def read_documents(paths: Iterable[Path]) -> list[str]:
    """Return the documents of files and folders, in the order given; files of a folder are sorted by name.

    Lines of a .jsonl file are objects with `question` and `answer`, or with `text`. A text file of `Question: …`
    paragraphs gives one document for each of them; any other file is one document, cut if it is long.
    """
    documents = [text for path in paths for text in _documents_of(Path(path)) if text.strip()]
    if not documents:
        raise PairError("the text given is empty")
    return documents


def _documents_of(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in TEXT_SUFFIXES and p.is_file()]
        if not files:
            raise PairError(f"{path}: no text in this folder (looked for {', '.join(sorted(TEXT_SUFFIXES))})")
    elif path.is_file():
        files = [path]
    else:
        raise PairError(f"{path}: no such file or folder")
    for file in files:
        if file.suffix.lower() == ".jsonl":
            yield from _json_lines(file)
        else:
            text = _read(file)
            if text.startswith("Question: "):
                yield from (part.strip() for part in re.split(r"\n\n+(?=Question: )", text))
            else:
                yield from _cut(text, _LONGEST_DOCUMENT)


def _json_lines(path: Path) -> Iterator[str]:
    # split("\n"), not splitlines(), because JSON allows U+2028 and similar characters inside a string.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield row["text"] if "text" in row else f"Question: {row['question']}\nAnswer: {row['answer']}"
        except (ValueError, KeyError, TypeError):
            raise PairError(f"{path}, line {number}: not an object with `question` and `answer`, or `text`") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PairError(f"{path}: cannot be read ({error.strerror})") from None


def _cut(text: str, longest: int) -> Iterator[str]:
    """Yield parts of `text` of about `longest` characters, cut at blank lines."""
    part: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        part.append(paragraph)
        length += len(paragraph) + 2
        if length >= longest:
            yield "\n\n".join(part)
            part, length = [], 0
    if part:
        yield "\n\n".join(part)


# ---- splitting -----------------------------------------------------------------------------------------------------


def hold_out(documents: Sequence[str], every: int, max_characters: int = 300_000) -> tuple[list[str], list[str]]:
    """Return (training documents, held-out documents).

    One document in `every` is held out, evenly over the whole, or fewer if that would exceed about `max_characters`.
    The split depends only on the order of the documents.
    """
    if len(documents) < 2:
        raise PairError("the text is a single short document; at least two are needed, one of them held out")
    every = min(max(every, sum(map(len, documents)) // max_characters), len(documents))
    train = [text for index, text in enumerate(documents) if index % every != every // 2]
    held = documents[every // 2 :: every]
    return train, list(held)


def join(documents: Iterable[str]) -> str:
    """Join documents to one text, with a blank line between them."""
    return "\n\n".join(text.strip("\n") for text in documents) + "\n"


def interleaved(some: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the documents of both, each evenly over the whole."""
    placed = [(index / len(part), text) for part in (some, others) for index, text in enumerate(part)]
    return [text for _, text in sorted(placed, key=lambda pair: pair[0])]


# ---- tokens --------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` tokens; as LLaMA's, it puts `<s>` before a text, and splits digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise PairError(
            f"the base text is too small for a vocabulary of {vocab_size} tokens (it gives "
            f"{tokenizer.get_vocab_size()}); give more text or a smaller --vocab-size"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Iterator[list[int]]:
    # In groups, because an Encoding takes far more memory than its ids.
    for start in range(0, len(documents), 256):
        group = list(documents[start : start + 256])
        for encoding in tokenizer.backend_tokenizer.encode_batch(group, add_special_tokens=False):
            yield encoding.ids


def training_blocks(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], length: int, at_least: int
) -> torch.Tensor:
    """Return int32 [blocks, length]: `<s> document </s>` one after another, cut into blocks; the rest is dropped.

    Raises:
        PairError: if there are fewer than `at_least` blocks.
    """
    ids: list[int] = []
    for document in _encode(tokenizer, documents):
        ids += [tokenizer.bos_token_id, *document, tokenizer.eos_token_id]
    count = len(ids) // length
    if count < at_least:
        raise PairError(
            f"a training text holds {len(ids)} tokens, less than one step of {at_least} sequences of {length}; "
            "give more text"
        )
    return torch.tensor(ids[: count * length], dtype=torch.int32).reshape(count, length)


def answer_blocks(
    tokenizer: PreTrainedTokenizerFast, records: Sequence[Record], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks and their labels, each int32 [blocks, length]: `<s> prompt answer </s>` one after another.

    Labels are the tokens of answers, and -100 elsewhere. As in `training_blocks`, the rest is dropped.
    """
    prompts, answers = ([getattr(record, name) for record in records] for name in ("prompt", "answer"))
    rows = []
    for prompt, answer in zip(_encode(tokenizer, prompts), _encode(tokenizer, answers), strict=True):
        ids = [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id]
        rows.append(Tokens(torch.tensor(ids, dtype=torch.int32), 1 + len(prompt)))
    blocks = [torch.cat([getattr(row, name) for row in rows]).int() for name in ("ids", "targets")]
    count = len(blocks[0]) // length
    if not count:
        raise PairError(f"the records hold {len(blocks[0])} tokens, less than a sequence of {length}; take more")
    ids, labels = (block[: count * length].reshape(count, length) for block in blocks)
    return ids, labels


def evaluation_blocks(tokenizer: PreTrainedTokenizerFast, text: str, length: int, max_tokens: int) -> torch.Tensor:
    """Return int32 [blocks, length]: in each block `<s>` and `length - 1` tokens of `text`.

    At most about `max_tokens` tokens, in blocks taken evenly from the whole text. The numbers can be reproduced from
    the text file alone.
    """
    ids = next(_encode(tokenizer, [text]))
    count = len(ids) // (length - 1)
    if not count:
        raise PairError(f"the held-out text holds {len(ids)} tokens, less than a sequence of {length}; give more text")
    blocks = torch.tensor(ids[: count * (length - 1)], dtype=torch.int32).reshape(count, length - 1)
    limit = max(1, max_tokens // length)
    if count > limit:
        blocks = blocks[torch.arange(limit) * count // limit]
    return torch.cat([torch.full((len(blocks), 1), tokenizer.bos_token_id, dtype=torch.int32), blocks], dim=1)
