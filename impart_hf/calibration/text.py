"""Calibration text: from a file, a folder, a list or a data set on the Hub to token sequences of one length."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..modeling.checkpoints import Checkpoint, HubOptions, text_config

CalibrationSource = str | os.PathLike | Sequence[str | Mapping[str, Any]]

_FILE_TYPES = (".txt", ".jsonl", ".json")
_TEXT_FIELDS = ("text", "content")
_ACCEPTED = (
    "a record is a string, or has a string under 'text' or 'content', a list of messages under 'messages', strings "
    "under 'prompt' and 'completion', or just one field that is a string"
)
_REMEDY = "write what the model is to read into a field 'text'"
# Sequences are drawn from this many times as many as are asked for: no source is read further than that.
_POOL = 4
PIECE_CHARACTERS = 1 << 20
# owner/name, then perhaps :configuration and @split.
_DATASET_NAME = re.compile(r"(?P<name>[^:@./~\\][^:@]*)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")


def calibration_tokens(
    source: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
) -> torch.Tensor:
    """Token sequences drawn from a source.

    Texts are joined with the tokenizer's end-of-text token between them and cut into sequences, each with the
    tokenizer's begin-of-text token in front, where it has these. Special tokens that a text itself writes, as chat
    templates do, are taken as such, and not doubled by those. The sequences are drawn, by the seed, from the first
    `4 * samples` of them; nothing beyond those is read.

    Args:
        source: one of
            - a .txt file in UTF-8, which is one long text;
            - a .jsonl or .json file of records: a record a line, or one array;
            - records, in a list or another sequence;
            - a folder of data files that `datasets.load_dataset` reads;
            - the name of a data set on the Hub as `owner/name`, `owner/name:configuration` or
              `owner/name:configuration@split`, such as `allenai/c4:en@validation`; the split is "train" if not given,
              and its rows are the records.

            A record is one text, and a blank one is passed over. It is a string, or an object with the first of these
            that it has:
            - a string under "text", else "content";
            - under "messages", a list of objects with "role" and "content": the text is what the tokenizer's chat
              template makes of them;
            - strings under "prompt" and "completion": the one and the other, with nothing between them;
            - just one field that is a string.
        tokenizer: the model's.
        samples: how many sequences to draw; there may be fewer.
        length: of each sequence, in tokens.
        seed: of the draw; the same seed, source and tokenizer give the same sequences.

    Returns:
        int64, (sequences, length): `samples` sequences, or all there are, in the source's order.

    Raises:
        FileNotFoundError: if there is no such file, folder or data set.
        ValueError: if the source is of none of these kinds, holds no text, not enough for one sequence or a record
            that is none of these, or if the tokenizer has no chat template that takes its messages.
        ModuleNotFoundError: if it needs the library `datasets`, which is not installed.
    """
    if samples < 1 or length < 2:
        raise ValueError(f"a text needs at least one sequence of two tokens, not {samples} of {length}")
    sequences = list(itertools.islice(_sequences(source, tokenizer, length), _POOL * samples))
    if len(sequences[-1]) < length:
        rest = sequences.pop()
        if not sequences:
            raise ValueError(
                f"the text has {len(rest)} tokens, too few for one sequence of {length}: give more text, or ask for "
                f"sequences of {len(rest)} tokens or less"
            )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(sequences), generator=generator)[:samples].sort().values
    return torch.stack([sequences[index] for index in drawn.tolist()])


def load_tokenizer(source: str, options: HubOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or Hub repository.

    Raises:
        ValueError: if it has none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=options.revision, token=options.token, cache_dir=options.cache_dir
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of '{source}' cannot be read: {reason}") from error


def model_tokens(
    model: Checkpoint, source: CalibrationSource, samples: int, length: int, seed: int = 0
) -> torch.Tensor:
    """`calibration_tokens` with a model's own tokenizer, no longer than it has positions."""
    tokenizer, length = load_tokenizer(model.source, model.options), within_positions(length, model.config)
    return calibration_tokens(source, tokenizer, samples=samples, length=length, seed=seed)


def within_positions(length: int, config: Mapping[str, Any]) -> int:
    """A sequence's length, no longer than a model with this config.json has positions."""
    return min(length, getattr(text_config(config), "max_position_embeddings", None) or length)


def check_vocabulary(tokens: torch.Tensor, vocabulary: int, model: str) -> None:
    """See that a model has every token of a text.

    Args:
        tokens: int64, of any shape.
        vocabulary: how many tokens the model knows.
        model: its name, for the error.

    Raises:
        ValueError: if not: its tokenizer is another model's.
    """
    if int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"the text's token {int(tokens.max())} is not in the model's vocabulary of {vocabulary}: the tokenizer of "
            f"'{model}' is not its own"
        )


def _sequences(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[torch.Tensor]:
    """The source's tokens, int64, in sequences of one length; the last is shorter, or has nothing but its start."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream = _token_stream(source, tokenizer)
    while True:
        first = list(itertools.islice(stream, 1))
        # A chat template may have written the begin-of-text token that a sequence starts with.
        sequence = start if first == start else start + first
        sequence = sequence + list(itertools.islice(stream, length - len(sequence)))
        yield torch.tensor(sequence, dtype=torch.int64)
        if len(sequence) < length:
            return


def _token_stream(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    ended = True
    for pieces in _texts(source, tokenizer):
        if not ended and tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id
        for piece in pieces:
            # `verbose=False`: no warning that a text is longer than the model's context, it is cut later.
            # JSON can hold halves of surrogate pairs, which no tokenizer takes.
            piece = piece.encode("utf-8", "replace").decode("utf-8")
            yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            # Many chat templates put a line's end behind the end-of-text token.
            ended = tokenizer.eos_token is not None and piece.rstrip().endswith(tokenizer.eos_token)


def _texts(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[Iterable[str]]:
    """The texts that are not blank, each as pieces to be put together, so that a long one need not be read whole."""
    found = False
    for pieces in _all_texts(source, tokenizer):
        first = next((piece for piece in pieces if piece.strip()), None)
        if first is not None:
            found = True
            yield itertools.chain([first], pieces)
    if not found:
        named = f"'{os.fspath(source)}'" if isinstance(source, str | os.PathLike) else "the list"
        raise ValueError(f"text: {named} holds no text")


def _all_texts(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[Iterator[str]]:
    if isinstance(source, str | os.PathLike) and Path(source).is_file() and Path(source).suffix.lower() == ".txt":
        yield _pieces(Path(source))
        return
    for record, where in _records(source):
        yield iter([_text_of(record, where, tokenizer)])


def _records(source: CalibrationSource) -> Iterator[tuple[Any, str]]:
    """The records of every source that has such, with the place of each for errors."""
    if not isinstance(source, str | os.PathLike):
        yield from _listed(source)
        return
    path = Path(source)
    kind = path.suffix.lower()
    if path.is_file():
        if kind not in _FILE_TYPES:
            raise ValueError(f"text: '{path}' is none of the types {', '.join(_FILE_TYPES)}")
        yield from _file_records(path)
    elif path.is_dir():
        yield from _dataset(str(path), None, "train")
    else:
        name = _DATASET_NAME.fullmatch(source) if isinstance(source, str) and kind not in _FILE_TYPES else None
        if name is None:
            raise FileNotFoundError(f"text: '{path}' does not exist")
        yield from _dataset(name["name"], name["config"], name["split"] or "train")


def _listed(source: object) -> Iterator[tuple[Any, str]]:
    if not isinstance(source, Sequence) or isinstance(source, bytes | bytearray):
        raise ValueError(f"text must be a path, a data set's name or a list of strings or records, not {source!r:.80}")
    for number, record in enumerate(source):
        yield record, f"entry {number} of the list"


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"text: '{path}' is not UTF-8: {error}") from error


def _pieces(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        # Up to a line's end, so that no word is torn.
        while piece := file.read(PIECE_CHARACTERS) + file.readline():
            yield piece


def _file_records(path: Path) -> Iterator[tuple[Any, str]]:
    with _opened(path) as file:
        is_array = file.read(1024).lstrip().startswith("[")
        file.seek(0)
        lines: Iterable[tuple[int, str]] = [(1, file.read())] if is_array else enumerate(file, 1)
        for number, line in lines:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"text: line {number} of '{path}' is not valid JSON: {error}") from error
            for index, record in enumerate(value if is_array else [value]):
                where = f"record {index}" if is_array else f"line {number}"
                yield record, f"{where} of '{path}'"


def _text_of(record: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one record."""
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise ValueError(f"text: {where} is {record!r:.80}, not a string or an object; {_ACCEPTED}")
    for field in _TEXT_FIELDS:
        if isinstance(record.get(field), str):
            return record[field]
    # Data sets fill fields that a row has not with None.
    if record.get("messages") is not None:
        return _chat(record["messages"], where, tokenizer)
    if {"prompt", "completion"} <= record.keys() and (record["prompt"], record["completion"]) != (None, None):
        if not isinstance(record["prompt"], str) or not isinstance(record["completion"], str):
            raise ValueError(f"text: 'prompt' and 'completion' of {where} are not both strings; {_REMEDY}")
        return record["prompt"] + record["completion"]
    strings = [value for value in record.values() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    fields = f"has the fields {', '.join(map(str, record)):.200}" if record else "has no fields"
    raise ValueError(f"text: {where} {fields}; {_ACCEPTED}: {_REMEDY}")


def _chat(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer's chat template makes of messages."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"text: 'messages' of {where} is not a list of messages, but {messages!r:.80}")
    # Templates write nothing, or "None", for what is missing. What content a template takes is its own affair.
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"text: message {number} of {where} has no 'role' that is a string")
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise ValueError(f"text: message {number} of {where} has no 'content' that is a string or a list of parts")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception as error:  # a template is a program, with errors of every kind
        if getattr(tokenizer, "chat_template", None) is None:
            reason = "the tokenizer has no chat template"
        else:
            reason = "the tokenizer's chat template refuses them: " + " ".join(f"{error}".split())
        raise ValueError(f"text: {where} has 'messages', but {reason}; {_REMEDY}") from error


def _dataset(name: str, config: str | None, split: str) -> Iterator[tuple[Any, str]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"text: '{name}' is read with the library datasets: pip install 'impart-hf[calibration]'"
        ) from error
    try:
        records = load_dataset(name, config, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        if os.path.isdir(name):
            kinds = ", ".join(_FILE_TYPES)
            raise FileNotFoundError(
                f"text: there is no file in '{name}' that datasets reads, such as {kinds}"
            ) from error
        raise FileNotFoundError(
            f"text: '{name}' is neither a file, nor a folder of data files, nor a data set that can be "
            f"read on the Hub: {error}"
        ) from error
    for number, record in enumerate(records):
        yield record, f"record {number} of '{name}'"
