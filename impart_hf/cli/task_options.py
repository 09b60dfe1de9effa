"""Options of `impart-hf evaluate` about tasks of lm-eval."""

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import Parser, add_flag, add_limit, given, option_of, refuse

# Options that only tasks use, as `TaskSettings` and `compare_models` name them.
_SETTINGS = (
    "limit",
    "num_fewshot",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "gen_kwargs",
    "seed",
    "data_dir",
    "allow_code",
)
_OTHERS = ("backend", "model_args", "results")
_ALPACA, JUDGED = "alpaca_eval", ("judge", "judge_model", "judge_max_tokens", "instructions", "references")


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the tasks, and how they are run."""
    group = parser.add_argument_group("tasks", "Tasks are run by lm-eval, and its options have the same names here.")
    group.add_argument(
        "--task",
        metavar="TASK,…",
        action="append",
        help="measure the metrics of these lm-eval tasks, groups, tags, or YAML files of tasks; may be repeated",
    )
    add_limit(group)
    group.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's own number)"
    )
    add_flag(group, "--apply-chat-template", "ask each question as a chat, by the tokenizer's template")
    group.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="whether examples are turns of the chat, or stand in one turn with the question (default: turns)",
    )
    group.add_argument("--system-instruction", metavar="TEXT", help="text before everything, or the system's turn")
    group.add_argument(
        "--gen-kwargs",
        metavar="KEY=VALUE,…",
        type=key_values,
        help="arguments of generation instead of the task's own, such as max_gen_toks=512,do_sample=true,temperature=1",
    )
    group.add_argument("--seed", type=int, help="of the choice of examples, and of sampling (default: 1234, lm-eval's)")
    add_running(group)
    group.add_argument(
        "--model-args",
        metavar="KEY=VALUE,…",
        type=key_values,
        help="further arguments of from_pretrained (hf), or of the engine (vllm), such as max_model_len=4096",
    )
    add_flag(group, "--update-card", "put the scores into each model's README.md, for the Hub to show them")
    group.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="keep a JSON file for each finished model and task; the same command does not run these again",
    )
    add_alpaca(parser)


def add_running(group: Parser) -> None:
    """Add where tasks' data are, and what runs the models and what they write."""
    group.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="take data sets from FOLDER/DATASET/NAME/, not from the Hub"
    )
    group.add_argument(
        "--allow-code",
        choices=("isolated", "unisolated"),
        help="run tasks that execute what the model writes: isolated, or able to read and write your files",
    )
    group.add_argument(
        "--backend",
        choices=("hf", "runtime", "vllm"),
        help="run the models by transformers, as deltas beside one base in memory, or by vLLM (default: hf)",
    )


def warn_of_code(options: argparse.Namespace) -> None:
    """Say what programs can do that are not isolated, if that is allowed."""
    if options.allow_code == "unisolated":
        print(
            "programs that the models write are not isolated: they have no network and start no others, but can read "
            "and write your files",
            file=sys.stderr,
        )


def add_alpaca(parser: argparse.ArgumentParser) -> None:
    """Add the judge of the task alpaca_eval, and what it judges."""
    group = parser.add_argument_group(
        "task alpaca_eval",
        "A judge compares the models' answers with a reference's. Its key is read from JUDGE_API_KEY.",
    )
    group.add_argument(
        "--judge",
        metavar="URL",
        help="where the judge's OpenAI-compatible interface is, such as http://localhost:8000/v1",
    )
    group.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
    group.add_argument(
        "--judge-max-tokens",
        type=int,
        metavar="N",
        help="the most tokens of a verdict (default: 16); more for a judge that thinks before it answers",
    )
    group.add_argument(
        "--instructions",
        type=Path,
        metavar="FILE",
        help='JSON or JSONL records with "instruction" and, as "output", the reference\'s answer',
    )
    group.add_argument(
        "--references", type=Path, metavar="FILE", help="take the reference's answers from this file of the same format"
    )


def check_tasks(options: argparse.Namespace) -> None:
    """Refuse options that have no effect."""
    if not options.task:
        refuse(options, [*_SETTINGS, *_OTHERS, "update_card"], "needs a task; add --task TASK")
    elif not task_names(options):
        raise ValueError("--task names no task: give at least one")
    if _ALPACA not in task_names(options):
        refuse(options, JUDGED, f"needs the task {_ALPACA}; add --task {_ALPACA}")
    else:
        check_alpaca(options)
    if not options.apply_chat_template:
        refuse(options, ["fewshot_as_multiturn"], "has no effect without a chat; add --apply-chat-template")


def check_alpaca(options: argparse.Namespace) -> None:
    """Check that all is given that the task alpaca_eval needs.

    Raises:
        ValueError: naming what is not.
    """
    if missing := [name for name in ("judge", "judge_model", "instructions") if getattr(options, name) is None]:
        raise ValueError(f"task {_ALPACA} needs {', '.join(map(option_of, missing))}")


def task_names(options: argparse.Namespace) -> list[str]:
    """Return the tasks that are asked for."""
    return [name.strip() for text in options.task or [] for name in text.split(",") if name.strip()]


def given_tasks(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_tasks` that are given, as arguments for `compare_models`."""
    if not options.task:
        return {}
    from ..evaluation.tasks import TaskSettings

    settings = TaskSettings(**given(options, *_SETTINGS, "batch_size"), alpaca=given_alpaca(options))
    return {"tasks": task_names(options), "task_settings": settings, **given(options, *_OTHERS)}


def given_alpaca(options: argparse.Namespace) -> Any:
    """Return the options of `add_alpaca` as `AlpacaSettings`; None without a judge."""
    if options.judge is None:
        return None
    from ..evaluation.alpaca import AlpacaSettings
    from ..evaluation.judge import JudgeSettings

    more = {} if options.judge_max_tokens is None else {"max_tokens": options.judge_max_tokens}
    judge = JudgeSettings(options.judge, options.judge_model, **more)
    return AlpacaSettings(judge=judge, **given(options, "instructions", "references"))


def key_values(text: str) -> dict[str, Any]:
    """Parse "key=value,key=value", for argparse, as lm-eval has it.

    Values are numbers, booleans, None, Python's literals ("\\n\\n" in quotes, lists, dictionaries), or text.
    """
    found, parts = {}, text.split(",")
    while parts:
        key, equals, value = parts.pop(0).partition("=")
        if not equals or not key.strip():
            raise argparse.ArgumentTypeError(f"'{key}' is not KEY=VALUE")
        found[key.strip()], used = _literal(value, parts) or (_value(value.strip()), 0)
        del parts[:used]
    return found


def _literal(value: str, following: Sequence[str]) -> tuple[Any, int] | None:
    """Return a literal in quotes or brackets, which commas may have divided, and how many more parts it has.

    None if it is none, or not one that JSON has.
    """
    if not value.lstrip().startswith(("'", '"', "[", "{", "(")):
        return None
    for count in range(len(following) + 1):
        try:
            found = ast.literal_eval(",".join([value, *following[:count]]).strip())
            json.dumps(found)
            return found, count
        except (ValueError, SyntaxError, TypeError):
            continue
    return None


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def batch_size(text: str) -> int | str:
    """Parse a number, or "auto", for argparse."""
    return text if text == "auto" else int(text)
