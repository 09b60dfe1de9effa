"""Tasks of lm-eval that execute code, on a few problems of the tests' own; and a model whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM

from impart_hf.evaluation.sandbox import Isolation, Sandbox, SandboxError

TASKS = Path(str(lm_eval.__file__)).parent / "tasks"
# In the format of openai/openai_humaneval.
HUMANEVAL = [
    {
        "task_id": f"test/{i}",
        "prompt": f'from typing import List\n\n\ndef power{i}(values: List[int]) -> List[int]:\n    """Powers."""\n',
        "canonical_solution": f"    return [value ** {i} for value in values]\n",
        "test": f"def check(candidate):\n    assert candidate([1, 2, 3]) == [1, {2**i}, {3**i}]\n",
        "entry_point": f"power{i}",
    }
    for i in range(4)
]
# In the format of google-research-datasets/mbpp.
MBPP = [
    {
        "task_id": i,
        "text": f"Write a function to add {i} to a number.",
        "code": f"def add{i}(x):\n    return x + {i}",
        "test_list": [f"assert add{i}({x}) == {x + i}" for x in range(3)],
    }
    for i in range(4)
]


def usable_isolation() -> Isolation:
    """How programs can run here: some containers have no namespaces to give."""
    try:
        Sandbox("isolated")
    except SandboxError:
        return "unisolated"
    return "isolated"


def write_code_task(folder: Path, task: str, records: Sequence[dict]) -> Path:
    """A task of lm-eval with other data.

    Args:
        folder: where the files go.
        task: its YAML file below lm-eval's own, such as "mbpp/mbpp.yaml".
        records: the data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    path = folder / f"{Path(task).stem}_here.yaml"
    path.write_text(
        f"""include: {TASKS / task}
task: {path.stem}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {folder / "records.jsonl"}
  cache_dir: {folder / "cache"}
""",
        "utf-8",
    )
    return path


class ScriptedModel(LM):
    """A model of lm-eval that gives known answers."""

    def __init__(self, answer: Callable[[str], str]):
        """Make a model.

        Args:
            answer: gives the answer to a prompt.
        """
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError
