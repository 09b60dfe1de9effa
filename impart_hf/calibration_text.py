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

from .modeling.checkpoints import Checkpoint, HubOptions

CalibrationSource = str | os.PathLike | Sequence[str]

_FILE_TYPES = (".txt", ".jsonl", ".json")
_TEXT_FIELDS = ("text", "content")
# Sequences are drawn from this many times as many as are asked for: no source is read further than that.
_POOL = 4
_PIECE_CHARACTERS = 1 << 20
# owner/name, then perhaps :configuration and @split.
_DATASET_NAME = re.compile(r"(?P<name>[^:@./~\\][^:@]*)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")


def read_texts(source: CalibrationSource) -> list[str]:
    """All texts of a source, in order, without those that are blank.

    Args:
        source: one of
            - a .txt file in UTF-8, which is one long text;
            - a .jsonl or .json file of records: a record a line, or one array; a record is a string or an object with
              a field "text", else "content", else just one field that is a string;
            - texts, in a list or another sequence;
            - a folder of data files that `datasets.load_dataset` reads;
            - the name of a data set on the Hub as `owner/name`, `owner/name:configuration` or
              `owner/name:configuration@split`, such as `allenai/c4:en@validation`; the split is "train" if not given,
              and its columns are treated as the fields above.

    Raises:
        FileNotFoundError: if there is no such file, folder or data set.
        ValueError: if the source holds no text, something that is not text, or is of none of these kinds.
        ModuleNotFoundError: if it needs the library `datasets`, which is not installed.
    """
    return ["".join(pieces) for pieces in _texts(source)]


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
    tokenizer's begin-of-text token in front, where it has these. The sequences are drawn, by the seed, from the
    first `4 * samples` of them; nothing beyond those is read.

    Args:
        source: as for `read_texts`.
        tokenizer: the model's.
        samples: how many sequences to draw; there may be fewer.
        length: of each sequence, in tokens.
        seed: of the draw; the same seed, source and tokenizer give the same sequences.

    Returns:
        int64, (sequences, length): `samples` sequences, or all there are, in the source's order.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `read_texts`; ValueError also if the source has not
            enough text for one sequence.
    """
    if samples < 1 or length < 2:
        raise ValueError(f"a text needs at least one sequence of two tokens, not {samples} of {length}")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    text_length = length - len(start)
    stream = list(itertools.islice(_token_stream(source, tokenizer), _POOL * samples * text_length))
    available = len(stream) // text_length
    if available == 0:
        raise ValueError(
            f"the text has {len(stream)} tokens, too few for one sequence of {length}: give more text, or ask for "
            f"sequences of {len(stream) + len(start)} tokens or less"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(available, generator=generator)[:samples].sort().values
    sequences = torch.tensor(stream[: available * text_length]).view(available, text_length)[drawn]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(drawn), -1), sequences], dim=1)


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
    positions = model.config.get("max_position_embeddings") or length
    tokenizer = load_tokenizer(model.source, model.options)
    return calibration_tokens(source, tokenizer, samples=samples, length=min(length, positions), seed=seed)


def _token_stream(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for number, pieces in enumerate(_texts(source)):
        if number > 0 and tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id
        for piece in pieces:
            # `verbose=False`: no warning that a text is longer than the model's context, it is cut later.
            # JSON can hold halves of surrogate pairs, which no tokenizer takes.
            piece = piece.encode("utf-8", "replace").decode("utf-8")
            yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]


def _texts(source: CalibrationSource) -> Iterator[Iterable[str]]:
    """The texts that are not blank, each as pieces to be put together, so that a long one need not be read whole."""
    found = False
    for text in _all_texts(source):
        if isinstance(text, str):
            if text.strip():
                found = True
                yield [text]
        else:
            first = next((piece for piece in text if piece.strip()), None)
            if first is not None:
                found = True
                yield itertools.chain([first], text)
    if not found:
        named = f"'{os.fspath(source)}'" if isinstance(source, str | os.PathLike) else "the list"
        raise ValueError(f"text: {named} holds no text")


def _all_texts(source: CalibrationSource) -> Iterator[str | Iterator[str]]:
    if not isinstance(source, str | os.PathLike):
        yield from _listed(source)
        return
    path = Path(source)
    kind = path.suffix.lower()
    if path.is_file():
        if kind not in _FILE_TYPES:
            raise ValueError(f"text: '{path}' is none of the types {', '.join(_FILE_TYPES)}")
        if kind == ".txt":
            yield _pieces(path)
        else:
            yield from _records(path)
    elif path.is_dir():
        yield from _dataset(str(path), None, "train")
    else:
        name = _DATASET_NAME.fullmatch(source) if isinstance(source, str) and kind not in _FILE_TYPES else None
        if name is None:
            raise FileNotFoundError(f"text: '{path}' does not exist")
        yield from _dataset(name["name"], name["config"], name["split"] or "train")


def _listed(source: object) -> Iterator[str]:
    if not isinstance(source, Sequence) or isinstance(source, bytes | bytearray):
        raise ValueError(f"text must be a path, a data set's name or a list of strings, not {source!r:.80}")
    for number, text in enumerate(source):
        if not isinstance(text, str):
            raise ValueError(f"text: entry {number} of the list is {text!r:.80}, not a string")
        yield text


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
        while piece := file.read(_PIECE_CHARACTERS) + file.readline():
            yield piece


def _records(path: Path) -> Iterator[str]:
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
                yield _text_of(record, f"{where} of '{path}'")


def _text_of(record: Any, where: str) -> str:
    """The text of one record of a file or data set."""
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        for field in _TEXT_FIELDS:
            if isinstance(record.get(field), str):
                return record[field]
        strings = [value for value in record.values() if isinstance(value, str)]
        if len(strings) == 1:
            return strings[0]
    raise ValueError(
        f"text: {where} has neither a text under {' or '.join(map(repr, _TEXT_FIELDS))} nor just one field "
        "that is a string"
    )


def _dataset(name: str, config: str | None, split: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"text: '{name}' is read with the library datasets: pip install 'impart-hf[calibration]'"
        ) from error
    try:
        records = load_dataset(name, config, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"text: '{name}' is neither a file, nor a folder of data files, nor a data set that can be "
            f"read on the Hub: {error}"
        ) from error
    for number, record in enumerate(records):
        yield _text_of(record, f"record {number} of '{name}'")
