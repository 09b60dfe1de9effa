"""How far a model's answers to records are from the fine-tune's: divergence, agreement and scores on answers alone.

The fine-tune is run once. What is kept of it are its last hidden states, in float32, and its output projection as the
checkpoint has it: logits follow from them as in the model. So a divergence has the rounding of float32 arithmetic
only, which the tests hold against float64. Rounding log-probabilities themselves to 16 bits would move each by up to
1e-3, where divergences of 5e-5 are to be told apart, and in float32 they take 8 GB for 8,000 tokens of a vocabulary of
262,144.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from question_answers import Record, Tokens, generated, tokens_of
from safetensors.torch import load_file, save_file
from torch.nn import functional

from impart_hf.common.token_losses import cross_entropy, kl_divergence

_MARK = "####"  # before the last line of an answer in GSM8K
_NUMBER = re.compile(rf"{_MARK}\s*(\S+)")


@dataclass(frozen=True)
class Example:
    """A record's tokens.

    Attributes:
        final: how many tokens at the end are the answer's last number and the end-of-text token; 0 without such a
            number.
    """

    tokens: Tokens
    final: int


def examples_of(records: Sequence[Record], tokenizer: Any) -> list[Example]:
    """Return the examples of records; the tokenizer must be able to tell where in the text its tokens are."""
    return [Example(tokens_of(record, tokenizer), _final_tokens(record.answer, tokenizer)) for record in records]


def _final_tokens(answer: str, tokenizer: Any) -> int:
    match = _NUMBER.search(answer)
    if match is None:
        return 0
    spans = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return 1 + sum(end > match.start(1) for _, end in spans)


@dataclass(frozen=True)
class Reference:
    """What is kept of a fine-tune.

    Attributes:
        examples: what it was run on.
        states: float32 (answer tokens of all examples, hidden size): each predicts an answer's next token.
        head: (vocabulary, hidden size), the output projection.
    """

    examples: list[Example]
    states: torch.Tensor
    head: torch.Tensor

    @classmethod
    def of(cls, model: Any, examples: list[Example]) -> Reference:
        """Run a fine-tune, in float32.

        Raises:
            ValueError: if its logits are not its output projection's alone.
        """
        head = model.get_output_embeddings().weight.detach()
        ids = examples[0].tokens.ids[:8].to(model.device)
        with torch.inference_mode():
            whole = model(input_ids=ids[None], use_cache=False).logits[0]
            if not torch.allclose(whole, functional.linear(_states(model, ids), head), rtol=1e-3, atol=1e-3):
                raise ValueError(f"{type(model).__name__}: logits are more than the output projection's")
            states = torch.cat([_answer_states(model, example) for example in examples])
        return cls(examples, states.cpu(), head.cpu())

    def save(self, path: Path, dtype: torch.dtype) -> None:
        """Write it whole or not at all.

        Args:
            dtype: that of the checkpoint, in which the projection is exact.
        """
        lengths = [(len(one.tokens.ids), one.tokens.prompt, one.final) for one in self.examples]
        ids = torch.cat([one.tokens.ids for one in self.examples])
        tensors = {"states": self.states, "head": self.head.to(dtype), "ids": ids, "lengths": torch.tensor(lengths)}
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished)
        unfinished.rename(path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` has written; the projection in float32."""
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        ids = tensors["ids"].split([length for length, _, _ in lengths])
        examples = [Example(Tokens(own, prompt), final) for own, (_, prompt, final) in zip(ids, lengths, strict=True)]
        return cls(examples, tensors["states"], tensors["head"].float())


def _states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states (tokens, hidden size)."""
    return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def _answer_states(model: Any, example: Example) -> torch.Tensor:
    return _states(model, example.tokens.ids.to(model.device))[example.tokens.prompt - 1 : -1]


@torch.inference_mode()
def answer_quality(model: Any, reference: Reference) -> dict[str, float]:
    """Compare a model with a fine-tune on answers. One record is run at a time, so nothing is padded.

    Args:
        model: in float32.

    Returns:
        kl: KL(fine-tune || model), nats per answer token, with kl_error, its standard error over records.
        cross_entropy: of the answers, nats per token.
        agreement: share of answer tokens for which the model's most likely token is the fine-tune's.
        final_answer: share of the records with a last number in which each of its tokens, and the end after it, is the
            model's most likely one, given the question and the steps before; with final_answer_error, the binomial
            standard error. NaN without such records.
        records, tokens: how many were compared.
    """
    head, device = model.get_output_embeddings().weight, model.device
    wanted_head = reference.head.to(device)
    divergences, counts, loss, same, right = [], [], 0.0, 0, []
    for example, states in zip(reference.examples, reference.states.split(_answers(reference)), strict=True):
        targets = example.tokens.ids[example.tokens.prompt :].to(device)
        wanted = functional.linear(states.to(device), wanted_head)
        found = functional.linear(_answer_states(model, example), head)
        divergences.append(kl_divergence(wanted, found).item())
        loss += cross_entropy(found, targets).item()
        likely = found.argmax(-1)
        same += int((likely == wanted.argmax(-1)).sum())
        counts.append(len(targets))
        if example.final:
            right.append(bool((likely == targets)[-example.final :].all()))
    tokens, kl = sum(counts), sum(divergences) / sum(counts)
    share = sum(right) / len(right) if right else math.nan
    squares = sum((divergence - kl * count) ** 2 for divergence, count in zip(divergences, counts, strict=True))
    return {
        "kl": kl,
        "kl_error": math.sqrt(squares) / tokens,
        "cross_entropy": loss / tokens,
        "agreement": same / tokens,
        "final_answer": share,
        "final_answer_error": binomial_error(share, len(right)),
        "records": len(counts),
        "tokens": tokens,
    }


def _answers(reference: Reference) -> list[int]:
    return [len(example.tokens.ids) - example.tokens.prompt for example in reference.examples]


def binomial_error(share: float, count: int) -> float:
    """Return the standard error of a share of `count` independent cases."""
    return math.sqrt(share * (1 - share) / count) if count else math.nan


@torch.inference_mode()
def exact_matches(
    model: Any, tokenizer: Any, records: Sequence[Record], *, batch_size: int = 8, new_tokens: int = 256
) -> int:
    """Return for how many records the number after `####` is the reference's when the answer is generated greedily.

    Args:
        tokenizer: one with a begin-of-text token, which is put in front as in training.
        batch_size: answers generated at a time, padded on the left.
        new_tokens: the longest answer.
    """
    prompts = [record.prompt for record in records]
    answers = generated(model, tokenizer, prompts, new_tokens=new_tokens, batch_size=batch_size)
    numbers = zip(map(_number, answers), (_number(record.answer) for record in records), strict=True)
    return sum(wanted is not None and found == wanted for found, wanted in numbers)


def _number(answer: str) -> str | None:
    """Return the number after `####` without thousands separators; None if there is none."""
    match = _NUMBER.search(answer)
    return match[1].replace(",", "").rstrip(".") if match else None
