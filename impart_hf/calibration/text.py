"""Token sequences of one length, drawn from text: from a file, a folder, a list or a data set on the Hub."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from huggingface_hub import metadata_load
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..modeling.checkpoints import text_config
from ..modeling.model_files import HubOptions
from ..modeling.tensors import Model
from .records import text_of

_FILE_TYPES = (".txt", ".jsonl", ".json", ".parquet")
# The names that `datasets` has for the readers of files in a folder.
_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class TextField:
    """Records of which only one field is read.

    Attributes:
        source: any other source of text; a .txt file and strings have no fields and are read whole.
        field: name of the field; it holds a string or a chat.
    """

    source: str | os.PathLike | Sequence[str | Mapping[str, Any]]
    field: str


CalibrationSource = str | os.PathLike | Sequence[str | Mapping[str, Any]] | TextField

# The name of the text that comes with this package: prose, source code, mathematics, chats and several languages.
BUILT_IN = "built-in"
AUTOMATIC = "auto"
_BUILT_IN_LENGTH = 128  # the longest of its sequences, so that there are several

# The sequences are drawn from the first _POOL * samples of a source; no more of it is read.
_POOL = 4
PIECE_CHARACTERS = 1 << 20
# owner/name, optionally followed by :configuration and @split.
_DATASET_NAME = re.compile(r"(?P<name>[^:@./~\\][^:@]*)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")


def calibration_tokens(
    source: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
) -> torch.Tensor:
    """Draw token sequences from a source.

    Texts are joined with the tokenizer's end-of-text token between them and cut into sequences, each with the
    tokenizer's begin-of-text token in front, if the tokenizer has these tokens. Special tokens that a text contains,
    as chat templates write them, are recognised and not doubled. The sequences are drawn at random from the first
    `4 * samples` of the source; nothing after those is read.

    Args:
        source: one of
            - a .txt file in UTF-8, which is one long text;
            - a .jsonl or .json file of records: a record a line, or one array; or a .parquet file;
            - records, in a list or another sequence;
            - a folder of data files that `datasets.load_dataset` reads;
            - `BUILT_IN`, a short text of many kinds, cut into sequences of at most 128 tokens;
            - the name of a data set on the Hub as `owner/name`, `owner/name:configuration` or
              `owner/name:configuration@split`, such as `allenai/c4:en@validation`; the split is "train" if not given,
              and its rows are the records.

            - a `TextField`: one of these, and the name of the only field of its records that is read.

            A record is one text; blank ones are skipped. It is a string, or an object from which the first of these
            is taken:
            - a chat under "messages", "conversations", "conversation" or "data": objects with "role" and "content" or
              with "from" and "value", or strings of user and assistant in turn (under "data" only an even number
              beside an "id", as in UltraChat), and the reply under "chosen" if a chat does not end with one;
            - a string under "text", otherwise under "content";
            - strings under "prompt" and "completion", joined with nothing between them;
            - a request and its reply: "prompt", "instruction", "question" or "query" with "response" or "chosen",
              "instruction" with "output", "question" with "answer", "input" with "output"; "input" or "context" is
              added to a request, and "history" put before it. Request and reply can be chats. Of replies in a list of
              strings the first is taken;
            - text or a chat under "chosen";
            - the only field, if it is a string and its name no identifier's, such as "id" or "url", or it has several
              words.
            A "system" or "system_prompt" is put before a chat that has none. Chats and replies are rendered with the
            tokenizer's chat template, which is also given the list under "tools"; without one, what was said is joined
            by newlines. Bad examples, with "label" or "kto_tag" false beside a chat or completion, are skipped.
        tokenizer: the model's tokenizer.
        samples: the number of sequences to draw; a short source gives fewer.
        length: tokens per sequence.
        seed: seed of the draw; the same seed, source and tokenizer give the same sequences.

    Returns:
        int64, (sequences, length): `samples` sequences, or all of a short source, in the source's order.

    Raises:
        FileNotFoundError: if there is no such file, folder or data set.
        ValueError: if the source is of another kind, holds no text or not enough for one sequence, if a record has
            none of these forms, or if the tokenizer's chat template does not accept its messages or leaves one out.
        ModuleNotFoundError: if the source needs the library `datasets`, which is not installed.
    """
    if samples < 1 or length < 2:
        raise ValueError(f"a text needs at least one sequence of two tokens, got {samples} of {length}: ask for more")
    if source == BUILT_IN:
        source, length = [_built_in()], min(length, _BUILT_IN_LENGTH)
    sequences = list(itertools.islice(_sequences(source, tokenizer, length), _POOL * samples))
    if len(sequences[-1]) < length:
        rest = sequences.pop()
        if not sequences:
            raise ValueError(
                f"the text has {len(rest)} tokens, too few for one sequence of {length}: give more text, or ask for "
                f"sequences of at most {len(rest)} tokens"
            )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(sequences), generator=generator)[:samples].sort().values
    return torch.stack([sequences[index] for index in drawn.tolist()])


def _built_in() -> str:
    return Path(__file__).with_name("built_in.txt").read_text("utf-8")


def text_name(source: CalibrationSource) -> str:
    """Return a text's public name: a file's name without its folder, a data set's name, or the number of texts."""
    if isinstance(source, TextField):
        source = source.source
    if not isinstance(source, str | os.PathLike):
        return f"{len(source)} texts"
    return Path(os.path.abspath(source)).name if os.path.exists(source) else os.fspath(source)


def load_tokenizer(source: str, options: HubOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder or Hub repository.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=options.revision, token=options.token, cache_dir=options.cache_dir,
            trust_remote_code=False,  # otherwise a tokenizer with code of its own has transformers ask on the terminal
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of '{source}' cannot be read: {reason}") from error


def model_tokens(model: Model, source: CalibrationSource, samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw sequences as `calibration_tokens` does, with the model's tokenizer and at most its positions in length."""
    tokenizer, length = load_tokenizer(model.source, model.options), within_positions(length, model.config)
    return calibration_tokens(source, tokenizer, samples=samples, length=length, seed=seed)


def within_positions(length: int, config: Mapping[str, Any]) -> int:
    """Return `length`, or the number of positions of a model with this config.json if that is smaller."""
    positions = getattr(text_config(config), "max_position_embeddings", None) or length
    return min(length, positions) if positions > 0 else length  # XLNet's config has -1: no limit


def check_vocabulary(tokens: torch.Tensor, vocabulary: int, model: str) -> None:
    """Check that a model has every token of a text.

    Args:
        tokens: int64, of any shape.
        vocabulary: number of tokens in the model's vocabulary.
        model: its name, for the error.

    Raises:
        ValueError: if a token is outside the vocabulary: the tokenizer belongs to another model.
    """
    if int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"the text's token {int(tokens.max())} is not in the model's vocabulary of {vocabulary}: the tokenizer of "
            f"'{model}' belongs to another model, replace it"
        )


def _sequences(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[torch.Tensor]:
    """Yield the source's tokens, int64, in sequences of one length; the last is shorter, or only its start token."""
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
            # JSON can hold halves of surrogate pairs, which no tokenizer accepts.
            piece = piece.encode("utf-8", "replace").decode("utf-8")
            # `verbose=False` suppresses the warning about texts longer than the model's context: they are cut later.
            yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            # Many chat templates put a newline after the end-of-text token.
            ended = tokenizer.eos_token is not None and piece.rstrip().endswith(tokenizer.eos_token)


def _texts(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[Iterable[str]]:
    """Yield the texts that are not blank, each as successive pieces, so that a long one is never in memory whole."""
    any_text = False
    for pieces in _all_texts(source, tokenizer):
        first = next((piece for piece in pieces if piece.strip()), None)
        if first is not None:
            any_text = True
            yield itertools.chain([first], pieces)
    if not any_text:
        source = source.source if isinstance(source, TextField) else source
        named = f"'{os.fspath(source)}'" if isinstance(source, str | os.PathLike) else "the list"
        raise ValueError(f"text: {named} holds no text: give one that is not blank")


def _all_texts(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[Iterator[str]]:
    source, field = (source.source, source.field) if isinstance(source, TextField) else (source, None)
    if isinstance(source, str | os.PathLike) and Path(source).is_file() and Path(source).suffix.lower() == ".txt":
        yield _pieces(Path(source))
        return
    for record, where in _records(source):
        yield iter([text_of(record, where, tokenizer, field)])


def _records(source: CalibrationSource) -> Iterator[tuple[Any, str]]:
    """Yield the records of any source except a .txt file, each with its location for errors."""
    if not isinstance(source, str | os.PathLike):
        yield from _listed(source)
        return
    path = Path(source)
    kind = path.suffix.lower()
    if path.is_file():
        if kind not in _FILE_TYPES:
            raise ValueError(f"text: '{path}' has an unknown file type: convert it to one of {', '.join(_FILE_TYPES)}")
        yield from _dataset("parquet", str(path), files=[str(path)]) if kind == ".parquet" else _file_records(path)
    elif path.is_dir():
        yield from _folder_records(str(path))
    else:
        name = _DATASET_NAME.fullmatch(source) if isinstance(source, str) and kind not in _FILE_TYPES else None
        if name is None:
            raise FileNotFoundError(f"text: '{path}' does not exist: check the path")
        yield from _dataset(name["name"], name["name"], name["config"], name["split"] or "train")


def _listed(source: object) -> Iterator[tuple[Any, str]]:
    if not isinstance(source, Sequence) or isinstance(source, bytes | bytearray):
        raise ValueError(f"text must be a path, a data set's name or a list of strings or records, got {source!r:.80}")
    for number, record in enumerate(source):
        yield record, f"entry {number} of the list"


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"text: '{path}' is not UTF-8, convert it: {error}") from error


def _pieces(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        # Each piece ends at a line's end, so that no word is split.
        while piece := file.read(PIECE_CHARACTERS) + file.readline():
            yield piece


def _file_records(path: Path) -> Iterator[tuple[Any, str]]:
    with _opened(path) as file:
        is_array = file.read(1024).lstrip().startswith("[")
        file.seek(0)
        is_one = is_array or (path.suffix.lower() == ".json" and _is_one_object(file))
        lines: Iterable[tuple[int, str]] = [(1, file.read())] if is_one else enumerate(file, 1)
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


def _is_one_object(file: TextIO) -> bool:
    """Say whether a file's JSON is one object over several lines, not an object a line."""
    line = next((line for line in file if line.strip()), "")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        file.seek(0)
        try:
            return isinstance(json.load(file), dict)
        except (ValueError, RecursionError):
            return False
    finally:
        file.seek(0)
    return False


def _folder_records(folder: str) -> Iterator[tuple[Any, str]]:
    """Yield the records of a folder's files, of every type; `load_dataset` would read only the most frequent one."""
    kinds: dict[str, list[str]] = {}
    for file in _training_files(folder):
        if kind := _LOADERS.get(Path(file).suffix.lower()):
            kinds.setdefault(kind, []).append(file)
    if len(kinds) < 2:
        yield from _dataset(folder, folder)
    for kind, files in kinds.items() if len(kinds) > 1 else ():
        yield from _dataset(kind, folder, files=files)


def _training_files(folder: str) -> list[str]:
    """Return the files of which `load_dataset` makes a folder's training split, if their names decide."""
    try:
        from datasets.data_files import DataFilesDict, get_data_patterns
    except ModuleNotFoundError:
        return []  # `_dataset` says that the library is needed
    readme = Path(folder, "README.md")
    if readme.is_file() and "configs" in (metadata_load(readme) or {}):  # it says which files belong to the data set
        return []
    try:
        base = Path(folder).resolve().as_posix()
        return list(DataFilesDict.from_patterns(get_data_patterns(base), base_path=base).get("train", ()))
    except FileNotFoundError:
        return []


def _dataset(
    name: str, source: str, config: str | None = None, split: str = "train", files: Sequence[str] | None = None
) -> Iterator[tuple[Any, str]]:
    """Yield the records of a data set on the Hub, a folder or files.

    Args:
        name: a data set, folder, or the library's name of the files' type.
        source: what the user gave, for messages.
        config, split: of the data set.
        files: files of one type.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"text: reading '{source}' needs the library datasets: pip install 'impart-hf[calibration]'"
        ) from error
    try:
        options: dict[str, Any] = {} if files is None else {"data_files": files}
        records = load_dataset(name, config, split=split, streaming=True, **options)
    except (FileNotFoundError, ConnectionError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        if os.path.isdir(source):
            kinds = ", ".join(_FILE_TYPES)
            raise FileNotFoundError(
                f"text: the folder '{source}' has no file that datasets can read, such as {kinds}"
            ) from error
        raise FileNotFoundError(
            f"text: '{source}' is neither a file, nor a folder of data files, nor a data set that can be "
            f"read on the Hub: {error}"
        ) from error
    except ValueError as error:  # no such split or configuration; the library's message has those that there are
        remedy = "give one of its files" if os.path.exists(source) else "ask for owner/name:configuration@split"
        raise ValueError(f"text: '{source}' cannot be read: {' '.join(f'{error}'.split())}; {remedy}") from error
    for number, record in enumerate(records):
        yield record, f"record {number} of '{source}'"
