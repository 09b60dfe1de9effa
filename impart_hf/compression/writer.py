"""Writer of a delta repository: delta files, config.json, sidecar files, reader files and model card."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import write_json
from ..distillation import DistillReport
from ..methods.base import GUESSED
from ..modeling.checkpoints import DTYPE_NAMES
from ..modeling.checksums import tensor_bytes
from ..modeling.configuration_delta_compressed import FORMAT_VERSION
from ..modeling.delta_file import (
    BASE_CHECKSUMS,
    CRC_ENTRY,
    DELTA_FILE,
    DELTA_INDEX,
    EXACT_SUFFIX,
    RECORD_SUFFIX,
    ROWS_SUFFIX,
    entry_crc,
    names_checksum,
)
from ..modeling.model_files import fetch_file, read_json
from ..modeling.tensors import Model
from ..repository.cards import delta_card, inherited_card_data
from ..repository.kl_forecast import FORECAST, TensorErrors, forecast_text, kl_forecast
from ..repository.reader_files import reader_files
from ..repository.report import CompressionReport, TensorReport, human_bytes, read_reports
from ..storage.safetensors_writer import Entry, header_bytes, shard_entries, write_safetensors
from ..storage.workspace import Workspace
from .encoding import NOT_REACHED
from .loading_class import auto_classes
from .pair import ModelPair
from .plan import CompressionPlan
from .scan import TensorPlan

# The model card states sizes that include its own, and config.json a forecast that is known last. Together they count
# as this many bytes, or, if they are longer (the configuration of a merge, many languages), as many as they would have
# with numbers of `_LONGEST` characters.
CARD_BYTES = 1536
_LONGEST = 16
_LONGEST_FORECAST = [0.00011] * 3
# The kinds of tensors that have records, with the suffix of their entries.
RECORDED = {"encoded": RECORD_SUFFIX, "exact": EXACT_SUFFIX}
_METADATA = {"format": "pt", "impart_hf_format": str(FORMAT_VERSION)}


def repository_config(pair: ModelPair, method: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        method: the method's name and settings, from `CompressionRequest.recorded_method`.
    """
    text_config = dict(pair.finetuned.config)
    floats = {t.name: str(t.dtype).removeprefix("torch.") for t in pair.tensors if t.dtype.is_floating_point}
    usual = Counter(floats.values()).most_common(1)[0][0]
    if text_config.get("dtype") is None and text_config.get("torch_dtype") is None:
        text_config = {name: value for name, value in text_config.items() if name != "torch_dtype"} | {"dtype": usual}
    name, revision = pair.recorded_base
    kinds = auto_classes(pair.finetuned)
    own = kinds[0].replace("AutoModel", "DeltaCompressed")
    config: dict[str, Any] = {
        "architectures": [own],
        "auto_map": {
            "AutoConfig": "configuration_delta_compressed.DeltaCompressedConfig",
            **dict.fromkeys(kinds, f"modeling_delta_compressed.{own}"),
        },
        "base_model_name_or_path": name,
        "base_model_revision": revision,
        "dtype": usual,
        "format_version": FORMAT_VERSION,
        "method": method,
        "model_type": "delta_compressed",
        "tensor_dtype": usual,
        "text_config": text_config,
    }
    if exceptions := {name: dtype for name, dtype in floats.items() if dtype != usual}:
        config["tensor_dtype_exceptions"] = exceptions
    base = pair.base
    optional = {
        "base_is_delta": pair.chain_length > 1,
        "absent_tensors": base.absent,
        "row_counts": base.row_counts,
        "base_tensors": base.others,
    }
    return config | {name: value for name, value in optional.items() if value}


def json_bytes(content: dict[str, Any]) -> int:
    """Return the size in bytes of the file that `write_json` writes for this content."""
    return len(json.dumps(content, indent=2)) + 1


def card_bytes(pair: ModelPair, config: dict[str, Any], card_data: dict[str, Any], origin: str) -> int:
    """Return the bytes that card and forecast count as; arguments as for `write_repository`."""
    sizes = dict.fromkeys(
        ("distilled", "ratio", "repository", "checkpoint", "error", "exact", "tensors"), _LONGEST * "0"
    )
    forecast = _LONGEST_FORECAST if _is_forecast(config) else None
    sizes["forecast"] = "" if forecast is None else forecast_text(forecast)
    if "distillation" not in config["method"]:
        sizes["distilled"] = ""
    if not pair.exact.patterns:
        sizes["exact"] = ""
    entry = json_bytes(with_forecast(config, forecast)) - json_bytes(config)
    return max(CARD_BYTES, len(_card(pair, config, card_data, origin, sizes, "").encode()) + entry)


def _is_forecast(config: dict[str, Any]) -> bool:
    """Return whether the KL is forecast: unless distillation or a search for a target measures it."""
    method = config["method"]
    return "compression_ratio" in method and not {"distillation", "target"} & method.keys()


def with_forecast(config: dict[str, Any], forecast: list[float] | None) -> dict[str, Any]:
    """Return the content of config.json with the forecast of `kl_forecast` in the method's entry, if there is one."""
    return config if forecast is None else config | {"method": config["method"] | {FORECAST: forecast}}


def _card(
    pair: ModelPair,
    config: dict[str, Any],
    card_data: dict[str, Any],
    origin: str,
    sizes: dict[str, str],
    shortfall: str,
) -> str:
    finetuned, (name, revision) = pair.finetuned, pair.recorded_base
    inherited = inherited_card_data(fetch_file(finetuned.source, "README.md", finetuned.options))
    return delta_card(
        base=name,
        base_revision=revision,
        finetuned=finetuned.source,
        method=config["method"],
        metadata=inherited | card_data,
        sizes=sizes,
        shortfall=shortfall,
        origin=origin,
        auto_class=auto_classes(finetuned)[-1],
        deltas=pair.chain_length,
    )


def write_repository(
    pair: ModelPair,
    workspace: Workspace,
    plan: CompressionPlan,
    config: dict[str, Any],
    card_data: dict[str, Any],
    origin: str,
    seconds: float,
    distilled: DistillReport | None,
    calibrated: Set[str] = frozenset(),
) -> CompressionReport:
    """Write every file of a repository into the workspace, and return a report read back from the files.

    Args:
        config: the content of config.json, without a forecast.
        card_data: additional entries for the model card's metadata.
        origin: where the fine-tune comes from, as for `delta_card`.
        seconds: time taken so far.
        distilled: the report of distillation, or None.
        calibrated: names of the weights whose inputs calibration has computed.
    """
    folder, finetuned = workspace.repository, pair.finetuned
    counted = _write_deltas(finetuned, workspace, plan.tensors, plan.max_shard_size)
    tensors, _ = read_reports(p for p in counted if p.suffix == ".safetensors")
    repository_bytes = plan.card_bytes + sum(p.stat().st_size for p in counted) + json_bytes(config)
    about = {t.name: workspace.about(t.name) for t in tensors if t.kind == "encoded"}
    if _is_forecast(config):
        config = with_forecast(config, kl_forecast(_errors(tensors, plan, about), bool(calibrated & about.keys())))
    write_json(folder / "config.json", config)
    pair.companions.copy_to(folder)
    for path in reader_files():
        shutil.copyfile(path, folder / path.name)
    for tensor in tensors:
        if tensor.kind == "encoded":
            notes = about.get(tensor.name, {}).get("notes", [])
            tensor.notes = [note for note in notes if note != GUESSED]
            if tensor.name in calibrated and NOT_REACHED not in notes:
                tensor.inputs = "calibrated"
            elif GUESSED in notes:
                tensor.inputs = "guessed"
    report = CompressionReport(
        method=config["method"],
        checkpoint_bytes=plan.checkpoint_bytes,
        repository_bytes=repository_bytes,
        sidecar_files=sorted(pair.companions.files),
        sidecar_bytes=sum((folder / name).stat().st_size for name in pair.companions.files),
        reader_bytes=sum(p.stat().st_size for p in reader_files()),
        shortfall=_shortfall(plan, repository_bytes, tensors, config["method"].get("compression_ratio")),
        tensors=tensors,
        equal_tensors=sum(t.kind == "equal" and not t.added_rows for t in plan.tensors),
        seconds=seconds,
        distilled=distilled,
    )
    _write_card(pair, folder, config, card_data, origin, report)
    return report


def _shortfall(plan: CompressionPlan, repository_bytes: int, tensors: list[TensorReport], ratio: float | None) -> str:
    """Return why the requested ratio is missed; empty if it is met, or if none was requested."""
    if ratio is None:
        return ""
    return plan.shortfall(repository_bytes, sum(t.bytes for t in tensors if t.kind == "encoded"), ratio)


def describe_again(
    pair: ModelPair, folder: Path, method: dict[str, Any], card_data: dict[str, Any], origin: str,
    report: CompressionReport,
) -> None:  # fmt: skip
    """Replace what a repository says of its method, in config.json, the model card and the report.

    Args:
        folder: the repository, from `write_repository`.
        method: the method's name and settings for config.json.
        card_data, origin: as for `write_repository`.
        report: the report on the repository.
    """
    config = read_json(folder / "config.json")
    report.repository_bytes -= json_bytes(config)
    config["method"] = report.method = method
    report.repository_bytes += json_bytes(config)
    write_json(folder / "config.json", config)
    _write_card(pair, folder, config, card_data, origin, report)


def _write_card(
    pair: ModelPair, folder: Path, config: dict[str, Any], card_data: dict[str, Any], origin: str,
    report: CompressionReport,
) -> None:  # fmt: skip
    card = _card(pair, config, card_data, origin, _sizes(report), report.shortfall)
    (folder / "README.md").write_text(card, "utf-8")


def _errors(
    tensors: list[TensorReport], plan: CompressionPlan, about: dict[str, dict[str, Any]]
) -> Iterator[TensorErrors]:
    """Yield the errors of all encoded tensors: of their records, and what the workspace knows about them."""
    plans = {t.name: t for t in plan.encoded}
    for tensor in tensors:
        if tensor.kind == "encoded":
            known, planned = about[tensor.name], plans[tensor.name]
            yield TensorErrors(
                known["relative_norm"], known["dropped"], tensor.relative_error or 0.0, tensor.rank is None,
                planned.vocabulary, planned.matrices,
            )  # fmt: skip


def _write_deltas(finetuned: Model, workspace: Workspace, tensors: list[TensorPlan], max_shard_size: int) -> list[Path]:
    sizes = {t.name: workspace.record_bytes(t.name) for t in tensors if t.kind in RECORDED}
    entries = _entries(tensors, sizes, workspace.record, partial(_rows, finetuned))
    files, index = shard_entries(entries, DELTA_FILE, max_shard_size)
    paths = []
    for filename, entries in files.items():
        by_name = sorted(entries, key=lambda entry: entry.name)
        crcs = np.array([entry_crc(e.name, e.dtype, e.shape, e.data()) for e in by_name], "<u4").tobytes()
        write_safetensors(workspace.repository / filename, _with_crcs(entries, crcs), _METADATA)
        paths.append(workspace.repository / filename)
    if index is not None:
        write_json(workspace.repository / DELTA_INDEX, index)
        paths.append(workspace.repository / DELTA_INDEX)
    return paths


def delta_file_bytes(tensors: list[TensorPlan], record_sizes: Mapping[str, int], max_shard_size: int) -> int:
    """Return the size of all delta files and their index, in bytes, for records of these sizes by tensor."""
    entries = _entries(tensors, record_sizes, lambda name: b"", lambda tensor, added: b"")
    files, index = shard_entries(entries, DELTA_FILE, max_shard_size)
    total = 0 if index is None else json_bytes(index)
    for entries in files.values():
        entries = _with_crcs(entries, bytes(4 * len(entries)))
        total += len(header_bytes(entries, _METADATA)) + sum(entry.size for entry in entries)
    return total


def _with_crcs(entries: list[Entry], crcs: bytes) -> list[Entry]:
    """Return a file's entries in their order, with one for their checksums."""
    entries = [*entries, Entry(CRC_ENTRY, "U32", (len(entries),), len(crcs), partial(bytes, crcs))]
    # Sorting by dtype, widest first, keeps every entry aligned, as readers of safetensors expect.
    return sorted(entries, key=lambda entry: -_dtype_bits(entry.dtype))


def _entries(
    tensors: list[TensorPlan],
    record_sizes: Mapping[str, int],
    record: Callable[[str], bytes],
    rows: Callable[[TensorPlan, bool], bytes],
) -> list[Entry]:
    """Return all tensors' entries; `record` and `rows` give their data."""
    names = [t.name for t in tensors]
    table = np.array([t.base_checksum for t in tensors] + [names_checksum(names)], "<u8").tobytes()
    entries = [Entry(BASE_CHECKSUMS, "U64", (len(names) + 1,), len(table), partial(bytes, table))]
    for t in tensors:
        dtype = DTYPE_NAMES[t.dtype]
        if t.kind in RECORDED:
            size = record_sizes[t.name]
            entries.append(Entry(t.name + RECORDED[t.kind], "U8", (size,), size, partial(record, t.name)))
        elif t.kind == "kept":
            entries.append(Entry(t.name, dtype, t.shape, t.dense_bytes, partial(rows, t, False)))
        if t.added_rows:
            shape = (t.added_rows, *t.shape[1:])
            entries.append(Entry(t.name + ROWS_SUFFIX, dtype, shape, t.added_bytes, partial(rows, t, True)))
    return entries


def _rows(finetuned: Model, plan: TensorPlan, added: bool) -> bytes:
    """Return the bytes of a fine-tuned tensor's shared part, or of its added rows."""
    tensor = finetuned.tensor(plan.name)
    if plan.added_rows:
        tensor = tensor[plan.shape[0] :] if added else tensor[: plan.shape[0]]
    return tensor_bytes(tensor).tobytes()


def _dtype_bits(dtype: str) -> int:
    digits = "".join(c for c in dtype if c.isdigit())
    return int(digits) if digits else 8


def _sizes(report: CompressionReport) -> dict[str, str]:
    errors = [t.relative_error for t in report.tensors if t.relative_error is not None]
    return {
        "forecast": forecast_text(report.method[FORECAST]) if FORECAST in report.method else "",
        "distilled": f"{report.distilled.before:.4f}, {report.distilled.after:.4f}" if report.distilled else "",
        "ratio": f"{report.ratio:.2f}",
        "repository": human_bytes(report.repository_bytes),
        "checkpoint": human_bytes(report.checkpoint_bytes),
        "error": f"{sum(errors) / len(errors):.3f}" if errors else "",
        "exact": f"{len(report.exact_tensors)} tensors" if report.exact_tensors else "",
        "tensors": f"{report.changed_tensors} of {report.changed_tensors + report.equal_tensors}",
    }
