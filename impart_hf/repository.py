"""Writing a delta repository: its files, its configuration and its card."""

import json
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .cards import delta_card, inherited_card_data
from .companions import companion_files
from .distilling import DistillReport
from .modeling import __file__ as _reader_init
from .modeling.checkpoints import DTYPE_NAMES, Checkpoint, HubOptions, fetch_file
from .modeling.checksums import tensor_bytes
from .modeling.configuration_delta_compressed import FORMAT_VERSION
from .modeling.delta_repository import (
    BASE_CHECKSUMS,
    CRC_ENTRY,
    DELTA_FILE,
    DELTA_INDEX,
    RECORD_SUFFIX,
    ROWS_SUFFIX,
    entry_crc,
    names_checksum,
)
from .plan import CompressionPlan, IncompatibleModelsError, TensorPlan
from .report import CompressionReport, human_bytes, read_reports
from .safetensors_writer import Entry, shard_entries, write_json, write_safetensors
from .workspace import Workspace

_READER = Path(_reader_init).parent
# What a width-pruned checkpoint needs of the reader to load with trust_remote_code=True.
_PRUNED_READER_FILES = ("configuration_pruned_llama.py", "modeling_pruned_llama.py", "pruned_llama_card.py")
_METADATA = {"format": "pt", "impart_hf_format": str(FORMAT_VERSION)}
# The card is written when its numbers are known; they may be longer than those it was measured with by this much.
_CARD_SLACK = 64


def reader_files() -> list[Path]:
    """The Python files that travel in every delta repository."""
    return sorted(p for p in _READER.glob("*.py") if p.name != "__init__.py")


def pruned_reader_files() -> list[Path]:
    """The Python files that travel in every width-pruned checkpoint."""
    return [_READER / name for name in _PRUNED_READER_FILES]


def copy_pruned_reader(model_type: str, target: Path) -> None:
    """Put the Python files into a checkpoint's folder that its model type needs: none but a width-pruned model's."""
    if model_type == "pruned_llama":
        for path in pruned_reader_files():
            shutil.copyfile(path, target / path.name)


def describe_base(base: str, options: HubOptions, base_name: str | None) -> tuple[str, str | None]:
    """What config.json records of the base: Hub id and commit, or the absolute path of a local folder.

    Args:
        base: local folder or Hub id.
        options: pinned to a commit, if it is on the Hub.
        base_name: the id to record instead of a folder.

    Raises:
        ValueError: if that cannot be an id.
    """
    if base_name:
        try:
            validate_repo_id(base_name)
        except HFValidationError as error:
            raise ValueError(f"base_name: '{base_name}' is not a Hub id (owner/name)") from error
    if os.path.isdir(base):
        return (base_name, options.revision) if base_name else (os.path.abspath(base), None)
    return base_name or base, options.revision


class RepositoryWriter:
    """Puts together the files of one repository."""

    def __init__(
        self,
        base: tuple[str, str | None],
        finetuned: str,
        finetuned_options: HubOptions,
        model: Checkpoint,
        method: dict[str, Any],
        tensors: list[TensorPlan],
        max_shard_size: int | str,
        card_data: dict[str, Any],
        origin: str,
    ):
        """Collect what goes into the repository beside the deltas.

        Args:
            base: from `describe_base`.
            finetuned: folder or Hub id as the user gave it, and how to read it.
            model: the fine-tuned checkpoint.
            method: its name and settings, as config.json is to have them.
            tensors: of the fine-tune.
            max_shard_size: a delta file larger than this is split.
            card_data: more entries for the card's metadata.
            origin: as for `delta_card`.

        Raises:
            IncompatibleModelsError: if transformers knows no causal language model of this type.
        """
        self.base, self.finetuned, self.model, self.method = base, finetuned, model, method
        self.tensors, self.max_shard_size = tensors, max_shard_size
        self.companions = companion_files(finetuned, finetuned_options)
        self._inherited = inherited_card_data(fetch_file(finetuned, "README.md", finetuned_options))
        self.card_data, self._origin = card_data, origin
        self.config = self._config()

    def _config(self) -> dict[str, Any]:
        text_config = dict(self.model.config)
        model_type = str(text_config.get("model_type"))
        if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in AutoModelForCausalLM._model_mapping:
            raise IncompatibleModelsError(
                f"'{self.finetuned}' has model_type '{model_type}': transformers knows no causal language model of it"
            )
        floats = {t.name: str(t.dtype).removeprefix("torch.") for t in self.tensors if t.dtype.is_floating_point}
        usual = Counter(floats.values()).most_common(1)[0][0]
        if "dtype" not in text_config and "torch_dtype" not in text_config:
            text_config["dtype"] = usual
        name, revision = self.base
        config: dict[str, Any] = {
            "architectures": ["DeltaCompressedForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_delta_compressed.DeltaCompressedConfig",
                "AutoModelForCausalLM": "modeling_delta_compressed.DeltaCompressedForCausalLM",
            },
            "base_model_name_or_path": name,
            "base_model_revision": revision,
            "dtype": usual,
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "model_type": "delta_compressed",
            "tensor_dtype": usual,
            "text_config": text_config,
        }
        if exceptions := {name: dtype for name, dtype in floats.items() if dtype != usual}:
            config["tensor_dtype_exceptions"] = exceptions
        return config

    def text_bytes(self, card_data: dict[str, Any]) -> int:
        """Bytes of config.json and, nearly, of the model card; with these entries more in the card's metadata."""
        sizes = dict.fromkeys(("ratio", "repository", "checkpoint", "error", "tensors", "distilled"), "0" * 20)
        return len(json.dumps(self.config, indent=2)) + 1 + len(self._card(sizes, "", card_data).encode()) + _CARD_SLACK

    def _card(self, sizes: dict[str, str], shortfall: str, more_data: dict[str, Any]) -> str:
        name, revision = self.base
        return delta_card(
            base=name,
            base_revision=revision,
            finetuned=self.finetuned,
            method=self.method,
            metadata=self._inherited | more_data,
            sizes=sizes,
            shortfall=shortfall,
            origin=self._origin,
        )

    def write(
        self, workspace: Workspace, plan: CompressionPlan, seconds: float, distilled: DistillReport | None
    ) -> CompressionReport:
        """Write every file of the repository into the workspace, and report from what was written."""
        folder = workspace.repository
        counted = self._write_deltas(workspace, plan.tensors)
        write_json(folder / "config.json", self.config)
        counted.append(folder / "config.json")
        for path in [*self.companions, *reader_files()]:
            shutil.copyfile(path, folder / path.name)
        report = self._report(workspace, plan, counted, seconds, distilled)
        others, card = report.repository_bytes, ""
        records = sum(t.bytes for t in report.tensors if t.kind == "encoded")
        for _ in range(4):  # the card states sizes that it is part of
            report.repository_bytes = others + len(card.encode())
            report.shortfall = plan.shortfall(report.repository_bytes, records, self.method["compression_ratio"])
            card = self._card(_sizes(report), report.shortfall, self.card_data)
        (folder / "README.md").write_text(card, "utf-8")
        report.repository_bytes = others + len(card.encode())
        return report

    def _write_deltas(self, workspace: Workspace, tensors: list[TensorPlan]) -> list[Path]:
        files, index = shard_entries(self._entries(workspace, tensors), DELTA_FILE, self.max_shard_size)
        paths = []
        for filename, entries in files.items():
            by_name = sorted(entries, key=lambda entry: entry.name)
            crcs = np.array([entry_crc(e.name, e.dtype, e.shape, e.data()) for e in by_name], "<u4").tobytes()
            entries = [*entries, Entry(CRC_ENTRY, "U32", (len(by_name),), len(crcs), partial(bytes, crcs))]
            # Wide numbers first keeps every entry aligned, as readers of safetensors expect.
            entries.sort(key=lambda entry: -_width(entry.dtype))
            write_safetensors(workspace.repository / filename, entries, _METADATA)
            paths.append(workspace.repository / filename)
        if index is not None:
            write_json(workspace.repository / DELTA_INDEX, index)
            paths.append(workspace.repository / DELTA_INDEX)
        return paths

    def _entries(self, workspace: Workspace, tensors: list[TensorPlan]) -> list[Entry]:
        names = [t.name for t in tensors]
        table = np.array([t.base_checksum for t in tensors] + [names_checksum(names)], "<u8").tobytes()
        entries = [Entry(BASE_CHECKSUMS, "U64", (len(names) + 1,), len(table), partial(bytes, table))]
        for t in tensors:
            dtype = DTYPE_NAMES[t.dtype]
            if t.kind == "encoded":
                path = workspace.record_path(t.name)
                size = path.stat().st_size
                entries.append(Entry(t.name + RECORD_SUFFIX, "U8", (size,), size, path.read_bytes))
            elif t.kind == "kept":
                entries.append(Entry(t.name, dtype, t.shape, t.dense_bytes, partial(self._rows, t)))
            if t.added_rows:
                shape = (t.added_rows, *t.shape[1:])
                entries.append(Entry(t.name + ROWS_SUFFIX, dtype, shape, t.added_bytes, partial(self._rows, t, True)))
        return entries

    def _rows(self, plan: TensorPlan, added: bool = False) -> bytes:
        """The bytes of a fine-tuned tensor, or of the rows that it has beyond the base's."""
        tensor = self.model.tensor(plan.name)
        if plan.added_rows:
            tensor = tensor[plan.shape[0] :] if added else tensor[: plan.shape[0]]
        return tensor_bytes(tensor).tobytes()

    def _report(
        self,
        workspace: Workspace,
        plan: CompressionPlan,
        counted: list[Path],
        seconds: float,
        distilled: DistillReport | None,
    ) -> CompressionReport:
        reports, _ = read_reports(p for p in counted if p.suffix == ".safetensors")
        for report in reports:
            if report.kind == "encoded":
                report.notes = workspace.notes(report.name)
        return CompressionReport(
            method=self.method,
            checkpoint_bytes=plan.checkpoint_bytes,
            repository_bytes=sum(p.stat().st_size for p in counted),
            companion_bytes=sum(p.stat().st_size for p in self.companions),
            reader_bytes=sum(p.stat().st_size for p in reader_files()),
            shortfall="",
            tensors=reports,
            equal_tensors=sum(t.kind == "equal" for t in plan.tensors),
            seconds=seconds,
            distilled=distilled,
        )


def _width(dtype: str) -> int:
    digits = "".join(c for c in dtype if c.isdigit())
    return int(digits) if digits else 8


def _sizes(report: CompressionReport) -> dict[str, str]:
    errors = [t.relative_error for t in report.tensors if t.relative_error is not None]
    return {
        "distilled": f"{report.distilled.before:.4f}, {report.distilled.after:.4f}" if report.distilled else "",
        "ratio": f"{report.ratio:.2f}",
        "repository": human_bytes(report.repository_bytes),
        "checkpoint": human_bytes(report.checkpoint_bytes),
        "error": f"{sum(errors) / len(errors):.3f}" if errors else "none",
        "tensors": f"{len(report.tensors)} of {len(report.tensors) + report.equal_tensors}",
    }
