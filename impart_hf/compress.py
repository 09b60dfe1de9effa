"""The pipeline: base and fine-tuned model in, delta repository out, one tensor at a time."""

import hashlib
import os
import time
from pathlib import Path

import torch

from .methods import Encoded, ImPartConfig, MethodConfig, method_for
from .methods.records import empty_record
from .modeling.checkpoints import Checkpoint, HubOptions
from .plan import TensorPlan, check_pair, make_plan, scan
from .progress import Progress
from .report import CompressionReport
from .repository import RepositoryWriter, describe_base
from .safetensors_writer import shard_bytes
from .workspace import Workspace

# Squares of smaller numbers vanish in float32: such a delta has no norm, and moves no model.
_NOTHING = 1e-15


def compress(
    base: str,
    finetuned: str,
    output_dir: str | Path,
    method: MethodConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    base_name: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> CompressionReport:
    """Compress a fine-tuned model to a delta repository against its base.

    Both models are read tensor by tensor and never held as a whole. Work in progress is kept in a hidden folder beside
    `output_dir`, one file a tensor: a run that was killed goes on where it stopped and gives the same bytes as an
    unbroken one. `output_dir` appears, complete, at the end.

    Args:
        base: local folder or Hub id of the base model.
        finetuned: local folder or Hub id of the fine-tuned model.
        output_dir: where the repository goes; must not exist, be empty, or hold a delta repository, which is replaced.
        method: a method's configuration; ImPart at ratio 32 if None.
        device: where matrices are decomposed, such as "cuda".
        base_revision: branch, tag or commit of the base on the Hub.
        finetuned_revision: the same of the fine-tuned model.
        base_name: the id to record for the base, if it was given as a local folder but lives on the Hub.
        token, cache_dir: as for any download from the Hub.
        max_shard_size: a delta file larger than this is split.
        progress: show progress bars.

    Returns:
        What became of every tensor, the bytes, and whether the requested ratio was met.

    Raises:
        CheckpointError: if one of the models cannot be read.
        IncompatibleModelsError: if they are not a pair, or hold NaN or infinity.
        ValueError: if the method's ratio cannot be reached, or a device or size is none that can be used.
        OutputError: if `output_dir` holds something else, is being written by another process, or the disk is full.
    """
    method = method if method is not None else ImPartConfig()
    if not isinstance(method, MethodConfig):
        raise TypeError(f"method must be a method's configuration such as ImPartConfig(), got {method!r}")
    base, finetuned, shard_size = os.fspath(base), os.fspath(finetuned), shard_bytes(max_shard_size)
    started = time.perf_counter()
    device = usable_device(device)
    bars = Progress(progress)
    output = Path(output_dir)
    with Workspace(output) as workspace:
        base_options = HubOptions(base_revision, token, cache_dir)
        model_options = HubOptions(finetuned_revision, token, cache_dir)
        model = Checkpoint(finetuned, model_options)
        base_model = Checkpoint(base, base_options, tied=model.tied)
        check_pair(base_model, model)
        tensors = scan(base_model, model, bars)
        writer = RepositoryWriter(
            base=describe_base(base, base_options, base_name),
            finetuned=finetuned,
            finetuned_options=model_options,
            model=model,
            method=method,
            tensors=tensors,
            max_shard_size=shard_size,
        )
        plan = make_plan(tensors, method, model.weight_bytes, writer.text_bytes(), shard_size)
        workspace.begin(plan.fingerprint(method), plan.allowed_bytes + plan.fixed_bytes)
        encoded = [t for t in plan.tensors if t.kind == "encoded"]
        done, written = 0, 0
        with bars.bar(sum(t.dense_bytes for t in encoded), "Compressing") as bar:
            for tensor in encoded:
                bar.set_postfix_str(f"{tensor.name} {done / written:.1f}x" if written else tensor.name)
                if not workspace.has_record(tensor.name):
                    data, notes = encode_tensor(tensor, base_model, model, method, device)
                    workspace.put_record(tensor.name, data, notes)
                done += tensor.dense_bytes
                written += workspace.record_path(tensor.name).stat().st_size
                bar.update(tensor.dense_bytes)
        plan.settle(written, method.compression_ratio)
        report = writer.write(workspace, plan, time.perf_counter() - started)
        workspace.publish()
    return report


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: if it has not.
    """
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from error
    return usable


def encode_tensor(
    tensor: TensorPlan, base: Checkpoint, finetuned: Checkpoint, method: MethodConfig, device: torch.device
) -> tuple[bytes, list[str]]:
    """The records of one tensor, and the notes of its method.

    A stack of matrices gives a record for each, every one with the same share of the budget.
    """
    before = base.tensor(tensor.name)
    after = finetuned.tensor(tensor.name)[: before.shape[0]]
    stack = (-1, *tensor.shape[-2:])
    encoder = method_for(method, tensor.vocabulary)
    records, notes = [], []
    for number, (old, new) in enumerate(zip(before.reshape(stack), after.reshape(stack), strict=True)):
        delta = new.to(device, torch.float32) - old.to(device, torch.float32)
        seed = mask_seed(method.seed, tensor.name, number)
        if delta.abs().max() > _NOTHING:
            encoded = encoder.encode(delta, tensor.max_bytes // tensor.matrices, seed)
        else:
            encoded = Encoded(empty_record(*tensor.shape[-2:]))
        records.append(encoded.data)
        notes += [note for note in encoded.notes if note not in notes]
    return b"".join(records), notes


def mask_seed(seed: int, name: str, number: int) -> int:
    """The 32-bit mask seed of a matrix: each matrix of a model gets masks of its own from the user's one seed.

    Args:
        seed: the method's seed.
        name: the tensor's name.
        number: of the matrix in its stack; 0 for a plain matrix.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}:{number}".encode()).digest()[:4], "little")
