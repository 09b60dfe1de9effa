"""What an adapter holds of a delta and what it lacks, and the adapter's model card."""

from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..common.names import is_on_hub, public_name
from ..modeling.delta_repository import DeltaRepository


@dataclass(frozen=True)
class LoraMatrix:
    """One matrix of the adapter, or the stack of a layer's experts.

    Attributes:
        name: name of the fine-tuned tensor, or of the parameter if several tensors make it.
        rank: components that are kept.
        norm: Frobenius norm of its delta.
        relative_error: norm of delta minus adapter, over `norm`; includes the rounding of the factors.
    """

    name: str
    rank: int
    norm: float
    relative_error: float


@dataclass(frozen=True)
class LoraValidation:
    """How far the adapter is from the delta on a text.

    Attributes:
        kl: KL(delta || base with adapter), nats per token.
        base_kl: KL(delta || base), for comparison.
        tokens: number of tokens.
    """

    kl: float
    base_kl: float
    tokens: int


@dataclass
class LoraReport:
    """What an adapter contains of a delta, and what it lacks.

    Attributes:
        rank: the largest rank, which engines must allow.
        adapter_bytes: bytes of the adapter's tensors.
        matrices: the matrices in the adapter.
        left_out: by tensor name, norms of the deltas that are not in the adapter; of added rows, where the tensor's
            other rows are.
        validation: on a text, if one was given.
    """

    rank: int
    adapter_bytes: int = 0
    matrices: list[LoraMatrix] = field(default_factory=list)
    left_out: dict[str, float] = field(default_factory=dict)
    validation: LoraValidation | None = None

    @property
    def relative_error(self) -> float:
        """Relative error over all the adapter's matrices: root of the summed squared errors, over that of the norms."""
        lost = sum((matrix.norm * matrix.relative_error) ** 2 for matrix in self.matrices)
        all_of_it = sum(matrix.norm**2 for matrix in self.matrices)
        return (lost / all_of_it) ** 0.5 if all_of_it else 0.0

    @property
    def left_out_share(self) -> float:
        """Share of the whole delta's squared norm that is in tensors outside the adapter."""
        left = sum(norm**2 for norm in self.left_out.values())
        all_of_it = left + sum(matrix.norm**2 for matrix in self.matrices)
        return left / all_of_it if all_of_it else 0.0

    @property
    def ranks(self) -> str:
        """The matrices' ranks in words: one number, or the least and the largest."""
        ranks = {matrix.rank for matrix in self.matrices}
        return str(self.rank) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "relative_error": self.relative_error, "left_out_share": self.left_out_share}


# Ranks that vLLM takes as --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def adapter_card(repository: DeltaRepository, report: LoraReport) -> str:
    """Return the adapter's README.md."""
    base = repository.config.base_model_name_or_path
    on_hub = is_on_hub(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "impart-hf"],
    )
    template = resources.files("impart_hf.model_cards").joinpath("lora_adapter.md").read_text("utf-8")
    return (
        str(
            ModelCard.from_template(
                data,
                template_str=template,
                base=base if on_hub else Path(base).name,
                base_revision=repository.config.base_model_revision or "",
                source=public_name(repository.source),
                ranks=report.ranks,
                slot=min((rank for rank in _VLLM_RANKS if rank >= report.rank), default=0),
                matrices=len(report.matrices),
                error=f"{report.relative_error:.3f}",
                share=f"{report.left_out_share:.1%}",
                left_out=len(report.left_out),
                validation=report.validation,
            )
        )
        + "\n"
    )
