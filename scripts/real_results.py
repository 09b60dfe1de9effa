"""Measure every method on real pairs, and write the tables and pictures of README.md and docs/results.md.

    python scripts/real_pair.py WORK --train lora,full,embeddings
    python scripts/real_results.py WORK --text gsm8k_test.jsonl --calibration gsm8k_train.txt
    python scripts/real_results.py WORK --report

WORK is real_pair.py's folder: base/ and a folder for each fine-tune. Each run is one line of WORK/results.jsonl, and
the same command goes on after the last one. What is wanted most comes first: every method without text at ratios 32 and
128 on the first pair, then its other ratios, the other pairs, calibrated runs, distilled ones, and other seeds. So a
study that is stopped early has tables too; --report writes them from the lines alone. A line knows the code that made
it (method_sources.py): --report says which lines are of earlier code, and --renew makes those again.

Compression and measurement each have a fresh process. Records have a question, which is only read, and an answer, on
whose tokens everything is measured (answer_quality.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import benchmark_compress
import benchmark_load
import measure
import torch
from answer_quality import Reference, answer_quality, binomial_error, exact_matches, examples_of
from benchmark_quality import parts_of
from measure import comma_separated
from method_sources import code_digest
from pair_training import delta_size
from question_answers import read_records
from real_jobs import SERVED, Benchmark, Generation, Job, Pair, Run, jobs
from real_report import COST_AT, write_report
from results_log import Log, read_lines
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from impart_hf.methods import method_names

METHODS = ("impart-rd", "impart-qt", "delta-come", "dare-qt", "bitdelta", "impart", "dare", "lowrank")
WITH_TEXT = (
    *(f"{method}+calibration" for method in METHODS[:4]),
    *(f"{method}+distill" for method in ("impart-rd", "impart-qt", "delta-come", "bitdelta")),
)
RATIOS = (8.0, 16.0, 32.0, 64.0, 128.0, 400.0)
PAIRS = ("lora", "full", "embeddings")
LOADED = "impart-rd,impart-qt,bitdelta"  # the methods whose deltas are loaded beside the dense fine-tune


class Study:
    """Does one job after the other; what is kept of each fine-tune is in `folder`."""

    def __init__(self, results: Log, arguments: argparse.Namespace, folder: Path):
        self._results, self._arguments, self._folder = results, arguments, folder
        self._known: set[str] = set()

    def do(self, job: Job) -> str:
        """Do a job and record what it found; return a message about it."""
        self._introduce(job.pair)
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            if isinstance(job, Benchmark):
                found = self._benchmark(job, Path(scratch))
            elif isinstance(job, Generation):
                found = self._generated(job, Path(scratch, "delta"))
            else:
                found = self._compressed(job, Path(scratch, "delta"))
                if "failed" not in found:
                    found |= self._measured(job.pair, Path(scratch, "delta"))
        machine = measure.machine(self._arguments.device)
        self._results.append(
            {**job.key, "made_by": job.made_by, "code": code_digest(job.made_by), "machine": machine, **found}
        )
        if "kl" in found:
            return f"KL {found['kl']:.5f}, encoded in {found['seconds']:.0f} s"
        return found.get("failed", "done")

    def _introduce(self, pair: Pair) -> None:
        """Record a pair's description, or check that the pair is the recorded one; run its fine-tune if need be.

        Raises:
            ValueError: if another pair of this name is recorded.
        """
        if pair.name in self._known:
            return
        digest, known, path = pair.digest(self._arguments.text), self._results.about(pair.name), self._reference(pair)
        if known is not None and known["digest"] != digest:
            raise ValueError(f"the results are of another pair '{pair.name}' or text: give another --output")
        if known is None or not path.exists():
            path.parent.mkdir(exist_ok=True)
            task = {"base": str(pair.base), "finetuned": str(pair.finetuned), "reference": str(path)}
            task |= {"text": str(self._arguments.text), "records": self._arguments.records}
            about = measure.in_fresh_process(__file__, {"introduce": task, "device": self._arguments.device})
        if known is None:
            about |= {"digest": digest, "base": self._measured(pair, pair.base)}
            machine = measure.machine(self._arguments.device)
            self._results.append({"pair": pair.name, "about": about, "machine": machine})
        self._known.add(pair.name)

    def _reference(self, pair: Pair) -> Path:
        return self._folder / "references" / f"{pair.name}.safetensors"

    def _compressed(self, run: Run, folder: Path) -> dict[str, Any]:
        arguments, (method, *steps) = self._arguments, run.method.split("+")
        task = {"base": str(run.pair.base), "finetuned": str(run.pair.finetuned), "output": str(folder)}
        task |= {"method": method, "device": arguments.device}
        task |= {"settings": {"compression_ratio": run.ratio, "seed": run.seed}}
        if steps:
            training = {step: str(getattr(arguments, step)) for step in steps}
            training |= {"calibration_samples": arguments.samples, "calibration_length": arguments.length}
            task["training"] = training
        if "distill" in steps:
            task["distill_settings"] = {"steps": arguments.steps, "seed": run.seed}
        return measure.in_fresh_process(benchmark_compress.__file__, task)

    def _measured(self, pair: Pair, source: Path) -> dict[str, Any]:
        task = {"source": str(source), "reference": str(self._reference(pair))}
        return measure.in_fresh_process(__file__, {"measure": task, "device": self._arguments.device})

    def _generated(self, job: Generation, folder: Path) -> dict[str, Any]:
        if job.run is not None:
            made = self._compressed(job.run, folder)
            if "failed" in made:
                return made
        source = {"base": job.pair.base, "finetuned": job.pair.finetuned}.get(job.model, folder)
        task = {"source": str(source), "text": str(self._arguments.text), "count": job.count}
        return measure.in_fresh_process(__file__, {"generate": task, "device": self._arguments.device})

    def _benchmark(self, job: Benchmark, folder: Path) -> dict[str, Any]:
        script = Path(__file__).with_name(f"benchmark_{job.name}.py")
        file = folder / "found.json"
        own = ["--methods", LOADED] if job.name == "load" else ["--method", SERVED]
        command = [sys.executable, script, "--pair", job.pair.base, job.pair.finetuned, *own, "--repeats", "3"]
        done = subprocess.run(
            [*map(str, command), "--ratio", f"{COST_AT:g}", "--work", str(folder), "--json", str(file)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            return {"failed": f"{script.name}: {done.stderr[-500:]}"}
        return {"found": json.loads(file.read_text("utf-8"))}


def introduce(task: dict[str, Any], device: str) -> dict[str, Any]:
    """Run a fine-tune on the records and keep what its logits follow from; return a description of the pair."""
    tokenizer = AutoTokenizer.from_pretrained(task["finetuned"])
    examples = examples_of(read_records(task["text"])[: task["records"]], tokenizer)
    model, load = benchmark_load.load_timed(task["finetuned"], device)
    stored = model.dtype
    weights = dict(model.named_parameters())
    base = dict(AutoModelForCausalLM.from_pretrained(task["base"], dtype=stored).to(device).named_parameters())
    about = {
        "parameters": model.num_parameters(),
        "changed": sum(w.numel() for name, w in weights.items() if not torch.equal(w, base[name])),
        "relative_delta": delta_size(
            *({name: w.detach().float() for name, w in side.items()} for side in (base, weights))
        ),
    }
    del base, weights
    model = model.float().eval()
    reference = Reference.of(model, examples)
    reference.save(Path(task["reference"]), stored)
    return about | {"finetuned": {**_loading(load), **answer_quality(model, reference)}}


def _loading(load: dict[str, float]) -> dict[str, float]:
    return {"load_seconds": load["seconds"], "load_peak": load["peak"]}


def measured(task: dict[str, Any], device: str) -> dict[str, Any]:
    """Load a model, and compare it with a fine-tune."""
    model, load = benchmark_load.load_timed(task["source"], device)
    return _loading(load) | answer_quality(model.float().eval(), Reference.load(Path(task["reference"])))


def generated(task: dict[str, Any], device: str) -> dict[str, Any]:
    """Let a model generate answers."""
    tokenizer = AutoTokenizer.from_pretrained(task["source"])
    model, _ = benchmark_load.load_timed(task["source"], device)
    records = read_records(task["text"])[: task["count"]]
    share = exact_matches(model.float().eval(), tokenizer, records) / len(records)
    return {"exact_match": share, "exact_match_error": binomial_error(share, len(records))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="real_results.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "work", type=Path, nargs="?", help="folder with base/ and the fine-tunes, as real_pair.py makes it"
    )
    parser.add_argument("--text", type=Path, help="records to measure on, which no fine-tune was trained on")
    parser.add_argument("--calibration", type=Path, help="calibration text for methods written as METHOD+calibration")
    parser.add_argument(
        "--distill", type=Path, help="distillation text for METHOD+distill (default: that of --calibration)"
    )
    parser.add_argument("--pairs", type=comma_separated(str), default=list(PAIRS), help="folders of the fine-tunes")
    parser.add_argument(
        "--methods", type=comma_separated(str), help="methods, comma-separated (default: all; with text if it is given)"
    )
    parser.add_argument("--ratios", type=comma_separated(float), default=list(RATIOS))
    parser.add_argument("--seeds", type=comma_separated(int), default=[0], help="for the methods that draw at random")
    parser.add_argument("--records", type=int, default=60, help="records to measure on (default: 60, 8,000 tokens)")
    parser.add_argument("--samples", type=int, default=128, help="sequences for calibration and distillation")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default: 256)")
    parser.add_argument("--steps", type=int, default=60, help="distillation steps (default: 60)")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="also let models generate N answers")
    parser.add_argument(
        "--generated", type=comma_separated(str), default=["impart-rd@32", "impart-rd@128"], metavar="METHOD@RATIO,…",
        help="the deltas that generate, beside base and fine-tune",
    )  # fmt: skip
    parser.add_argument(
        "--benchmarks", type=comma_separated(str), default=["load", *(["serving"] if find_spec("vllm") else [])],
        help="other benchmarks for the first pair: load, serving, or none (default: those that are possible)",
    )  # fmt: skip
    parser.add_argument("--renew", action="store_true", help="run again what earlier code has measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", type=Path, help="folder for results.jsonl and the fine-tunes' logits (default: WORK)"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, only write the report")
    parser.add_argument(
        "--checkout", type=Path, default=Path(__file__).resolve().parents[1], metavar="FOLDER",
        help="where README.md and docs/results.md are (default: this checkout)",
    )  # fmt: skip
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    if arguments.worker:
        task = json.loads(arguments.worker)
        work = {"introduce": introduce, "measure": measured, "generate": generated}
        ((name, own),) = ((name, own) for name, own in task.items() if name in work)
        measure.report_result(work[name](own, task["device"]))
        return 0
    if arguments.work is None:
        parser.error("WORK is missing: the folder that real_pair.py has made")
    folder = arguments.output or arguments.work
    path = folder / "results.jsonl"
    try:
        if not arguments.report:
            _run(arguments, folder, path)
        elif path.exists():
            for line in write_report(read_lines(path), arguments.checkout):
                print(f"measured with earlier code, --renew measures it again: {line}", file=sys.stderr)
        else:
            raise ValueError(f"there is no {path}: run the study first")
    except (ValueError, OSError) as error:
        print(f"real_results.py: error: {error}", file=sys.stderr)
        return 1
    told = f"report: README.md and docs in {arguments.checkout}" if arguments.report else "--report writes the tables"
    print(f"results: {path}; {told}", file=sys.stderr)
    return 0


def _run(arguments: argparse.Namespace, folder: Path, path: Path) -> None:
    _check(arguments)
    pairs = [Pair(name, arguments.work / "base", arguments.work / name) for name in arguments.pairs]
    for model in {pair.base for pair in pairs} | {pair.finetuned for pair in pairs}:
        if not (model / "config.json").exists():
            raise ValueError(f"there is no model in {model}: make it with real_pair.py, or leave it out of --pairs")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("records", "samples", "length", "steps")}
    results = Log(path, settings | {"text": arguments.text.name}, "--output")
    study = Study(results, arguments, folder)
    todo = [
        job
        for job in jobs(pairs, arguments)
        if not results.has(job.key | ({"code": code_digest(job.made_by)} if arguments.renew else {}))
    ]
    for number, job in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {' '.join(map(str, job.key.values()))}: ", file=sys.stderr, end="", flush=True)
        print(study.do(job), file=sys.stderr, flush=True)


def _check(arguments: argparse.Namespace) -> None:
    """Complete the arguments; raise ValueError for those that nothing can be run with."""
    arguments.distill = arguments.distill or arguments.calibration
    if arguments.text is None:
        raise ValueError("--text is missing: records to measure on")
    for text in filter(None, (arguments.text, arguments.calibration, arguments.distill)):
        if not text.is_file():
            raise ValueError(f"there is no text {text}")
    if arguments.methods is None:
        arguments.methods = [*METHODS, *(WITH_TEXT if arguments.calibration else ())]
    for name in arguments.methods:
        parts_of(name, vars(arguments))
    if strange := sorted({*arguments.benchmarks} - {"load", "serving", "none"}):
        raise ValueError(f"--benchmarks {strange[0]}: choose load, serving or none")
    arguments.benchmarks = [name for name in arguments.benchmarks if name != "none"]
    for model in arguments.generated:
        method, _, ratio = model.partition("@")
        if method not in method_names() or not ratio.replace(".", "", 1).isdigit():
            raise ValueError(f"--generated {model}: give METHOD@RATIO, for example impart-rd@32")


if __name__ == "__main__":
    sys.exit(main())
