"""Data sets of lm-eval's tasks from a local folder, for machines that cannot reach the Hub.

The data set that a task names DATASET, and its configuration NAME if it names one, is the first of

    FOLDER/DATASET/NAME/
    FOLDER/DATASET/

that exists: `openai/gsm8k` with configuration `main` is FOLDER/openai/gsm8k/main/. It holds what `datasets` reads from
a folder: a file per split (train.jsonl, test-00000-of-00001.parquet, validation.csv, ...), what `save_to_disk` wrote,
or a data set's repository as it was downloaded from the Hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


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
        if is_on_hub(task):
            task.dataset = _read(task, Path(folder))
        else:
            on_hub(task, dataset_kwargs, **options)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = on_hub


def is_on_hub(task: Any) -> bool:
    """Return whether a task of lm-eval names a data set on the Hub, and not files or code that makes it."""
    path = task.DATASET_PATH
    if path is None or task.config.custom_dataset or Path(path).exists():
        return False
    return "/" in path or find_spec(f"datasets.packaged_modules.{path}") is None  # such as json


def _read(task: Any, root: Path) -> Any:
    """Return a task's data set, a `datasets.DatasetDict`."""
    import datasets

    wanted, name = root / task.DATASET_PATH, task.DATASET_NAME
    folder = wanted / name if name and (wanted / name).is_dir() else wanted
    if not folder.is_dir():
        places = f"'{wanted / name}' or '{wanted}'" if name else f"'{wanted}'"
        raise ValueError(f"its data set is to be in the folder {places}, which does not exist")
    if (folder / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(str(folder))
    else:
        # A configuration's name is known to a repository of several; a folder of files has none.
        named = {"name": name} if folder == wanted and name and (folder / "README.md").is_file() else {}
        found = datasets.load_dataset(str(folder), **named)
    for split in _splits(task.config):
        if split not in found:
            raise ValueError(f"'{folder}' has no split '{split}', such as {split}.jsonl: it has {', '.join(found)}")
    return found


def _splits(config: Any) -> list[str]:
    """Return the splits that a task reads: that of the questions, and that of the examples before them."""
    questions = config.test_split or config.validation_split
    examples = (config.fewshot_config.split if config.fewshot_config else None) or config.training_split
    return [split for split in dict.fromkeys((questions, examples)) if split]
