"""Which deltas an engine may load: everything about a delta that can be checked before the engine is touched."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

from ..modeling.checkpoints import CheckpointError, HubOptions, fetch_file, pinned, read_json
from ..modeling.checksums import tensor_checksum
from ..modeling.delta_repository import DeltaRepository, WrongBaseError
from ..modeling.tensors import Tensors
from .completeness import check_complete
from .engine_files import EngineFiles
from .scratch import Scratch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Fields of a configuration that change nothing in the model that vLLM has built; nor does any kind of dropout.
_NO_MATTER = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "pruning", "return_dict", "transformers_version", "use_cache",
}  # fmt: skip
# Files of which an engine goes on using those that it was started with.
_KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class DeltaRefusedError(ValueError):
    """A delta that the engine cannot load, though it may be a good one."""


@dataclass(frozen=True)
class CheckedDelta:
    """A delta that the engine can load.

    Attributes:
        repo, revision: its folder or Hub id and its commit; both None for the base's own weights.
        dense: folder of its weights, decoded beforehand; None if the engine is to decode them.
        notes: what a user should know, in which the engine stays as it was started.
    """

    repo: str | None
    revision: str | None
    dense: str | None = None
    notes: tuple[str, ...] = ()


class DeltaChecker:
    """Checks deltas for one engine, and decodes them if there is room; does nothing to the engine.

    Attributes:
        files: of the model that the engine was started on.
        scratch: the room.
    """

    def __init__(self, vllm_config: "VllmConfig"):
        """Look at the engine's own files.

        Raises:
            DeltaRefusedError: if the engine was started in a way that rules swaps out.
            CheckpointError, DeltaFormatError, WrongBaseError: if its files are not as they should be.
            ValueError: if the environment names room that is none.
        """
        if vllm_config.lora_config is not None:
            raise DeltaRefusedError("an engine with --enable-lora cannot swap deltas: adapters belong to one of them")
        if vllm_config.speculative_config is not None:
            raise DeltaRefusedError("an engine with a draft model cannot swap deltas: the draft would stay as it is")
        if vllm_config.model_config.get_num_experts() > 0:
            # Its layerwise reload gives other weights than its loader, on CPUs at least
            raise DeltaRefusedError("the weights of experts cannot be swapped: vLLM does not load them a second time")
        if vllm_config.parallel_config.data_parallel_size > 1:
            raise DeltaRefusedError("with --data-parallel-size above 1 only the first engine says whether it swapped")
        self._vllm_config = vllm_config
        self.files, self.scratch = EngineFiles(vllm_config), Scratch()
        # Of the base; known once a delta has been seen to fit it.
        self._base_checksums: dict[str, int] | None = None
        if self.files.is_delta:
            started_on = self.files.open_model()
            self._config, self._base_checksums = started_on.text_config, started_on.base_checksums
        else:
            self._config = _base_config(self.files.base)

    def check(self, repo: str | None, revision: str | None = None) -> CheckedDelta:
        """See that the engine can load a delta: its files are whole, its base and its model are the engine's.

        Args:
            repo: folder or Hub id; None for the base's own weights.
            revision: branch, tag or commit on the Hub.

        Raises:
            CheckpointError: if a file is missing or cannot be fetched.
            DeltaFormatError: if the delta is damaged or does not fit the base.
            WrongBaseError: if its base is another model.
            DeltaRefusedError: if its model differs from the engine's in more than weights.
        """
        if repo is None:
            return self._check_base_itself()
        return self._check_delta(os.path.abspath(repo) if os.path.isdir(repo) else os.fspath(repo), revision)

    def _check_base_itself(self) -> CheckedDelta:
        base, config = self.files.open_base(), _base_config(self.files.base)
        self._check_config(config, base.source)
        self._check_complete(base, config)
        checksums = {name: tensor_checksum(base.tensor(name)) for name in base.names()}
        if self._base_checksums is None:
            self._base_checksums = checksums
        self._compare_base(checksums, f"'{base.source}' has been changed since the engine was started")
        return CheckedDelta(None, None)

    def _check_delta(self, repo: str, revision: str | None) -> CheckedDelta:
        options = pinned(repo, self.files.hub_options(revision))
        repository = self.files.open_delta(repo, options.revision)
        self._check_config(repository.text_config, repo)
        self._check_base(repository)
        self._check_complete(repository, repository.text_config)
        for entry in repository.file.names():
            repository.file.read_finite(entry)  # its CRC, too
        notes = tuple(self._notes(repo, options))
        return CheckedDelta(repo, options.revision, self.scratch.prepare(repository), notes)

    def _check_complete(self, weights: Tensors, config: PreTrainedConfig) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._vllm_config):  # some of transformers' classes are vLLM's by now, and ask
            check_complete(weights, config)

    def _check_config(self, config: PreTrainedConfig, repo: str) -> None:
        ours, theirs = _fields(self._config), _fields(config)
        differing = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        if differing:
            changes = ", ".join(f"{name} ({theirs.get(name)} instead of {ours.get(name)})" for name in differing[:3])
            raise DeltaRefusedError(
                f"'{repo}' differs from the model that the engine was built for in {changes}: serve it with an engine "
                "of its own"
            )

    def _check_base(self, repository: DeltaRepository) -> None:
        if self._base_checksums is None:
            for name in repository.names():
                repository.base_tensor(name)
            self._base_checksums = repository.base_checksums
        self._compare_base(
            repository.base_checksums,
            f"'{repository.source}' was made against '{repository.config.base_model_name_or_path}', which is not the "
            f"engine's base '{self.files.base}'",
        )

    def _compare_base(self, checksums: dict[str, int], otherwise: str) -> None:
        """See that checksums are those of the engine's base.

        Raises:
            WrongBaseError: saying what `otherwise` is the matter.
        """
        assert self._base_checksums is not None
        if differing := sorted(dict(checksums.items() ^ self._base_checksums.items())):
            raise WrongBaseError(f"{otherwise}: their tensors {differing[0]} differ")

    def _notes(self, repo: str, options: HubOptions) -> list[str]:
        notes = []
        for filename in _KEPT_FILES:
            ours = _content(fetch_file(self.files.model, filename, self.files.options))
            theirs = _content(fetch_file(repo, filename, options))
            if ours != theirs:
                notes.append(f"{filename} differs: the engine goes on with that of '{self.files.model}'")
        return notes


def _base_config(folder: Path) -> PreTrainedConfig:
    """
    Raises:
        CheckpointError: if the folder has none that transformers can use without code of the model's own.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever its fields lead to
        raise CheckpointError(f"config.json of '{folder}' cannot be used: {str(error)[:400]}") from error


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a model is built from, in the form in which a file has it; what trainers add to files is left out."""
    known = {field.name for field in fields(config)} - _NO_MATTER | {"model_type", "per_layer_config"}
    values = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name in known and "drop" not in name}


def _content(path: Path | None) -> Any:
    if path is None:
        return None
    if not path.name.endswith("_config.json"):
        return path.read_bytes()
    try:
        content = read_json(path)
    except CheckpointError:
        return None  # vLLM goes on without it, too
    if path.name == "tokenizer_config.json":
        return content.get("chat_template")  # the rest hardly differs in what it means
    return {k: v for k, v in content.items() if k not in ("_from_model_config", "transformers_version")}
