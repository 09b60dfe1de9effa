"""Options that several commands have, each declared once, and checks of which options go together.

An option that is not given is None, whatever its default: the default stands in the help and in the function that is
called. So an option without effect is refused even at its default value.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Of some options, those that the command line gives, by name: arguments for a function."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def refuse(options: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Refuse options that have no effect as the others are.

    Args:
        names: the options.
        reason: why they have none, and what would change that.

    Raises:
        ValueError: naming those of the options that are given.
    """
    if found := [option_of(name) for name in given(options, *names)]:
        it = "it" if len(found) == 1 else "them"
        raise ValueError(f"{', '.join(found)}: {reason}, or leave {it} out")


def option_of(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def add_flag(parser: Parser, option: str, help: str) -> None:
    """An option without a value; True or None."""
    parser.add_argument(option, action="store_true", default=None, help=help)


def add_models(parser: Parser) -> None:
    """The two models that are compressed, and where the result goes."""
    parser.add_argument("base", metavar="BASE", help="base model: local folder or Hub id")
    parser.add_argument("finetuned", metavar="FINETUNED", help="fine-tuned model: local folder or Hub id")
    parser.add_argument("output", metavar="OUT", help="folder of the new repository")
    add_revision(parser, "branch, tag or commit of the fine-tuned model")
    parser.add_argument("--base-revision", help="branch, tag or commit of the base model")


def check_models(options: argparse.Namespace) -> None:
    """Check the options of `add_models` and `add_result`."""
    check_revision(options, options.finetuned)
    if options.base_name is None and os.path.isdir(options.base):
        refuse(options, ["base_revision"], f"'{options.base}' is a local folder; add its Hub id, --base-name")
    check_publishing(options, options.base)


def add_merge_config(parser: Parser) -> None:
    """What is merged, and where the result goes."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="merge_method, base_model, models and parameters")
    parser.add_argument("output", metavar="OUT", help="folder of the merged model")


def add_repository(parser: Parser) -> None:
    """The delta repository that a command reads."""
    parser.add_argument("repo", metavar="REPO", help="delta repository: local folder or Hub id")
    add_revision(parser)


def add_base_model(parser: Parser) -> None:
    """Where the base of delta repositories is taken from."""
    parser.add_argument("--base-model", help="take the base from this folder or Hub id instead of the recorded one")


def add_revision(parser: Parser, help: str = "branch, tag or commit on the Hub") -> None:
    """The revision of what is read."""
    parser.add_argument("--revision", help=help)


def check_revision(options: argparse.Namespace, *sources: str) -> None:
    """Refuse a revision of local folders."""
    if all(os.path.isdir(source) for source in sources):
        refuse(options, ["revision"], f"{', '.join(sources)}: no revision of a local folder; give a Hub id")


def add_device(parser: Parser, work: str, default: str = "cpu") -> None:
    """The device.

    Args:
        work: what is done on it.
        default: what is used if none is given.
    """
    parser.add_argument("--device", help=f"where {work} (default: {default})")


def add_json(parser: Parser, help: str = "print the report as JSON") -> None:
    """The report as JSON."""
    add_flag(parser, "--json", help)


def add_quiet(parser: Parser) -> None:
    """No progress bars."""
    add_flag(parser, "--quiet", "no progress bars")


def add_shard_size(parser: Parser) -> None:
    """The largest weight file."""
    parser.add_argument("--max-shard-size", metavar="SIZE", help="split larger weight files (default: 5GB)")


def add_base_name(parser: Parser, model: str = "a base") -> None:
    """The Hub id of a model in a local folder."""
    parser.add_argument("--base-name", help=f"Hub id to record for {model} that is given as a local folder")


def add_publishing(parser: Parser) -> None:
    """Publish the result."""
    parser.add_argument("--push", metavar="REPO", help="push the result to this Hub repository")
    add_private(parser)


def add_private(parser: Parser) -> None:
    """Whether a new Hub repository is private."""
    add_flag(parser, "--private", "make a new Hub repository private")


def add_result(parser: Parser) -> None:
    """What becomes of the repository that a command makes."""
    add_base_name(parser)
    add_shard_size(parser)
    add_publishing(parser)
    add_json(parser)
    add_quiet(parser)


def check_publishing(options: argparse.Namespace, base: str | None = None) -> None:
    """Check the options of `add_publishing`.

    Args:
        base: of the delta repository that is made, if it is one.

    Raises:
        ValueError: if nothing is published that could be private, or a base that others do not have.
    """
    if options.push is None:
        refuse(options, ["private"], "is for what is published; add --push REPO")
    elif base is not None and os.path.isdir(base) and not options.base_name:
        raise ValueError("--push needs --base-name, the Hub id of the base: others do not have your local folder")


def push_if_asked(options: argparse.Namespace) -> None:
    """Publish a command's result, the folder `options.output`, if the user wants it."""
    if options.push:
        from .. import hub

        url = hub.push(options.output, options.push, private=options.private)
        print(url, file=sys.stderr if options.json else sys.stdout)


def add_calibration(parser: Parser, help: str, of_what: str = "that text") -> None:
    """A calibration text, and how much of it is read.

    Args:
        help: what the text is for.
        of_what: what the samples are taken from.
    """
    parser.add_argument("--calibration", metavar="TEXT", help=help)
    parser.add_argument("--calibration-samples", type=int, help=f"sequences of {of_what}, at most (default: 128)")
    parser.add_argument(
        "--calibration-length",
        type=int,
        help="tokens of a sequence (default: 2048, or as many as the model has positions)",
    )


def add_text_size(parser: Parser, text: str) -> None:
    """How much is read of a text on which models are judged.

    Args:
        text: which one.
    """
    parser.add_argument("--samples", type=int, help=f"sequences of {text}, at most (default: 64)")
    parser.add_argument("--length", type=int, help="their tokens (default: 512, or as many as the model has positions)")
    parser.add_argument("--batch-size", type=int, help="sequences judged at a time (default: 8)")


def add_task(parser: Parser, help: str) -> None:
    """A task of lm-eval on which models are judged."""
    parser.add_argument("--task", help=f"{help} of this lm-eval task, or of a task's YAML file")
    parser.add_argument("--task-limit", type=int, help="examples of the task, at most")


def check_text_and_task(options: argparse.Namespace, text: str) -> None:
    """Check the options of `add_text_size` and `add_task`.

    Args:
        text: the option that gives the text.
    """
    if not getattr(options, text):
        refuse(options, ["samples", "length"], f"is of a text; add {option_of(text)} TEXT")
    if options.task is None:
        refuse(options, ["task_limit"], "is of a task; add --task TASK")


def add_training_file(parser: Parser) -> None:
    """The fields of TrainingArguments for which a command that trains has no option."""
    parser.add_argument(
        "--training", metavar="FILE.json", type=Path, help="more of transformers' TrainingArguments, by name"
    )


def training_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The argument `training`, read from that file, if one is given."""
    if options.training is None:
        return {}
    from ..modeling.checkpoints import read_json

    return {"training": read_json(options.training)}


def numbers(kind: type) -> Callable[[str], tuple]:
    """A parser of comma-separated numbers of a kind, for argparse."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = "comma-separated numbers"  # argparse puts it into its message
    return parse


def listed(values: Sequence[Any]) -> str:
    """Values as an option takes them, separated by commas."""
    return ",".join(map(str, values))
