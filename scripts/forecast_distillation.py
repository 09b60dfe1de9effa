"""What distillation of 7B, 13B and 70B takes, by the model of memory in impart_hf/distillation/memory.py.

    python scripts/forecast_distillation.py
    python scripts/forecast_distillation.py --config meta-llama/Llama-3.1-8B --ratio 64

No weights are read. Prints a Markdown table: bytes on the device with one sequence at a time in bfloat16 and layers run
again in the backward pass; in the host's memory; on disk.
"""

import argparse

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from impart_hf.common.meta_model import meta_model
from impart_hf.distillation import OPTIMIZERS, DistillSettings
from impart_hf.distillation.memory import VALUES_PER_BYTE, DeltaSize, DistillationMemory
from impart_hf.modeling.width_codes import BITS

ONE_BIT = next(width for width, bits in BITS.items() if bits == 1)
# Most matrices of impart-rd have a few columns from which entries are dropped: the positions of all are kept then.
KEEP_RATIO = 0.97

SHAPES = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}


def llama(hidden: int, intermediate: int, layers: int, heads: int, groups: int) -> LlamaConfig:
    """Return the configuration of a LLaMA 2 of these shapes."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
    )


def delta_sizes(config: PreTrainedConfig, ratio: float) -> dict[str, list[DeltaSize]]:
    """Return the deltas that impart-rd would store at a ratio, for every matrix of a model."""
    return {
        name: [DeltaSize.factored(p.shape, 2 * p.numel() / ratio * VALUES_PER_BYTE["impart-rd"], ONE_BIT, KEEP_RATIO)]
        for name, p in meta_model(config).named_parameters()
        if p.dim() == 2
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="local folder or Hub id of a model, instead of the three sizes")
    parser.add_argument("--ratio", type=float, default=32)
    parser.add_argument("--sequences", type=int, default=128, help="sequences of the text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    options = parser.parse_args()
    configs: dict[str, PreTrainedConfig] = {name: llama(*shape) for name, shape in SHAPES.items()}
    if options.config:
        configs = {options.config: AutoConfig.from_pretrained(options.config)}
    print("| model | trains | optim | weights | trained numbers | step | device | host | disk |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|")
    for name, config in configs.items():
        deltas = delta_sizes(config, options.ratio)
        for blocks in (None, 1):
            for optim in OPTIMIZERS:
                settings = DistillSettings(blocks=blocks, optim=optim)
                memory = DistillationMemory(
                    config, deltas, settings, bf16=True, tokens=(options.sequences, options.length)
                )
                found = memory.forecast(1, gradient_checkpointing=True)
                sizes = (found.weights, found.state, found.step, found.device, found.host, found.disk)
                cells = " | ".join(f"{size / 1e9:.1f} GB" for size in sizes)
                print(f"| {name} | {'all layers' if blocks is None else 'a layer'} | `{optim}` | {cells} |", flush=True)


if __name__ == "__main__":
    main()
