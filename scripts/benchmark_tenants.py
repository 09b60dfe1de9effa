"""Measure ways to serve many tenants, each a delta of one base, with vLLM under an open load; or check the answers.

    python scripts/benchmark_tenants.py WORK                        # a small base and fine-tunes, trained in WORK
    python scripts/benchmark_tenants.py WORK --base BASE --finetuned TUNE…
    python scripts/benchmark_tenants.py WORK --report
    python scripts/benchmark_tenants.py WORK --check --seconds 300 --concurrency 500

Ways: `separate` starts one engine per tenant, as many at once as memory allows. `swaps` is one engine that loads the
delta that a request names; `swaps-scratch` is the same with dense copies on disk. `adapters` is one engine with LoRA
adapters exported from the deltas, which are approximations. `packed` is one engine with all deltas packed beside the
base (IMPART_HF_PACKED). Requests go to `vllm serve` over HTTP. Every way gets the same requests, which follow from
--seed. IMPART_HF_MAX_WAIT and IMPART_HF_MIN_RESIDENCE are taken from the environment.

Each run is a line of WORK/results.jsonl, by which the same command goes on where it was stopped; WORK/tenants.md and
WORK/tenants.png are made from it.

With --check so many requests are in flight at any time, for all deltas alike, completions and chats, streamed or not;
some clients leave. Each answer's tokens and text are compared with what transformers generates greedily with the delta
in float32. The exit status is 1 if one is wrong or lost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from measure import comma_separated
from results_log import Log, read_lines
from tenant_load import (
    Answer,
    Client,
    Question,
    Verdict,
    arrivals,
    closed_loop,
    mixture,
    open_loop,
    summary,
    zipf,
)
from tenant_models import (
    Models,
    expected_answers,
    has_chat,
    make_tenants,
    prompts_of,
    small_models,
    small_text,
)
from tenant_report import write_report
from tenant_ways import EXACT, WAYS, PeakResident, Servers, Settings, engines_that_fit
from transformers.utils import logging

from impart_hf.calibration.text import BUILT_IN
from impart_hf.methods import method_names

_CHECKED_PROMPTS = 24
_TOLD_EVERY = 10.0  # seconds between lines of a check


def models_of(arguments: argparse.Namespace) -> Models:
    """Return the base and as many tenants as are asked for at most."""
    work, count = arguments.work, max(arguments.tenants)
    if arguments.base:
        base, finetuned, text = arguments.base, arguments.finetuned, BUILT_IN
    else:
        base, finetuned = small_models(work, count)
        text = small_text(work)
    tenants = make_tenants(work, base, finetuned, count, arguments.method, arguments.ratio)
    return Models(base, tenants, str(arguments.text or text))


def served_settings(arguments: argparse.Namespace, models: Models) -> Settings:
    """Return the settings of servers."""
    length = 2 * (arguments.prompt_tokens + arguments.tokens) + 64  # texts may have more tokens than they were cut from
    options = ["--dtype", arguments.dtype, "--max-model-len", str(length)]
    options += [] if arguments.compiled else ["--enforce-eager"]
    size = sum(path.stat().st_size for path in models.base.glob("*.safetensors"))
    engines = arguments.engines or engines_that_fit(size * (2 if arguments.dtype == "float32" else 1))
    options += shlex.split(arguments.serve_options)
    return Settings(arguments.work.resolve(), options, engines, arguments.scratch_limit)


def benchmark(arguments: argparse.Namespace, log: Log) -> None:
    """Run what the results file lacks: for each way and number of tenants its servers, and at them each rate."""
    models = models_of(arguments)
    prompts = prompts_of(models, arguments.prompts, arguments.prompt_tokens, arguments.seed)
    for count in arguments.tenants:
        some = Models(models.base, models.tenants[:count], models.text)
        for way in arguments.ways:
            keys = {rate: {"way": way, "tenants": count, "rate": rate} for rate in arguments.rates}
            todo = [rate for rate, key in keys.items() if not log.has(key)]
            if not todo:
                continue
            settings = served_settings(arguments, some)
            plan = WAYS[way](some, settings)
            if len(plan.places) < count:
                print(f"{way}: only {len(plan.places)} of {count} engines fit; the others' requests are left out")
            with Servers(plan, settings, arguments.work / "logs" / f"{way}-{count}") as servers:
                asyncio.run(_warm_up(Client(servers.targets, prompts, arguments.tokens)))
                for rate in todo:
                    line = (
                        keys[rate] | {"served": len(plan.places)} | measured(servers, prompts, arguments, rate, count)
                    )
                    log.append(line | {"machine": measure.machine()})
                    print(f"{way}, {count} tenants, {rate:g} requests/s: {_told(line)}", flush=True)


async def _warm_up(client: Client) -> None:
    """Ask one question for each tenant: the first request of a model takes longer.

    Raises:
        RuntimeError: if one fails.
    """
    async with client:
        for tenant in range(client.tenants):
            answer = await client.ask(Question(tenant, 0))
            if answer.error:
                raise RuntimeError(f"the first request of tenant {tenant} failed: {answer.error}")


def measured(
    servers: Servers, prompts: Sequence[str], arguments: argparse.Namespace, rate: float, count: int
) -> dict[str, Any]:
    """Run an open loop, and return what it found."""
    questions = arrivals(rate, arguments.seconds, zipf(count, arguments.zipf), len(prompts), arguments.seed)
    questions = [question for question in questions if question.tenant < len(servers.targets)]

    async def run() -> list[Answer]:
        async with Client(servers.targets, prompts, arguments.tokens, arguments.timeout) as client:
            return await open_loop(client, questions)

    before = servers.swaps()
    with PeakResident(servers) as memory:
        answers = asyncio.run(run())
    after = servers.swaps()
    for error in list(dict.fromkeys(answer.error for answer in answers if answer.error))[:3]:
        print(f"failed: {error}", file=sys.stderr)
    swapped = None if before is None or after is None else after - before
    return {**summary(answers), "peak_memory": memory.bytes, "swaps": swapped}


def _told(line: dict[str, Any]) -> str:
    p50, p90 = line["latency_p50"], line["latency_p90"]
    latency = "no answer" if p50 is None else f"latency {p50:.2f} s, p90 {p90:.2f} s"
    return f"{line['requests']} requests, {line['failed']} failed, {latency}, client late by {line['client_lag']:.3f} s"


def check(arguments: argparse.Namespace) -> int:
    """Check answers under load, print what was found, and return the exit status."""
    models = models_of(arguments)
    settings = served_settings(arguments, models)
    plan = WAYS[arguments.ways[0]](models, settings)
    if len(plan.places) < len(models.tenants):
        raise ValueError(f"only {len(plan.places)} of {len(models.tenants)} engines fit: give fewer --tenants")
    chat = has_chat(models)
    candidates = prompts_of(models, 4 * _CHECKED_PROMPTS, arguments.prompt_tokens, arguments.seed)
    prompts, expected = expected_answers(models, candidates, arguments.tokens, chat, _CHECKED_PROMPTS)
    kinds = "completions and chats" if chat else "completions"
    print(f"{len(prompts)} prompts as {kinds}, {len(models.tenants)} deltas, {len(expected)} answers", flush=True)
    verdict, told = Verdict(expected), time.monotonic()

    def each(answer: Answer) -> None:
        nonlocal told
        verdict.add(answer)
        if time.monotonic() - told > _TOLD_EVERY:
            told = time.monotonic()
            held = f"{memory.now / 1e9:.2f} GB"
            print(f"{verdict.requests} requests, {verdict.wrong} wrong, {verdict.lost} lost, {held}", flush=True)

    async def run() -> list[Answer]:
        questions = mixture(len(models.tenants), len(prompts), chat, arguments.seed, arguments.leaving)
        async with Client(servers.targets, prompts, arguments.tokens, arguments.timeout, ids=True) as client:
            return await closed_loop(client, questions, arguments.concurrency, arguments.seconds, each)

    with Servers(plan, settings, arguments.work / "logs" / "check") as servers, PeakResident(servers) as memory:
        started = time.monotonic()
        answers = asyncio.run(run())
        seconds = time.monotonic() - started
        swaps = servers.swaps()
    for line in verdict.told:
        print(line)
    asked = [sum(1 for a in answers if a.question.tenant == number) for number in range(len(models.tenants))]
    rate = summary(answers)["tokens_per_second"] or 0
    print(
        f"{verdict.requests} requests in {seconds:.0f} s, {arguments.concurrency} at once ({asked} by delta): "
        f"{verdict.wrong} wrong, {verdict.lost} lost, {verdict.left} left by their clients, {swaps} swaps, "
        f"longest wait {verdict.longest:.1f} s, {rate:.0f} tokens/s, {memory.bytes / 1e9:.2f} GB"
    )
    return 1 if verdict.wrong or verdict.lost or not verdict.requests else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark_tenants.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORK", help="folder for models, results and logs")
    models = parser.add_argument_group("models")
    models.add_argument("--base", type=Path, metavar="DIR", help="a base in a local folder (default: a small one)")
    models.add_argument(
        "--finetuned", type=Path, nargs="+", default=[], metavar="DIR",
        help="fine-tunes of it; with fewer than tenants, one has several deltas, of larger ratios and other seeds",
    )  # fmt: skip
    models.add_argument("--method", choices=method_names(), default="impart-rd", help="(default: impart-rd)")
    models.add_argument("--ratio", type=float, default=16.0, help="compression ratio (default: 16)")
    models.add_argument("--text", type=Path, metavar="FILE", help="text to take prompts from")
    load = parser.add_argument_group("load")
    load.add_argument("--tenants", type=comma_separated(int), help="numbers of tenants (default: 2,5,10; check: 5)")
    load.add_argument("--rates", type=comma_separated(float), default=[1.0, 4.0], help="requests/s (default: 1,4)")
    load.add_argument("--zipf", type=float, default=1.0, help="exponent of the tenants' popularity (default: 1)")
    load.add_argument("--seconds", type=float, default=60.0, help="length of a run (default: 60)")
    load.add_argument("--prompts", type=int, default=256, help="number of prompts to draw from (default: 256)")
    load.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="(default: 32)")
    load.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens of every answer (default: 32)")
    load.add_argument("--timeout", type=float, default=600.0, help="seconds until a request has failed (default: 600)")
    load.add_argument("--seed", type=int, default=0)
    servers = parser.add_argument_group("servers")
    servers.add_argument(
        "--ways", type=comma_separated(str), help=f"(default: {','.join(WAYS)}; with --check swaps, and only one)"
    )
    servers.add_argument("--dtype", help="of the servers (default: auto; with --check float32)")
    servers.add_argument("--engines", type=int, help="the most that `separate` starts (default: what fits in memory)")
    servers.add_argument("--scratch-limit", default="100GB", help="IMPART_HF_SCRATCH_LIMIT of swaps-scratch")
    servers.add_argument("--compiled", action="store_true", help="let vLLM compile models, which starts later")
    servers.add_argument("--serve-options", default="", metavar="TEXT", help="further options of vllm serve")
    modes = parser.add_argument_group("modes")
    modes.add_argument("--check", action="store_true", help="compare answers under load, measure nothing else")
    modes.add_argument("--concurrency", type=int, default=500, help="requests in flight of a check (default: 500)")
    modes.add_argument("--leaving", type=float, default=0.02, help="share of its clients that leave (default: 0.02)")
    modes.add_argument("--report", action="store_true", help="run nothing, only write table and picture")
    modes.add_argument("--document", type=Path, metavar="FILE", help="also put both into this document, by its markers")
    return parser


def _complete(arguments: argparse.Namespace) -> None:
    """Fill in what depends on the mode; raise ValueError for what nothing can be run with."""
    arguments.tenants = arguments.tenants or ([5] if arguments.check else [2, 5, 10])
    arguments.ways = arguments.ways or (["swaps"] if arguments.check else list(WAYS))
    arguments.dtype = arguments.dtype or ("float32" if arguments.check else "auto")
    if strange := [way for way in arguments.ways if way not in WAYS]:
        raise ValueError(f"--ways {strange[0]}: choose from {', '.join(WAYS)}")
    if arguments.check and (len(arguments.ways) > 1 or arguments.ways[0] not in EXACT):
        raise ValueError(f"--check is of one way whose answers are exact: {', '.join(EXACT)}")
    if bool(arguments.base) != bool(arguments.finetuned):
        raise ValueError("give both --base and --finetuned, or neither")
    numbers = [*arguments.tenants, arguments.concurrency, arguments.prompts, arguments.prompt_tokens, arguments.tokens]
    if min([*numbers, *arguments.rates, arguments.seconds, arguments.ratio, arguments.timeout]) <= 0:
        raise ValueError("tenants, rates, tokens, prompts, seconds and requests must be more than 0")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.disable_progress_bar()
    path = arguments.work / "results.jsonl"
    try:
        _complete(arguments)
        if arguments.check:
            return check(arguments)
        if not arguments.report:
            arguments.work.mkdir(parents=True, exist_ok=True)
            benchmark(arguments, Log(path, log_settings(arguments), "WORK"))
        elif not path.exists():
            raise ValueError(f"there is no {path}: run the benchmark first")
        print(write_report(read_lines(path), arguments.work, arguments.document))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmark_tenants.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def log_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all lines of a results file have in common."""
    names = ["method", "ratio", "zipf", "seconds", "prompts", "prompt_tokens", "tokens", "timeout", "seed", "dtype"]
    names += ["compiled", "scratch_limit", "serve_options"]
    tuned = ", ".join(path.name for path in arguments.finetuned)
    return {
        "model": f"{arguments.base.resolve().name} with {tuned}" if arguments.base else "small LLaMA",
        **{name: getattr(arguments, name) for name in names},
        "text": arguments.text.name if arguments.text else None,
        "max_wait": os.environ.get("IMPART_HF_MAX_WAIT", "10"),
        "min_residence": os.environ.get("IMPART_HF_MIN_RESIDENCE", "0.5"),
    }


if __name__ == "__main__":
    sys.exit(main())
