"""What the benchmark of tenants serves and asks: a base, a delta and an adapter for every tenant, prompts and answers.

Everything is made below one folder when it is first needed, and used again after that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pair_text
import pair_training
import torch
from tenant_load import Expected
from train_pair import FINETUNE_HELDOUT, FINETUNE_TRAIN, PairSettings, train_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from impart_hf import compress
from impart_hf.calibration.text import calibration_tokens
from impart_hf.cli.main import main as impart_hf
from impart_hf.methods import method_class

CHAT_TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MOST_TENANTS = 10  # the text of the small pair's fine-tune is cut into so many parts
_STEPS, _RATE = 60, 1e-3  # of every further fine-tune of the small base
_WIDER = 1.25  # a fine-tune's second delta has a ratio so many times as large, and so on
_SMALLEST_MARGIN = 1e-3  # between the two highest logits; batches of other sizes add in another order


@dataclass(frozen=True)
class Tenant:
    """A tenant's name and its delta repository."""

    name: str
    delta: Path


@dataclass(frozen=True)
class Models:
    """A base and its tenants.

    Attributes:
        text: a file of text to take prompts from, or a name that `calibration_tokens` knows.
    """

    base: Path
    tenants: list[Tenant]
    text: str


def small_models(work: Path, count: int, settings: PairSettings | None = None) -> tuple[Path, list[Path]]:
    """Return a small base and fine-tunes of it, trained if they are not there; each has a chat template.

    Args:
        work: folder for them.
        count: number of fine-tunes.
        settings: of the pair; the `demo` preset if None.

    Raises:
        ValueError: if there is not text enough for so many.
    """
    if count > MOST_TENANTS:
        raise ValueError(f"the small model has at most {MOST_TENANTS} fine-tunes: give others with --finetuned")
    pair, settings = work / "pair", settings or PairSettings(answers=0)
    train_pair(pair, settings)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pair / "base")
    documents = pair_text.read_documents([pair / FINETUNE_TRAIN])
    passages = [passage for text in documents for passage in text.split("\n\n")]
    share = len(passages) // MOST_TENANTS
    found = []
    for number in range(count):
        folder = work / "finetuned" / f"t{number}"
        if not folder.exists():
            own = passages[number * share : (number + 1) * share]
            blocks = pair_text.training_blocks(tokenizer, own, settings.sequence_length, settings.batch_size)
            with pair_training.quiet():
                model = LlamaForCausalLM.from_pretrained(pair / "base", dtype=torch.float32)
                pair_training.train(
                    model, blocks, folder.name, steps=min(_STEPS, settings.finetune_steps or _STEPS), minutes=None,
                    lr=_RATE, batch_size=settings.batch_size, seed=number,
                )  # fmt: skip
                model.bfloat16()
                _save(model, tokenizer, folder)
        found.append(folder)
    (pair / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return pair / "base", found


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model; the folder has its name when it is complete."""
    unfinished = folder.with_name(f"{folder.name}.new")
    model.save_pretrained(unfinished)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def make_tenants(
    work: Path, base: Path, finetuned: Sequence[Path], count: int, method: str, ratio: float
) -> list[Tenant]:
    """Return tenants, the fine-tunes in turn; their deltas are compressed if they are not there.

    Further deltas of a fine-tune have other seeds and larger ratios, so that no two are the same.
    """
    found = []
    for number in range(count):
        tuned, turn = finetuned[number % len(finetuned)], number // len(finetuned)
        delta = work / "deltas" / f"{tuned.name}-{method}-{ratio:g}-{turn}"
        if not delta.exists():
            print(f"compressing {delta.name}", flush=True)
            settings = method_class(method)(compression_ratio=ratio * _WIDER**turn, seed=turn)
            compress(str(base), str(tuned), delta, settings)
        found.append(Tenant(f"t{number}", delta))
    return found


def make_adapters(work: Path, tenants: Iterable[Tenant], rank: int) -> list[Path]:
    """Return a LoRA adapter of every tenant's delta, exported if it is not there.

    Raises:
        ValueError: if one cannot be exported.
    """
    found = []
    for tenant in tenants:
        adapter = work / "adapters" / f"{tenant.delta.name}-{rank}"
        if not adapter.exists() and impart_hf(["export-lora", str(tenant.delta), str(adapter), "--rank", str(rank)]):
            raise ValueError(f"{tenant.delta} has no adapter of rank {rank}")
        found.append(adapter)
    return found


def small_text(work: Path) -> str:
    """Return text that no fine-tune of the small base was trained on."""
    return str(work / "pair" / FINETUNE_HELDOUT)


def prompts_of(models: Models, count: int, tokens: int, seed: int) -> list[str]:
    """Return prompts: pieces of the text, of so many tokens or, where the text has no more, fewer.

    Pieces that begin or end inside a character are left out: vLLM's answers would begin with the prompt's end.

    Raises:
        ValueError: if the text is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    length = tokens + 1  # with the token in front of each sequence
    rows = calibration_tokens(models.text, tokenizer, samples=count, length=length, seed=seed)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return list(dict.fromkeys(text for text in texts if text.strip() and "\ufffd" not in text))


def has_chat(models: Models) -> bool:
    """Return whether the base's tokenizer has a chat template."""
    return bool(AutoTokenizer.from_pretrained(models.base).chat_template)


def expected_answers(
    models: Models, prompts: Sequence[str], tokens: int, chat: bool, enough: int
) -> tuple[list[str], dict[tuple[int, int, bool], Expected]]:
    """Return prompts for a check, and what transformers answers to each with each tenant's delta, greedily in float32.

    A prompt is left out if a token of an answer is hardly more likely than another one, or if two of its answers are
    the same.

    Args:
        chat: whether prompts are also asked as chats.
        enough: the number of prompts that is looked for.

    Returns:
        The prompts, and answers by tenant, prompt and whether it is a chat.

    Raises:
        ValueError: if no prompt is left.
    """
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    loaded = [
        AutoModelForCausalLM.from_pretrained(tenant.delta).float().eval()  # the stored values, as the server has them
        for tenant in models.tenants
    ]
    kept: list[str] = []
    found: dict[tuple[int, int, bool], Expected] = {}
    for prompt in prompts:
        kinds = [(False, tokenizer(prompt).input_ids)]
        if chat:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            kinds.append((True, tokenizer(text, add_special_tokens=False).input_ids))
        own: dict[tuple[int, int, bool], Expected] = {}
        for (kind, ids), (number, model) in itertools.product(kinds, enumerate(loaded)):
            answer = _certain_answer(model, ids, tokens)
            if answer is None or any(answer == other.ids for other in own.values()):
                break
            said = str(tokenizer.decode(answer, skip_special_tokens=True))
            own[number, len(kept), kind] = Expected(answer, None if "\ufffd" in said else said)
        else:
            found |= own
            kept.append(prompt)
        if len(kept) == enough:
            break
    if not kept:
        raise ValueError("no prompt tells the tenants apart with certainty: give longer answers or another --text")
    return kept, found


@torch.inference_mode()
def _certain_answer(model: Any, ids: list[int], tokens: int) -> list[int] | None:
    """Return the tokens of a greedy answer; None if one of them is not certain."""
    prompt = torch.tensor([ids])
    model.generation_config.eos_token_id = None  # it goes on, as the server is told to
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    highest = torch.cat(output.logits).topk(2).values
    if (highest[:, 0] - highest[:, 1]).min() < _SMALLEST_MARGIN:
        return None
    return output.sequences[0, len(ids) :].tolist()
