"""The options that choose a compression method and its settings; they are made from the methods' dataclasses."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from ..methods import ExactConfig, MethodConfig, Setting, method_class, method_names, settings_of
from .options import add_calibration, add_models, add_text_field, check_models, given, given_texts, listed, refuse

DEFAULT_METHOD = "impart-rd"
_DEST = "setting "  # prefix of settings among the parsed options, so that they cannot clash with other options


def add_method(
    parser: argparse.ArgumentParser,
    methods: Sequence[str],
    default: str | None = DEFAULT_METHOD,
    searched: Sequence[str] = (),
) -> None:
    """Add options for a method and its settings.

    Args:
        methods: names of the methods that can be chosen.
        default: the method that is used if none is chosen; None for a dense model.
        searched: settings that the command searches itself and that are therefore not options.
    """
    parser.add_argument("--method", choices=methods, default=default, help=f"default: {default or 'a dense model'}")
    parser.add_argument(
        "--max-bytes", metavar="SIZE", help="byte budget of the repository, such as 500MB, instead of --ratio"
    )
    group = parser.add_argument_group("settings of the method")
    owners: dict[str, list[Setting]] = {}
    for setting in _settings(methods):
        if setting.name not in searched:
            owners.setdefault(setting.option, []).append(setting)
    for option, settings in owners.items():
        metavar = option.upper().replace("-", "_")
        group.add_argument(f"--{option}", dest=_DEST + option, metavar=metavar, help=_help(settings, len(methods)))


def _settings(methods: Sequence[str]) -> Iterator[Setting]:
    for name in methods:
        if name != ExactConfig.name:
            yield from settings_of(method_class(name))


def _help(settings: Sequence[Setting], methods: int) -> str:
    """Return the help of an option: its meaning in each method, and its defaults.

    Args:
        settings: the setting in all methods that have it.
        methods: the number of methods.
    """
    meanings: dict[str, list[Setting]] = {}
    for setting in settings:
        meanings.setdefault(setting.help, []).append(setting)
    parts = []
    for help, group in meanings.items():
        owners = "" if len(group) == methods else f"; for {', '.join(setting.method for setting in group)}"
        parts.append(f"{help}{owners} (default: {_defaults(group)})")
    return ". ".join(parts).replace("%", "%%")


def _defaults(settings: Sequence[Setting]) -> str:
    """Return a setting's default: the first method's, and those of other methods where they differ."""
    texts = {setting.method: _text(setting.default) for setting in settings}
    first = next(iter(texts.values()))
    return ", ".join([first, *(f"{text} for {method}" for method, text in texts.items() if text != first)])


def _text(value: Any) -> str:
    """Return a value as an option takes it."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return listed(value) if isinstance(value, tuple) else str(value)


def given_settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings given on the command line, by option without leading hyphens, as unparsed text."""
    texts = {name.removeprefix(_DEST): text for name, text in vars(options).items() if name.startswith(_DEST)}
    return {option: text for option, text in texts.items() if text is not None}


def method_config(options: argparse.Namespace) -> MethodConfig:
    """Return the method that the options ask for.

    Raises:
        ValueError: if a setting is out of range, belongs to another method or has no effect; the message names it.
    """
    texts = given_settings(options)
    if options.max_bytes is not None and "ratio" in texts:
        raise ValueError("give --ratio or --max-bytes, not both")
    chosen = method_class(options.method)
    settings = {setting.option: setting for setting in settings_of(chosen)}
    values: dict[str, Any] = {}
    for option, text in texts.items():
        if option not in settings:
            owners = [setting.method for setting in _settings(method_names()) if setting.option == option]
            raise ValueError(
                f"--{option} belongs to {', '.join(owners)}, not to {chosen.name}: leave it out, or choose another "
                "--method"
            )
        if settings[option].name == "seed" and not chosen.drops_entries:
            raise ValueError(f"--{option}: {chosen.name} drops nothing at random: leave it out")
        try:
            values[settings[option].name] = settings[option].parse(text)
        except ValueError as error:
            raise ValueError(f"--{option}: {error}") from error
        except Exception as error:  # a method's own parser may fail in any way
            raise ValueError(f"--{option}: {text!r} cannot be read: {type(error).__name__}: {error}") from error
    try:
        return chosen(**values)
    except ValueError as error:
        for option in texts:
            if str(error).startswith(settings[option].name):
                raise ValueError(f"--{option}: {error}") from error
        raise


def chosen_method(options: argparse.Namespace) -> MethodConfig | ExactConfig:
    """Return the method that the options ask for, which may be `exact`; errors as for `method_config`."""
    if options.method != ExactConfig.name:
        return method_config(options)
    for option in given_settings(options):
        raise ValueError(f"--{option}: exact has no settings: leave it out, or choose another --method")
    refuse(options, ["max_bytes"], "exact stores every change, whatever size that has; choose another --method")
    return ExactConfig()


def add_pair(
    parser: argparse.ArgumentParser,
    methods: Sequence[str],
    default: str = DEFAULT_METHOD,
    searched: Sequence[str] = (),
    of_what: str = "that text",
) -> None:
    """Add the options of the commands that compress a base and a fine-tune; arguments as for `add_method`.

    Args:
        of_what: the text that --calibration-samples are taken from, for the help.
    """
    add_models(parser)
    add_method(parser, methods, default, searched)
    add_calibration(
        parser,
        "calibration text for the methods that quantise: a .txt, .json, .jsonl or .parquet file, a folder of such "
        "files, the name of a data set on the Hub, 'built-in' for a short text of many kinds, or 'none' (default: "
        "built-in for impart-rd, none for the others, whose values are then only rounded)",
        of_what,
    )
    add_text_field(parser)


def check_pair(options: argparse.Namespace) -> MethodConfig:
    """Check the options of `add_pair`, and return the method."""
    check_models(options)
    method = method_config(options)
    if not method.quantises and calibration_text(options) is not None:
        refuse(
            options,
            ["calibration"],
            f"is for the methods that quantise, not for {method.name}; choose another --method",
        )
    return method


def calibration_text(options: argparse.Namespace) -> str | None:
    """Return the calibration text that is given; None also if it is left out by name."""
    return None if options.calibration == "none" else options.calibration


def commands_after(options: argparse.Namespace) -> list[str]:
    """Return what the user may do with the repository that `compress` or `tune` has made."""
    from .next_commands import next_commands

    return next_commands(
        options.output,
        options.base,
        options.finetuned,
        base_revision=options.base_revision,
        finetuned_revision=options.revision,
        pushed=options.push,
    )


def pair_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that `compress` and `tune` share."""
    return {
        **({"calibration": None} if options.calibration == "none" else given_texts(options, "calibration")),
        **given(options, "max_bytes", "calibration_samples", "calibration_length", "device"),
        **given(options, "base_revision", "base_name", "max_shard_size"),
        "finetuned_revision": options.revision,
        "progress": not options.quiet,
    }
