"""What a command imports before it has anything to compute; seconds of processor time hang on it."""

import subprocess
import sys

import pytest

from impart_hf.cli.main import COMMANDS, Group

HEAVY = ("torch", "transformers", "huggingface_hub", "accelerate", "datasets")
WRITER = ("compression", "coding", "methods", "storage", "merging", "pruning", "distillation", "training", "cli")
EVERY = [
    *([name] for name, entry in COMMANDS.items()),
    *([name, below] for name, entry in COMMANDS.items() if isinstance(entry, Group) for below in entry.commands),
]


def imported(program: str) -> set[str]:
    """The modules that a program has imported at its end, whatever it exits with."""
    ending = "import atexit, sys; atexit.register(lambda: print('imported', *sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{ending}\n{program}"], capture_output=True, text=True, timeout=300)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("imported "))
    assert "Traceback" not in done.stderr, done.stderr
    return set(line.split()[1:])


def command(*arguments: str) -> str:
    """A program that runs `impart-hf` as its console script does."""
    return f"sys.argv = {['impart-hf', *arguments]!r}\nfrom impart_hf.cli.main import main\nsys.exit(main())"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([*names, "--help"] for names in EVERY),
        ["no-such-command"],
        ["compress", "base", "finetuned", "out", "--no-such-option"],
        ["compress", "base"],
        ["compress", "base", "finetuned", "out", "--method", "dare", "--beta", "0.5"],
        ["compress", "base", "finetuned", "out", "--steps", "5"],
        ["evaluate", "model", "--repeats", "5"],
        ["merge", "no-such.yaml", "out"],
        ["prune", "recover", "model", "out", "--data", "text", "--full", "--rank", "8"],
    ],
    ids=" ".join,
)
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    found = imported(command(*arguments))
    assert "impart_hf.cli.main" in found
    assert not found & set(HEAVY)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--list"], ["impart-merging", "--list"], ["no-such-table"]], ids=" ".join
)
def test_lists_and_errors_of_the_papers_tables_import_nothing_heavy(arguments: list[str]) -> None:
    program = f"sys.argv = {['impart-hf-reproduce', *arguments]!r}\nfrom impart_hf.reproduce.main import main\n"
    found = imported(program + "sys.exit(main())")
    assert "impart_hf.reproduce.main" in found
    assert not found & set(HEAVY)


def test_help_of_all_imports_no_command() -> None:
    found = {name for name in imported(command("--help")) if name.startswith("impart_hf.")}
    assert {name for name in found if name.startswith("impart_hf.cli.")} == {"impart_hf.cli.main"}
    assert {name.split(".")[1] for name in found} == {"cli", "common", "registration"}


def test_the_methods_and_their_settings_need_no_torch() -> None:
    found = imported("sys.argv[0] = 'impart-hf'\nimport impart_hf\nimpart_hf.ImPartRdConfig(drop_weight=2.0)")
    assert "impart_hf.methods.bitdelta" in found and not found & set(HEAVY)


def test_registering_the_classes_imports_no_writer() -> None:
    """As every process of vLLM does."""
    program = (
        "import impart_hf, impart_hf.serving.plugin, impart_hf.serving.model_classes\n"
        "from transformers import AutoConfig\nAutoConfig.for_model('delta_compressed')"
    )
    found = {name.split(".")[1] for name in imported(program) if name.startswith("impart_hf.")}
    assert "modeling" in found and not found & set(WRITER)
