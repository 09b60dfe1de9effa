"""Data sets of lm-eval's tasks from a local folder, for machines that cannot reach the Hub.

The data set that a task names is in FOLDER/DATASET/, and if the task names one of its configurations, in
FOLDER/DATASET/NAME/: `openai/gsm8k` with configuration `main` is FOLDER/openai/gsm8k/main/. There are files for
each split that the task reads (train.jsonl, test-00000-of-00001.parquet, validation.csv, ...), or what `save_to_disk`
wrote. FOLDER/DATASET/ may also be the data set's repository, as it was downloaded from the Hub; its README.md then says
where configurations and splits are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..common.names import is_hub_id

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # as `datasets` names them


@contextmanager
def local_data(folder: str | Path) -> Iterator[None]:
    """Within this context, tasks that are loaded take their data sets from a folder.

    Data sets that a task's YAML file gives by files of its own, or that it makes, are left as they are.

    Raises:
        ValueError: if the folder does not exist; and, when a task is loaded, if its data set or a split is not in it.
    """
    from lm_eval.api.task import ConfigurableTask

    if not Path(folder).is_dir():
        raise ValueError(f"data_dir '{folder}' is not a folder")
    on_hub = ConfigurableTask.download

    # A task loads its data when it is made, by this method, which lm-eval has classes override for data from elsewhere.
    def download(task: Any, dataset_kwargs: Any = None, **options: Any) -> None:
        if is_on_hub(task, folder):
            task.dataset = _read(task, Path(folder))
        else:
            on_hub(task, dataset_kwargs, **options)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = on_hub


def is_on_hub(task: Any, data_dir: str | Path | None = None) -> bool:
    """Return whether a task of lm-eval names a data set on the Hub, and not files or code that makes it.

    Args:
        task: the task.
        data_dir: the folder from which data sets of the Hub are read; None if they are not.
    """
    path = task.DATASET_PATH
    if path is None or task.config.custom_dataset:
        return False
    if Path(path).exists():  # also a data set in `data_dir`, if that is the working directory
        if data_dir is None or "data_files" in (task.config.dataset_kwargs or {}):
            return False
        return is_hub_id(path) and Path(data_dir, path).is_dir()
    return "/" in path or find_spec(f"datasets.packaged_modules.{path}") is None  # such as json


def _read(task: Any, root: Path) -> Any:
    """Return a task's data set, a `datasets.DatasetDict` with the splits that the task reads."""
    import datasets

    repository, name, splits = root / task.DATASET_PATH, task.DATASET_NAME, _splits(task.config)
    folder = repository / name if name else repository
    if (folder / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(str(folder))
    elif files := {split: found for split in splits if (found := _files(folder, split))}:
        found = _read_files(folder, files)
    elif (repository / "README.md").is_file():
        found = datasets.load_dataset(str(repository), name)
    else:
        state = "has none of these files" if folder.is_dir() else "does not exist"
        wanted = ", ".join(f"{split}.jsonl" for split in splits)
        raise ValueError(f"its data set is to be in the folder '{folder}' ({wanted}), which {state}")
    if missing := [split for split in splits if split not in found]:
        raise ValueError(
            f"'{folder}' has no split '{missing[0]}', such as {missing[0]}.jsonl: it has {', '.join(found)}"
        )
    return found


def _files(folder: Path, split: str) -> list[Path]:
    """Return a split's files: train.jsonl, train-00000-of-00002.parquet and so on."""
    found = [path for pattern in (f"{split}.*", f"{split}-*") for path in folder.glob(pattern)]
    return sorted(path for path in found if path.suffix in _FORMATS)


def _read_files(folder: Path, files: dict[str, list[Path]]) -> Any:
    import datasets

    formats = {path.suffix for found in files.values() for path in found}
    if len(formats) > 1:
        raise ValueError(f"'{folder}' has files of several formats ({', '.join(sorted(formats))}): keep one")
    named = {split: [str(path) for path in found] for split, found in files.items()}
    return datasets.load_dataset(_FORMATS[formats.pop()], data_files=named)


def _splits(config: Any) -> list[str]:
    """Return the splits that a task reads: that of the questions, and that of the examples before them."""
    questions = config.test_split or config.validation_split
    # In lm-eval's order, which reads them also if no example is asked for.
    examples = (
        (config.fewshot_config.split if config.fewshot_config else None)
        or config.training_split
        or config.validation_split
    )
    return [split for split in dict.fromkeys((questions, examples)) if split]
