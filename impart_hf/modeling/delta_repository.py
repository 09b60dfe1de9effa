"""A delta repository with its base model: the fine-tuned tensors, decoded one at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from .base_tensors import BaseTensors, finite_where_base_is
from .checkpoints import DTYPE_NAMES, SAFETENSORS_DTYPES, Checkpoint, config_fields
from .checksums import tensor_checksum
from .configuration_delta_compressed import DeltaCompressedConfig
from .deferred_tensor import Index, part_ranges
from .delta_chain import BaseModel, DeltaBase, Descent
from .delta_decode import add_delta, add_delta_part
from .delta_file import BASE_CHECKSUMS, DeltaFile, TensorParts, entry_kind, find_delta_files, names_checksum, weight_map
from .delta_record import DeltaFormatError
from .exact_record import restore, stated_checksum
from .model_files import CheckpointError, HubOptions, fetch_config, pinned, repository_kind
from .repository_kind import RepositoryKind, kind_of
from .tensors import LazyTensor
from .transfer import ahead, to_device

# Most bytes of a base tensor that waits on an accelerator: a layer's matrices may, the largest vocabularies' may not.
_MOST_AHEAD = 512 << 20
# To vLLM, what `from_pretrained`'s base_model is: a folder or Hub id of the base, which replaces the recorded one.
BASE_MODEL_VARIABLE = "IMPART_HF_BASE_MODEL"


class WrongBaseError(ValueError):
    """The base model is not the one that the delta was made against."""


class MissingBaseError(CheckpointError):
    """The base of a delta cannot be opened; the message says which."""


def read_config(repo: str, options: HubOptions) -> DeltaCompressedConfig:
    """Read the configuration of a delta repository.

    Raises:
        CheckpointError: if the folder or Hub repository is missing, or not a delta repository.
        DeltaFormatError: if its config.json has invalid fields.
    """
    content, _ = fetch_config(repo, options)
    if kind_of(content) is not RepositoryKind.DELTA:
        raise CheckpointError(
            f"'{repo}' is a '{content.get('model_type')}' model, not a delta repository: check the path"
        )
    try:
        return DeltaCompressedConfig.from_dict(config_fields(content))
    except Exception as error:  # transformers raises many exception types for invalid fields
        raise DeltaFormatError(
            f"config.json of '{repo}' cannot be used, download it again or upgrade transformers: {str(error)[:400]}"
        ) from error


def open_base(
    source: str,
    options: HubOptions,
    tied: bool | None = None,
    first_base: str | None = None,
    descent: Descent | None = None,
) -> BaseModel:
    """Open a base: a checkpoint, or a delta repository and all that it rests on.

    Args:
        source: folder or Hub id.
        options: how its files are found.
        tied: whether the output projection shares the input embeddings; None takes it from config.json.
        first_base: folder or Hub id of a dense model, instead of the one at the end of the chain.
        descent: the repositories that rest on this one.

    Raises:
        CheckpointError, WrongBaseError: if it, or what it rests on, is missing or another.
        DeltaFormatError: if it is damaged, or a delta that no other can rest on.
    """
    options = pinned(source, options)
    config, folder = fetch_config(source, options)
    if kind_of(config) is not RepositoryKind.DELTA:
        return Checkpoint(first_base or source, replace(options, revision=None) if first_base else options, tied)
    repository = DeltaRepository(source, read_config(source, options), options, first_base, descent)
    repository.check_exact()
    return DeltaBase(repository, options, config, folder, tied)


class DeltaRepository:
    """The fine-tuned tensors of a delta repository, decoded with its base, which may be a delta repository itself.

    Attributes:
        source: folder or Hub id of the delta repository.
        config: its configuration.
        text_config: the fine-tuned model's configuration.
        options: how its files are found on the Hub.
        base: the base's tensors, by the names of the fine-tuned ones that rest on them.
        base_checksums: checksums of the whole tensors of the base that the delta was made against, by these names.
        file: the delta file's entries.
    """

    def __init__(
        self,
        source: str,
        config: DeltaCompressedConfig,
        options: HubOptions,
        base_model: str | None = None,
        descent: Descent | None = None,
    ):
        """Open repository and base, reading and comparing headers but no weights.

        Args:
            source: folder or Hub id of the delta repository.
            config: its configuration.
            options: how files are found on the Hub; the revision is the delta repository's.
            base_model: folder or Hub id of the base, instead of the recorded one. If the recorded one is a delta
                repository, a dense model stands for the first base, on which all deltas rest.
            descent: the repositories that rest on this one.

        Raises:
            CheckpointError: if a file or the base is missing or cannot be accessed.
            DeltaFormatError: if the delta file is damaged or does not fit the base's tensors, or if the base is a delta
                that no other can rest on.
            WrongBaseError: if the base has other tensors than the delta was made against.
        """
        self.source, self.config, self.options = source, config, options
        self._descent = (descent or Descent()).to(source, options)
        if not isinstance(config.text_config, PreTrainedConfig) or config.text_config.model_type == config.model_type:
            raise DeltaFormatError(f"config.json of '{source}' has no text_config of a fine-tuned model")
        self.text_config = config.text_config
        paths, index = find_delta_files(source, options)
        self.file = DeltaFile(paths)
        if index and sorted(weight_map(index)) != self.file.names():
            # Without this check, a tensor whose entry is missing would be taken to equal the base's.
            raise DeltaFormatError(f"{index} names other entries than its files hold: download them again")
        self.base = self._open_base(base_model, options)
        self.base_checksums = self._read_checksums()
        self._check_row_counts()
        self.parts = self._match_entries()
        for name, part in self.parts.items():
            self._check_parts(name, part)

    def _open_base(self, base_model: str | None, options: HubOptions) -> BaseTensors:
        source, revision, first_base = self.config.base_model_name_or_path, self.config.base_model_revision, None
        options = replace(options, revision=None, subfolder="")
        try:
            if base_model and self.config.base_is_delta and not _is_delta(base_model, options):
                first_base = base_model
            elif base_model:
                source, revision = base_model, None
            tied = bool(self.config.tie_word_embeddings)
            base = open_base(source, replace(options, revision=revision), tied, first_base, self._descent)
        except MissingBaseError:
            raise
        except CheckpointError as error:
            where = f" at commit {revision}" if revision else ""
            chain = f" (the chain is {self._descent})" if len(self._descent.sources) > 1 else ""
            raise MissingBaseError(
                f"the base model of '{self.source}' ('{source}'{where}){chain} cannot be opened: {error}. "
                "A local copy can be given with base_model= (load_delta: base_files=; commands: --base-model; vLLM: "
                "IMPART_HF_BASE_MODEL)"
            ) from error
        others = self.config.base_tensors or {}
        if missing := sorted(set(others.values()) - set(base.stored_names())):
            raise WrongBaseError(self._other_tensors(base, f": it has no {missing[0]}"))
        return BaseTensors(base, self.config.absent_tensors or (), self.config.row_counts, others)

    def _other_tensors(self, base: BaseTensors | BaseModel, detail: str = "") -> str:
        return (
            f"'{base.source}' is not the base of '{self.source}': it has other tensors than "
            f"'{self.config.base_model_name_or_path}'{self._base_revision()}, which the delta was made against{detail}"
        )

    def _check_row_counts(self) -> None:
        for name, rows in self.base.row_counts.items():
            shape = self.base.checkpoint.shape(self.base.stored_name(name)) if name in self.base_checksums else ()
            if not shape or not 0 <= rows < shape[0]:
                raise DeltaFormatError(
                    f"row_counts in config.json of '{self.source}' gives {name} {rows} rows, which is not a part of a "
                    f"tensor of the base '{self.base.source}'"
                )

    def _match_entries(self) -> dict[str, TensorParts]:
        """Assign the file's entries to fine-tuned tensors, with an error for any that belongs to none."""
        parts = dict.fromkeys(self.base.names(), TensorParts())
        for entry in self.file.names():
            if entry == BASE_CHECKSUMS:
                continue
            name, kind = entry_kind(entry, parts)
            if name not in parts:
                raise DeltaFormatError(f"delta entry {entry} belongs to no tensor of the base '{self.base.source}'")
            dtype = self.file.dtype_name(entry)
            is_coded = kind in ("records", "exact")
            if is_coded and (dtype != "U8" or len(self.file.shape(entry)) != 1):
                raise DeltaFormatError(f"delta entry {entry} must be one-dimensional bytes (U8)")
            if not is_coded and dtype not in SAFETENSORS_DTYPES:
                raise DeltaFormatError(f"delta entry {entry} has the unknown dtype {dtype}")
            is_float = kind == "records" if is_coded else SAFETENSORS_DTYPES[dtype].is_floating_point
            if kind != "exact" and self.base.dtype(name).is_floating_point != is_float:
                raise DeltaFormatError(f"delta entry {entry} does not fit {name}, which is {self.base.dtype(name)}")
            parts[name] = replace(parts[name], **{kind: entry})
        return parts

    def _check_parts(self, name: str, part: TensorParts) -> None:
        base_shape, dtype = self.base.shape(name), self.dtype(name)
        if sum(entry is not None for entry in (part.replacement, part.records, part.exact)) > 1:
            raise DeltaFormatError(f"{name} is replaced, exact or changed by records: the delta file has two of these")
        if part.replacement and self.file.shape(part.replacement) != base_shape:
            raise DeltaFormatError(f"{name} has shape {self.file.shape(part.replacement)}, the base has {base_shape}")
        if part.records and len(base_shape) not in (2, 3):
            raise DeltaFormatError(f"{name} has records, but its shape {base_shape} is not of 2 or 3 axes")
        if part.added_rows:
            rows = self.file.shape(part.added_rows)
            if self.file.dtype_name(part.added_rows) != DTYPE_NAMES[dtype]:
                raise DeltaFormatError(f"the rows added to {name} have another dtype than the tensor, {dtype}")
            if len(base_shape) not in (1, 2) or len(rows) != len(base_shape) or rows[1:] != base_shape[1:]:
                raise DeltaFormatError(f"rows of shape {rows} cannot be added to {name}, the base has {base_shape}")

    def _read_checksums(self) -> dict[str, int]:
        names = self.base.names()
        if (
            BASE_CHECKSUMS not in self.file
            or self.file.dtype_name(BASE_CHECKSUMS) != "U64"
            or len(self.file.shape(BASE_CHECKSUMS)) != 1
        ):
            raise DeltaFormatError(f"the delta file of '{self.source}' has no checksums of its base")
        table = self.file.read(BASE_CHECKSUMS).tolist()
        if len(table) != len(names) + 1 or table[-1] != names_checksum(names):
            raise WrongBaseError(self._other_tensors(self.base))
        return dict(zip(names, table, strict=False))

    def _base_revision(self) -> str:
        revision = self.config.base_model_revision
        return f" at commit {revision}" if revision else ""

    @property
    def chain(self) -> "list[DeltaRepository]":
        """This repository and those that it rests on, down to the one whose base is dense."""
        below = self.base.checkpoint
        return [self, *(below.repository.chain if isinstance(below, DeltaBase) else [])]

    def check_exact(self) -> None:
        """Check that all readers decode the same bits, so that another delta can rest on this one.

        Raises:
            DeltaFormatError: if not.
        """
        if lossy := sorted(name for name, part in self.parts.items() if part.records):
            raise DeltaFormatError(
                f"the delta '{self.source}' cannot be the base of another: it stores {lossy[0]} "
                f"({len(lossy)} tensors in all) approximately, and readers may round the last bit differently. "
                "Compress it again with --method exact, or make it dense with `impart-hf reconstruct`"
            )

    def names(self) -> list[str]:
        """Return the names of the fine-tuned tensors, sorted."""
        return self.base.names()

    def is_changed(self, name: str) -> bool:
        """Return whether the delta file has an entry for a tensor."""
        return self.parts[name] != TensorParts()

    def shape(self, name: str) -> tuple[int, ...]:
        shape, rows = self.base.shape(name), self.parts[name].added_rows
        return (shape[0] + self.file.shape(rows)[0], *shape[1:]) if rows else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the fine-tuned tensor was published."""
        if replacement := self.parts[name].replacement:
            return SAFETENSORS_DTYPES[self.file.dtype_name(replacement)]
        if not self.base.dtype(name).is_floating_point:
            return self.base.dtype(name)
        stated = (self.config.tensor_dtype_exceptions or {}).get(name, self.config.tensor_dtype)
        dtype = getattr(torch, stated, None)
        if dtype not in DTYPE_NAMES or not dtype.is_floating_point:
            raise DeltaFormatError(f"config.json states the unknown dtype '{stated}' for {name}")
        return dtype

    def base_tensor(self, name: str) -> torch.Tensor:
        """Return the part of the base's tensor that base and fine-tune share, on the CPU, after checking its checksum.

        Raises:
            WrongBaseError: if it is not the tensor that the delta was made against.
        """
        tensor, checksum = self.base.whole_and_checksum(name)
        if checksum != self.base_checksums[name]:
            raise WrongBaseError(
                f"'{self.base.source}' is not the base of '{self.source}': its tensor {self.base.stored_name(name)} "
                "differs from that of "
                f"'{self.config.base_model_name_or_path}'{self._base_revision()}"
            )
        return self.base.shared(name, tensor)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the fine-tuned tensor, decoded on `device`, in the dtype in which it was published.

        Raises:
            WrongBaseError: if the base's tensor is not the one that the delta was made against.
            DeltaFormatError: if the delta's entries are damaged or do not fit.
        """
        return self._decoded(name, self._checked_base(name, device))[0]

    def tensor_and_checksum(self, name: str) -> tuple[torch.Tensor, int]:
        """Return the fine-tuned tensor on the CPU, and its checksum; errors as for `tensor`.

        The checksum is not computed where decoding has checked it: of what equals the base's tensor, or is exact.
        """
        tensor, checksum = self._decoded(name, self.base_tensor(name))
        return tensor, tensor_checksum(tensor) if checksum is None else checksum

    def tensors(
        self, device: torch.device | str = "cpu", names: Sequence[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Return fine-tuned tensors with their names, as `tensor` returns them, one at a time.

        On an accelerator, each tensor of the base is read and goes over while the one before is decoded and used, if it
        is not so large that memory for both could be short.

        Args:
            names: in which order; None for all, sorted.
        """
        names = self.names() if names is None else names
        bases = ahead(names, self._checked_base, device, lambda name: self.base.size(name) <= _MOST_AHEAD)
        return map(lambda pair: (pair[0], self._decoded(*pair)[0]), bases)  # a loop would keep the base's tensor

    def _checked_base(self, name: str, device: torch.device | str) -> torch.Tensor:
        return to_device(self.base_tensor(name), device)  # always read, so that a wrong base is detected

    def _decoded(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """Return the fine-tuned tensor, on the device of its base's tensor, and its checksum as far as it is known."""
        part, dtype, device, checksum = self.parts[name], self.dtype(name), tensor.device, None
        if part.replacement:
            stored = to_device(self.file.read(part.replacement), device)
            if stored.is_floating_point() and not finite_where_base_is(stored, tensor):
                raise DeltaFormatError(f"delta entry {part.replacement} holds NaN or infinity")
            tensor = stored
        elif part.exact:
            data = self.file.read_exact(name)
            tensor, checksum = restore(tensor, data, name, dtype), stated_checksum(data, name)
        elif part.records:
            tensor = add_delta(tensor, self.file.read_records(name), name, dtype)
        else:
            if tensor.dtype == dtype and name not in self.base.row_counts:
                checksum = self.base_checksums[name]
            tensor = tensor.to(dtype)
        if part.added_rows:
            return torch.cat([tensor, self.file.read_finite(part.added_rows).to(device)]), None
        return tensor, checksum

    def part(self, name: str, index: Index, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return a part of a fine-tuned tensor, decoded on `device`; errors as for `tensor`.

        Only the part is decoded and goes over to the device, except of tensors that are replaced or exact, have added
        rows or are stacks of matrices.

        Args:
            index: what selects the part, as in `tensor(name)[index]`.
        """
        entries, shape = self.parts[name], self.shape(name)
        ranges = part_ranges(index, shape)
        as_a_whole = entries.replacement or entries.exact or entries.added_rows or (entries.records and len(shape) != 2)
        if ranges is None or as_a_whole or ranges == [range(size) for size in shape]:
            whole = self.tensor(name, device)
            part = whole[index]
            return part if part.numel() == whole.numel() else part.clone()  # the rest is not kept
        wanted = tuple(slice(chosen.start, chosen.stop) for chosen in ranges)
        part_of_base = to_device(self.base_tensor(name)[wanted], device)
        if not entries.records:
            return part_of_base.to(self.dtype(name))
        data = self.file.read_records(name)
        return add_delta_part(part_of_base, data, name, self.dtype(name), (shape[0], shape[1]), wanted[0], wanted[1])

    def lazy_state_dict(self, decoded: bool = True) -> dict[str, LazyTensor]:
        """Return all fine-tuned tensors as objects that are decoded where transformers puts them.

        Args:
            decoded: False for zeros instead of the values, where those would be dropped.
        """
        return {name: LazyTensor(self, name, self.part if decoded else self._zeros) for name in self.names()}

    def _zeros(self, name: str, index: Index, device: torch.device) -> torch.Tensor:
        part = torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")[index]
        return torch.zeros_like(part, device=device)


def _is_delta(source: str, options: HubOptions) -> bool:
    return repository_kind(source, options) is RepositoryKind.DELTA
