"""A base model with deltas beside it, used as PEFT's models are."""

import copy
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.model_files import CheckpointError, HubOptions, pinned
from ..modeling.modeling_delta_compressed import DeltaCompressedForCausalLM
from ..modeling.packed_tables import kernels_wanted
from ..modeling.repository_files import holds_delta, push_folder, repository_folder, save_repository
from ..repository.open import open_repository, refuse_adapter_beside
from .calls import Choice, batch_inputs, chosen, unwatch, watch
from .loading import DeltaReader, LoadedDelta

BASE_NAME = "__base__"  # in adapter_names, as in PEFT: a row without any delta
_users = weakref.WeakKeyDictionary[PreTrainedModel, "weakref.WeakSet[DeltaModel]"]()  # of each base


class DeltaModel(nn.Module):
    """A base model, and any number of deltas of it, one of which is active.

    It has the methods of PEFT's `PeftModel`, but is none: a delta also changes embeddings, norms, biases and experts,
    and may stay packed, for which PEFT's layers have no place. The base's weights stay as they are, and the base
    itself, called without this object, is without any delta. It is for inference: calls run without gradients. Calls
    and changes may come from several threads; a call keeps the deltas that it began with, also for what it calls in
    turn on the base, as a logits processor may.

    Attributes:
        base_model: the base.
        active_adapter: the name of the active delta.
    """

    def __init__(self, base_model: PreTrainedModel, allow_quantized_base: bool = False):
        """Prepare a base; `load_delta` does, and loads the first delta.

        Args:
            base_model: in evaluation mode afterwards.
            allow_quantized_base: whether it may be quantised, although its weights cannot be checked then.

        Raises:
            TypeError: if it is no transformers model, or one with deltas or adapters.
            ValueError: if it is quantised and that is not allowed.
        """
        super().__init__()
        _check_base_class(base_model)
        self._reader = DeltaReader(base_model)
        if self._reader.is_quantised and not allow_quantized_base:
            raise ValueError(
                "the base is quantised: its weights cannot be compared with those that the delta was made against, and "
                "the delta does not contain the quantisation's error; allow_quantized_base=True applies it all the same"
            )
        self.base_model = base_model.eval()
        self.active_adapter = ""
        self._deltas: dict[str, LoadedDelta] = {}
        self._lock, self._disabled, self._running = threading.RLock(), 0, 0
        _users.setdefault(self.base_model, weakref.WeakSet()).add(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # before __init__ is through
                raise
            value = getattr(self.base_model, name)
            if isinstance(value, nn.Module):
                raise AttributeError(
                    f"'{name}' is a part of the base, which would run without deltas: get_base_model().{name}"
                ) from None
            return value

    @property
    def active_adapters(self) -> list[str]:
        """The active delta's name in a list, as in PEFT."""
        return [self.active_adapter] if self.active_adapter else []

    @property
    def adapter_names(self) -> list[str]:
        """The names of all deltas in memory."""
        return list(self._deltas)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *,
        factors: str | None = None,
        base_files: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> None:
        """Load a further delta; it is not activated.

        Args:
            model_id: folder or Hub id of a delta repository.
            adapter_name: a name of your own for it.
            factors: "packed": it stays compressed, and kernels multiply by it, or each call decodes it where these do
                not run, which is slow. "dense": it is decoded once. None for "packed" where kernels run.
            base_files: folder or Hub id of the base's files; None for the folder that the base in memory was loaded
                from, or the repository's record.
            revision, token, cache_dir, local_files_only, subfolder: as for any model on the Hub.

        Raises:
            ValueError: if the name is taken, or the delta does not fit the base's modules.
            CheckpointError: if the repository or the base's files are missing, or hold an adapter as well.
            DeltaFormatError: if the delta is damaged.
            WrongBaseError: if it is another base's.
        """
        _check_name(adapter_name)
        if factors not in (None, "packed", "dense"):
            raise ValueError(f"factors must be 'packed' or 'dense', not {factors!r}")
        source = os.fspath(model_id)
        source = os.path.abspath(source) if os.path.isdir(source) else source
        with self._lock:
            if adapter_name in self._deltas:
                raise ValueError(f"there is a delta '{adapter_name}' already: choose another name, or delete it first")
        options = pinned(
            source,
            HubOptions(
                revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
                subfolder=subfolder,
            ),
        )  # fmt: skip
        repository = open_repository(source, options, base_files or self._files_of_base())
        refuse_adapter_beside(source, options)
        packed = factors == "packed" or (factors is None and kernels_wanted(self.base_model.device))
        loaded = self._reader.read(repository, packed)
        with self._lock:
            if adapter_name in self._deltas:
                raise ValueError(f"a delta '{adapter_name}' was loaded meanwhile: choose another name")
            watch(self.base_model, list(loaded.effects))
            self._deltas[adapter_name] = loaded
            self.active_adapter = self.active_adapter or adapter_name

    def _files_of_base(self) -> str | None:
        """Return the folder that the base was loaded from; None for what the repository names, or on the Hub."""
        folder = getattr(self.base_model, "name_or_path", "")
        return folder if os.path.isdir(folder) else None

    def set_adapter(self, adapter_name: str) -> None:
        """Make a delta the active one; calls that are running keep theirs.

        Raises:
            ValueError: if there is none of this name. Several at once cannot be active, as deltas do not add up.
        """
        if not isinstance(adapter_name, str):
            raise ValueError("one delta is active at a time; adapter_names chooses one for each row of a batch")
        with self._lock:
            self._delta(adapter_name)
            self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a delta. If it was active, the first of the others is active then, or none.

        Raises:
            ValueError: if there is none of this name.
        """
        with self._lock:
            self._delta(adapter_name)
            del self._deltas[adapter_name]
            if self.active_adapter == adapter_name:
                self.active_adapter = next(iter(self._deltas), "")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context, calls without `adapter_names` are the base's; those of other threads as well."""
        with self._lock:
            self._disabled += 1
        try:
            yield
        finally:
            with self._lock:
                self._disabled -= 1

    def _delta(self, name: str) -> LoadedDelta:
        if name not in self._deltas:
            loaded = f"loaded: {', '.join(self._deltas)}" if self._deltas else "none is loaded"
            raise ValueError(
                f"there is no delta '{name}'; {loaded}; load_adapter loads one, disable_adapter is the base"
            )
        return self._deltas[name]

    def _choice(self, adapter_names: Sequence[str] | None) -> tuple[Choice | None, list[LoadedDelta | None]]:
        """Return what applies to a call, and the deltas of its rows, None for the base; for who holds the lock."""
        if adapter_names is None:
            loaded = None if self._disabled or not self.active_adapter else self._delta(self.active_adapter)
            choice = None if loaded is None else Choice(self.base_model, (loaded.effects,))
            return choice, [loaded]
        of_rows = [None if name == BASE_NAME else self._delta(name) for name in adapter_names]
        used = {id(loaded): loaded for loaded in of_rows if loaded is not None}
        numbers = {key: number for number, key in enumerate(used)}
        owners = tuple(-1 if loaded is None else numbers[id(loaded)] for loaded in of_rows)
        effects = tuple(loaded.effects for loaded in used.values())
        if len(set(owners)) == 1:
            choice = None if owners[0] < 0 else Choice(self.base_model, effects)
        else:
            choice = Choice(self.base_model, effects, owners)
        return choice, of_rows

    @contextmanager
    def _call(
        self, adapter_names: Sequence[str] | None, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> Iterator[list[LoadedDelta | None]]:
        """Within this context, the base is called with what is chosen; yields the rows' deltas, None for the base."""
        if adapter_names is not None:
            _check_count(adapter_names, arguments, options)
        with self._lock:
            choice, of_rows = self._choice(adapter_names)
            self._running += 1
        try:
            with chosen(choice), torch.no_grad():
                yield of_rows
        finally:
            with self._lock:
                self._running -= 1

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the base with a delta.

        Args:
            args, kwargs: as for the base; not `labels` for training, because there are no gradients.
            adapter_names: the delta of each row of the batch, "__base__" for none; None for the active one.

        Raises:
            ValueError: if a name is unknown, there are not as many as rows, or the model's layers mix rows.
        """
        with self._call(adapter_names, args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate with a delta; arguments and errors as for `forward`.

        What the call does not say of generation is the fine-tune's setting, if it is the same for all rows, otherwise
        the base's.
        """
        with self._call(adapter_names, args, kwargs) as of_rows:
            configs = [None if loaded is None else loaded.generation_config for loaded in of_rows]
            is_given = len(args) > 1 or kwargs.get("generation_config") is not None
            if not is_given and configs[0] is not None and all(config == configs[0] for config in configs):
                kwargs.pop("generation_config", None)
                settings = copy.deepcopy(configs[0])
                kwargs = settings.update(**kwargs)  # transformers is to stop taking both; what is none of them remains
                kwargs["generation_config"] = settings
            return self.base_model.generate(*args, **kwargs)

    def get_base_model(self) -> PreTrainedModel:
        """Return the base."""
        return self.base_model

    def train(self, mode: bool = True) -> "DeltaModel":
        """Raise an error for True: deltas are for inference.

        Raises:
            ValueError: if `mode` is true.
        """
        if mode:
            raise ValueError(
                "a model with deltas is for inference: merge_and_unload gives a plain model, which can be trained"
            )
        return super().train(False)

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Raise an error: the vocabulary is the deltas'.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model with deltas has their vocabularies: merge_and_unload gives one that can be resized")

    def __deepcopy__(self, memo: Any) -> "DeltaModel":
        """Raise an error: a copied base has no deltas beside it.

        Raises:
            TypeError: always.
        """
        raise TypeError("a model with deltas cannot be copied: load the base a second time, and its deltas beside it")

    def _apply(self, fn: Any, recurse: bool = True) -> "DeltaModel":
        """Move or convert the base, as `to` and `half` do, and read the deltas again for it."""
        super()._apply(fn, recurse)
        with self._lock:
            self._deltas = {name: self._reader.again(loaded) for name, loaded in self._deltas.items()}
        return self

    def unload(self) -> PreTrainedModel:
        """Forget all deltas and return the base.

        Raises:
            RuntimeError: if a call is running.
        """
        with self._lock:
            self._check_idle()
            self._deltas.clear()
            self.active_adapter = ""
            users = _users[self.base_model]
            users.discard(self)
            if not users:
                unwatch(self.base_model)
        return self.base_model

    def merge_and_unload(self) -> PreTrainedModel:
        """Put the active delta's values into the base's parameters, forget all deltas, and return the base.

        The model then has the fine-tune's parameters, rounded to its own dtype, and its vocabulary.

        Raises:
            ValueError: if no delta is active, the base is quantised, or it has another object's deltas as well.
            RuntimeError: if a call is running.
            DeltaFormatError, WrongBaseError: if the files have been damaged meanwhile; the base is as it was.
        """
        if self._reader.is_quantised:
            raise ValueError("a delta cannot be merged into a quantised base: merge into the full-precision base")
        with self._lock:
            self._check_idle()
            loaded = self._delta(self.active_adapter)
            if len(_users[self.base_model]) > 1:
                raise ValueError("the base has deltas of another object as well: unload that first")
            self._reader.placement(loaded.repository, False).write_into_base()
            model = self.unload()
        model.generation_config = copy.deepcopy(loaded.generation_config)
        return model

    def _check_idle(self) -> None:
        if self._running:
            raise RuntimeError(f"{self._running} calls are running: wait for them before deltas are unloaded")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Write delta repositories, byte for byte those that were loaded.

        Args:
            save_directory: as in PEFT, the delta named "default" is written to it, others to folders of their names.
            selected_adapters: which ones; None for all.

        Raises:
            ValueError: if there is none of a name.
            CheckpointError: if the files that a delta was loaded from are no longer there.
        """
        _check_list("selected_adapters", selected_adapters)
        with self._lock:
            chosen_ones = {name: self._delta(name) for name in selected_adapters or self._deltas}
        for name, loaded in chosen_ones.items():
            folder = Path(save_directory) if name == "default" else Path(save_directory, name)
            save_repository(self._folder_of(loaded), folder, {})

    def push_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs: Any) -> str:
        """Upload a delta repository.

        Args:
            adapter_name: which one; None for the active one.
            kwargs: token, private, revision, create_pr, commit_message, commit_description.

        Returns:
            The commit's URL.

        Raises:
            ValueError, CheckpointError: as for `save_pretrained`.
        """
        loaded = self._delta(self.active_adapter if adapter_name is None else adapter_name)
        with tempfile.TemporaryDirectory() as folder:
            save_repository(self._folder_of(loaded), Path(folder), {})
            return push_folder(Path(folder), repo_id, replaces_all=False, **kwargs)

    def _folder_of(self, loaded: LoadedDelta) -> Path:
        folder = repository_folder(loaded.repository.source, loaded.repository.options)
        if not holds_delta(folder, loaded.digest):
            raise CheckpointError(f"'{folder}' holds another model now than when the delta was loaded from it")
        return folder


def load_delta(
    base_model: PreTrainedModel,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    allow_quantized_base: bool = False,
    **options: Any,
) -> DeltaModel:
    """Load a delta beside its base, which stays as it is and may get further ones.

    Args:
        base_model: the base, loaded by transformers in any dtype; its weights are compared with those that the delta
            was made against.
        model_id: folder or Hub id of a delta repository.
        adapter_name: a name for it.
        allow_quantized_base: whether the base may be quantised; then only its name is compared.
        options: as for `DeltaModel.load_adapter`.

    Raises:
        TypeError, ValueError: if the base is no model that can have deltas.
        CheckpointError, DeltaFormatError, WrongBaseError: as for `DeltaModel.load_adapter`.
    """
    model = DeltaModel(base_model, allow_quantized_base)
    model.load_adapter(model_id, adapter_name, **options)
    return model


def _check_base_class(model: Any) -> None:
    if isinstance(model, DeltaModel):
        raise TypeError("this is a model with deltas already: model.load_adapter loads a further one")
    if isinstance(model, DeltaCompressedForCausalLM):
        raise TypeError("this is a fine-tune that was loaded from a delta repository: give its base")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"the base must be a model of transformers, not a {type(model).__name__}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError("the base has adapters of PEFT: load it without")


def _check_name(name: Any) -> None:
    """Check a delta's name, which may become a folder's.

    Raises:
        ValueError: if it cannot be one.
    """
    if not isinstance(name, str) or name in ("", BASE_NAME) or name.startswith(".") or {"/", "\\", "\0"} & set(name):
        raise ValueError(f"a delta cannot have the name {name!r}: choose one without slashes that begins with no dot")


def _check_list(what: str, names: Any) -> None:
    if isinstance(names, str):
        raise ValueError(f"{what} is a list of names: [{names!r}]")


def _check_count(names: Sequence[str], arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Check that there is a name for each row.

    Raises:
        ValueError: if there are more or fewer.
    """
    _check_list("adapter_names", names)
    inputs = batch_inputs(arguments, options)
    if inputs is None or len(inputs) != len(names) or not len(names):
        found = "no" if inputs is None else len(inputs)
        raise ValueError(f"adapter_names has {len(names)} names for {found} inputs: give one for each")
