"""Options that several commands have, each declared once, and checks for options that cannot be combined.

An option that is not given is None, whatever its default. The default is stated in the help and set in the function
that is called. This way, an option without effect is refused even if its default value is given.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of the named options that are given on the command line, as arguments for a function."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def refuse(options: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Refuse options that have no effect in combination with the others.

    Args:
        names: names of the options.
        reason: why they have no effect, and which change would give them one.

    Raises:
        ValueError: if one of them is given; the message names all that are.
    """
    if refused := [option_of(name) for name in given(options, *names)]:
        it = "it" if len(refused) == 1 else "them"
        raise ValueError(f"{', '.join(refused)}: {reason}, or leave {it} out")


def option_of(name: str) -> str:
    """Return an option as it is typed."""
    return "--" + name.replace("_", "-")


def add_flag(parser: Parser, option: str, help: str) -> None:
    """Add an option without a value: True if given, otherwise None."""
    parser.add_argument(option, action="store_true", default=None, help=help)


def add_models(parser: Parser) -> None:
    """Add the two models that are compressed, and the output folder."""
    parser.add_argument("base", metavar="BASE", help="base model: local folder or Hub id")
    parser.add_argument(
        "finetuned",
        metavar="FINETUNED",
        help="fine-tuned model, or adapter in PEFT's format on BASE: local folder or Hub id",
    )
    parser.add_argument("output", metavar="OUT", help="folder to write the delta repository to")
    add_revision(parser, "branch, tag or commit of the fine-tuned model")
    parser.add_argument("--base-revision", help="branch, tag or commit of the base model")


def check_models(options: argparse.Namespace) -> None:
    """Check the options of `add_models` and `add_result`."""
    check_revision(options, options.finetuned)
    if options.base_name is None and os.path.isdir(options.base):
        refuse(options, ["base_revision"], f"'{options.base}' is a local folder; add its Hub id with --base-name")
    check_publishing(options, options.base)


def add_merge_config(parser: Parser) -> None:
    """Add the configuration of a merge, and the output folder."""
    parser.add_argument(
        "config",
        metavar="CONFIG.yaml",
        help="YAML file with merge_method, base_model, models (fine-tunes, delta repositories, adapters in PEFT's "
        "format) and parameters",
    )
    parser.add_argument("output", metavar="OUT", help="folder to write the merged model to")


def add_repository(parser: Parser) -> None:
    """Add the delta repository that a command reads."""
    parser.add_argument("repo", metavar="REPO", help="delta repository: local folder or Hub id")
    add_revision(parser)


def add_base_model(parser: Parser) -> None:
    """Add the source of the base of delta repositories."""
    parser.add_argument("--base-model", help="folder or Hub id of the base, instead of the recorded one")


def add_revision(parser: Parser, help: str = "branch, tag or commit on the Hub") -> None:
    """Add the revision of a model on the Hub."""
    parser.add_argument("--revision", help=help)


def check_revision(options: argparse.Namespace, *sources: str) -> None:
    """Refuse a revision if all sources are local folders."""
    if all(os.path.isdir(source) for source in sources):
        refuse(options, ["revision"], f"{', '.join(sources)}: a local folder has no revisions; give a Hub id")


def add_device(parser: Parser, work: str, default: str = "cpu") -> None:
    """Add the device.

    Args:
        work: the work that is done on it, for the help.
        default: the device that is used if none is given, for the help.
    """
    parser.add_argument("--device", help=f"where {work} (default: {default})")


def add_json(parser: Parser, help: str = "print the report as JSON") -> None:
    """Add the option to print JSON."""
    add_flag(parser, "--json", help)


def add_card_plot_option(parser: Parser) -> None:
    """Add the option to show the repository's plot in its model card."""
    add_flag(parser, "--card-plot", "write delta.png into the repository, and a link to it into its model card")


def add_quiet(parser: Parser) -> None:
    """Add the option to hide progress bars."""
    add_flag(parser, "--quiet", "show no progress bars")


def add_shard_size(parser: Parser) -> None:
    """Add the largest size of a weight file."""
    parser.add_argument("--max-shard-size", metavar="SIZE", help="split larger weight files (default: 5GB)")


def add_base_name(parser: Parser, model: str = "a base") -> None:
    """Add the Hub id to record for a model in a local folder."""
    parser.add_argument("--base-name", help=f"Hub id to record for {model} that is a local folder")


def add_publishing(parser: Parser) -> None:
    """Add the options to publish the result."""
    parser.add_argument("--push", metavar="REPO", help="push the result to this Hub repository")
    add_private(parser)


def add_private(parser: Parser) -> None:
    """Add the option to make a new Hub repository private."""
    add_flag(parser, "--private", "make a new Hub repository private")


def add_result(parser: Parser) -> None:
    """Add the options for the repository that a command makes, and for its report."""
    add_base_name(parser)
    add_shard_size(parser)
    add_publishing(parser)
    add_json(parser)
    add_quiet(parser)


def check_publishing(options: argparse.Namespace, base: str | None = None) -> None:
    """Check the options of `add_publishing`.

    Args:
        base: the base of the delta repository that is made; None if the result is not a delta repository.

    Raises:
        ValueError: if --private is given without --push, or a delta would be published whose base is only local.
    """
    if options.push is None:
        refuse(options, ["private"], "has no effect without --push; add --push REPO")
    elif base is not None and os.path.isdir(base) and not options.base_name:
        raise ValueError("--push needs --base-name, the Hub id of the base: others do not have your local folder")


def push_if_asked(options: argparse.Namespace) -> None:
    """Publish a command's result, the folder `options.output`, if --push is given."""
    if options.push:
        from .. import hub

        url = hub.push(options.output, options.push, private=options.private)
        print(url, file=sys.stderr if options.json else sys.stdout)


def add_text_field(parser: Parser) -> None:
    """Add the field of a text's records."""
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        help="field of the text's records that holds text or a chat (default: the format is recognised)",
    )


def check_text_field(options: argparse.Namespace, *texts: str | None) -> None:
    """Refuse --text-field if no text that is given has records.

    Args:
        texts: the texts; None for one that is not given.
    """
    if not any(texts):
        refuse(options, ["text_field"], "has no effect without a text; give a text")
    if all(text is None or text.lower().endswith(".txt") for text in texts):
        refuse(options, ["text_field"], "has no effect on a .txt file, which has no fields; give records")


def given_texts(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of the named texts that are given, as arguments for a function, with their field if one is given."""
    return {name: with_text_field(options, text) for name, text in given(options, *names).items()}


def with_text_field(options: argparse.Namespace, text: str) -> Any:
    """Return a text as functions take it: with the field of --text-field, if one is given."""
    if options.text_field is None:
        return text
    from ..calibration.text import TextField

    return TextField(text, options.text_field)


def add_calibration(parser: Parser, help: str, of_what: str = "that text") -> None:
    """Add a calibration text, and how much of it is used.

    Args:
        help: purpose of the text.
        of_what: the text that the samples are taken from, for the help.
    """
    parser.add_argument("--calibration", metavar="TEXT", help=help)
    parser.add_argument(
        "--calibration-samples", type=int, help=f"largest number of sequences of {of_what} (default: 128)"
    )
    parser.add_argument(
        "--calibration-length",
        type=int,
        help="tokens per sequence (default: 2048, or as many as the model has positions)",
    )


def add_text_size(parser: Parser, text: str, batch_size: bool = True) -> None:
    """Add how much is used of a text on which models are judged.

    Args:
        text: the text, for the help.
        batch_size: whether to add --batch-size as well.
    """
    parser.add_argument("--samples", type=int, help=f"largest number of sequences of {text} (default: 64)")
    parser.add_argument(
        "--length", type=int, help="tokens per sequence (default: 512, or as many as the model has positions)"
    )
    if batch_size:
        parser.add_argument("--batch-size", type=int, help="sequences evaluated at a time (default: 8)")


def add_limit(parser: Parser) -> None:
    """Add how much of an lm-eval task is used."""
    parser.add_argument(
        "--limit", type=number, help="largest number of questions of a task, or a share of them, such as 0.1"
    )


def check_text_and_task(options: argparse.Namespace, text: str) -> None:
    """Check the options of `add_text_size` and `add_limit`.

    Args:
        text: name of the option that gives the text.
    """
    if not getattr(options, text):
        refuse(options, ["samples", "length"], f"needs a text; add {option_of(text)} TEXT")
    if options.task is None:
        refuse(options, ["limit"], "needs a task; add --task TASK")


def add_training_file(parser: Parser) -> None:
    """Add a file with the fields of TrainingArguments for which a command has no option of its own."""
    parser.add_argument(
        "--training",
        metavar="FILE.json",
        type=Path,
        help="JSON file with more fields of transformers' TrainingArguments",
    )


def training_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the argument `training`, read from the file of --training, if one is given."""
    if options.training is None:
        return {}
    from ..modeling.model_files import read_json

    return {"training": read_json(options.training)}


def numbers(kind: type) -> Callable[[str], tuple]:
    """Return a parser of comma-separated numbers of a kind, for argparse."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = "comma-separated numbers"  # argparse uses it in its error message
    return parse


def number(text: str) -> int | float:
    """Parse a number, for argparse: whole if it is written so."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def listed(values: Sequence[Any]) -> str:
    """Return values as an option takes them, separated by commas."""
    return ",".join(map(str, values))
