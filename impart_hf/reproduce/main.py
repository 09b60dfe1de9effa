"""The command `impart-hf-reproduce`: runs the rows of papers' tables that are missing, and prints the tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from .. import __version__
from ..cli.main import load_libraries
from ..cli.options import add_device, add_flag, add_limit, given, refuse
from ..cli.task_options import JUDGED, add_alpaca, add_running, batch_size, check_alpaca, given_alpaca, warn_of_code
from ..common.files import atomic_write
from ..evaluation.journal import Journal
from .makes import Merged
from .planning import Conditions, Entry, entries_of
from .rendering import rendered
from .runner import Runner, results_in
from .small import LIMIT, SmallPair
from .tables import Table, load_table, table_names

_ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit status: 0, or 1 if a row failed or with one line on standard error."""
    try:
        options = _parser().parse_args(arguments)
        _check(options)
        return _run(options)
    except KeyboardInterrupt:
        print("impart-hf-reproduce: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"impart-hf-reproduce: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="impart-hf-reproduce",
        allow_abbrev=False,
        description="Run the rows of papers' tables that are missing, and print measured beside published numbers.",
        epilog="Results and tables are kept in the output folder; the same command goes on where it was stopped.",
    )
    parser.add_argument("--version", action="version", version=f"impart-hf {__version__}")
    parser.add_argument("tables", metavar="TABLE", nargs="*", help=f"{', '.join(table_names())}, or {_ALL}")
    add_flag(parser, "--list", "print the tables, or the rows of TABLE with what they still need, and run nothing")
    parser.add_argument(
        "--rows",
        metavar="PATTERN",
        action="append",
        help="only these rows: LINE/MODEL/TASK with wildcards, or LINE; may be given several times",
    )
    add_flag(parser, "--dry-run", "run nothing, and print what the missing rows will take: time, memory and disk")
    parser.add_argument("--output", metavar="FOLDER", help="folder for results and tables (default: reproduced)")
    add_flag(parser, "--keep", "keep the models that are made, in FOLDER/models; otherwise each is removed when scored")
    models = parser.add_argument_group("models and texts")
    models.add_argument(
        "--model",
        metavar="NAME=MODEL",
        action="append",
        help="take this fine-tune, a folder or Hub id, for one of the tables' models; may be given several times",
    )
    models.add_argument(
        "--texts",
        metavar="FOLDER",
        type=Path,
        help="texts that the papers did not publish: train/TASK.jsonl for fine-tuning, validation/TASK.jsonl for "
        "merges (.json, .parquet and .txt as well)",
    )
    add_flag(models, "--small", "take a small pair, its texts and its tasks in place of the papers': a trial run")
    models.add_argument("--pair", metavar="FOLDER", type=Path, help="the small pair (default: demo/pair)")
    running = parser.add_argument_group("running")
    add_limit(running)
    running.add_argument("--batch-size", type=batch_size, metavar="N|auto", help="requests at a time (default: 8)")
    add_running(running)
    add_device(running, "models are made and evaluated")
    add_alpaca(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    if not options.tables:
        if not options.list:
            raise ValueError(f"name a table: {', '.join(table_names())}, or {_ALL}; --list says what they are")
        refuse(options, ["rows"], "needs a table; add TABLE")
    if options.small:
        refuse(options, ["model", "texts", "allow_code", "data_dir", *JUDGED], "has no effect with --small")
    else:
        refuse(options, ["pair"], "needs --small; add it")
    if given(options, *JUDGED):
        check_alpaca(options)
    if options.list or options.dry_run:
        what = "--list" if options.list else "--dry-run"
        refuse(options, ["keep"], f"has no effect with {what}, which makes nothing; remove {what}")
    if options.list:
        refuse(options, ["dry_run"], "cannot be combined with --list; remove one of them")


def _run(options: argparse.Namespace) -> int:
    if not options.tables:
        for name in table_names():
            print(f"{name:<26}{load_table(name).title}")
        return 0
    names = table_names() if _ALL in options.tables else dict.fromkeys(options.tables)
    tables, conditions, pair = [load_table(name) for name in names], _conditions(options), None
    if options.small:
        pair = SmallPair(options.pair or Path("demo/pair"), conditions.output / "small")
        tables = [pair.table(table) for table in tables]
        conditions = replace(conditions, one_text=pair.one_text, limit=conditions.limit or LIMIT)
    entries = _entries(tables, options.rows or [], conditions)
    _check_replaced(conditions.replaced, [entry for own in entries.values() for entry in own])
    tables = [table for table in tables if table.name in entries]
    results = results_in(conditions.output)
    if options.list:
        for table in tables:
            _print_rows(table, entries[table.name], results)
        return 0
    load_libraries()
    from ..common.devices import usable_device
    from .forecasts import forecast_table

    usable_device(conditions.device)  # raises an error if there is none
    conditions.settings_for(tables[0].rows[0].task)  # likewise for numbers
    if options.dry_run:
        missing = [e for own in entries.values() for e in own if not e.needs and e.key not in results]
        print(forecast_table(missing, conditions, _say))
        return 0
    from ..evaluation.models import ModelLoader

    ModelLoader(conditions.backend)  # raises an error if it is not installed
    warn_of_code(options)
    if pair is not None and any(isinstance(e.making, Merged) for own in entries.values() for e in own):
        pair.prepare(conditions.device)
    runner = Runner(conditions, results, keep=bool(options.keep), say=_say)
    for table in tables:
        own = entries[table.name]
        runner.run(own)
        why_not = runner.failed | runner.unreachable
        render = partial(
            rendered, table, results=results, why_not=why_not, remark=_remark(pair, conditions), compares=pair is None
        )
        every = entries_of(table, [], conditions) if options.rows else own  # the file has all, whatever is run now
        conditions.output.mkdir(parents=True, exist_ok=True)
        with atomic_write(conditions.output / f"{table.name}.md") as temporary:
            temporary.write_text(render(every), encoding="utf-8")
        print(render(own))
    return 1 if runner.failed else 0


def _conditions(options: argparse.Namespace) -> Conditions:
    replaced = {}
    for given_model in options.model or []:
        name, _, model = given_model.partition("=")
        if not model:
            raise ValueError(f"--model must be NAME=MODEL, got '{given_model}'")
        replaced[name] = model
    output = Path(options.output or ("reproduced-small" if options.small else "reproduced"))
    return Conditions(
        output, replaced=replaced, alpaca=given_alpaca(options),
        **given(options, "device", "backend", "limit", "batch_size", "data_dir", "allow_code", "texts"),
    )  # fmt: skip


def _entries(tables: Sequence[Table], patterns: Sequence[str], conditions: Conditions) -> dict[str, list[Entry]]:
    """Return the rows of each table that match a pattern, by the table's name; tables without any are left out.

    Raises:
        ValueError: if a pattern matches no row of any table.
    """
    for pattern in patterns:
        if not any(table.selected([pattern]) for table in tables):
            raise ValueError(
                f"--rows {pattern}: there is no such row. A row is LINE/MODEL/TASK, with wildcards, or LINE; "
                "--list with the table's name prints them"
            )
    found = {table.name: entries_of(table, patterns, conditions) for table in tables}
    return {name: own for name, own in found.items() if own}


def _check_replaced(replaced: Mapping[str, str], entries: Sequence[Entry]) -> None:
    """Refuse fine-tunes that stand for models of none of the rows."""
    used = {model.name for entry in entries for model in (entry.row.model, *entry.row.model.merges)}
    if unused := [name for name in replaced if name not in used]:
        raise ValueError(f"--model {unused[0]}: none of these rows has the model; leave it out, or name other rows")


def _print_rows(table: Table, entries: Sequence[Entry], results: Journal) -> None:
    """Print a table's rows with their published numbers and what is left to do."""
    print(f"{table.name}: {table.title}")
    width = max(map(len, (entry.row.id for entry in entries)), default=0)
    for entry in entries:
        published = "–" if entry.row.published is None else f"{entry.row.published:g}"
        state = "done" if entry.key in results else f"needs {entry.needs}" if entry.needs else "to run"
        print(f"  {entry.row.id:<{width}}  {published:>6}  {state}")


def _remark(pair: SmallPair | None, conditions: Conditions) -> str:
    """Return what must be known of a trial run; empty if it is none."""
    if pair is None:
        return ""
    return (
        "**A trial run on toys.** The published numbers are of other models, texts and tasks, and only show where they "
        "stand. Ratios are the papers'; texts, training, searches and the number of pruned layers are cut down, and "
        f"each score is of {conditions.limit} questions."
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
