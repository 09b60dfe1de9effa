"""The callback that makes exact deltas of the Trainer's checkpoints."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..common import processes
from ..common.files import OutputError
from ..common.validation import check_whole_number
from ..compression.compress import compress
from ..hub import push
from ..methods import ExactConfig
from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import WrongBaseError
from ..modeling.model_files import CheckpointError, HubOptions, pinned
from ..storage.locked_folder import LockedFolder
from ..storage.output import check_visible
from .checks import MOST_LINKS, check_base, check_training, trained_model
from .folders import STATE, chain_of, checkpoint_of, checkpoints_in, is_checkpoint_name, is_whole, rotate
from .weights import check_dense, place_delta, remove_dense, rest_on, restore_dense, stand_in

logger = logging.get_logger(__name__)

_HOLDER = ".delta-"  # begins the name of the folder in the output folder in which a delta grows
_ANCHOR_EVERY = 8


class DeltaCheckpointCallback(TrainerCallback):
    """Replaces the dense weights of every checkpoint that the Trainer saves by an exact delta.

    A checkpoint is then a delta repository, which loads with `from_pretrained`, with the Trainer's other files beside
    it. The Trainer writes the checkpoint as always, whatever shards the weights, so that nothing is gathered twice.
    Then the delta is made in a hidden folder, by all processes together if they see one file system, and takes the
    dense weights' place by one rename.

        callback = DeltaCheckpointCallback()
        trainer = Trainer(..., callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.restore(output_dir))

    With `load_best_model_at_end` the best checkpoint keeps its dense weights beside the delta, until another is better
    or the training ends. An error while a delta is made ends the training; the dense checkpoint of that step is whole.
    """

    def __init__(
        self,
        base: str | None = None,
        *,
        of: str = "start",
        anchor_every: int | None = None,
        keep: int | None = None,
        push_to: str | None = None,
        base_revision: str | None = None,
        base_name: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
    ):
        """Check the settings.

        Args:
            base: local folder or Hub id of the model that the training starts from, whose files deltas rest on. What
                is in memory may differ from it in dtype and vocabulary. None for what the model's configuration says.
            of: what deltas are of: "start", the base, or "last", the checkpoint before, on which the next one rests.
            anchor_every: for "last": every so many checkpoints one is of the start, from 1 to 31; 8 if None.
            keep: how many of the newest checkpoints to keep, with all that these rest on and the best one; None for
                all. For "last" in place of the Trainer's `save_total_limit`.
            push_to: Hub id to upload every delta to, as a commit of its own; for deltas of the start. A failed upload
                is logged, and the training goes on.
            base_revision: branch, tag or commit of the base on the Hub; None for the model's.
            base_name: Hub id to record for a base that is a local folder.
            token: for the Hub, as for any upload or download.
            private: whether a new repository on the Hub is private.

        Raises:
            ValueError: if a setting is invalid or has no effect.
        """
        if of not in ("start", "last"):
            raise ValueError(f"of must be 'start' or 'last', got {of!r}")
        if anchor_every is not None:
            if of == "start":
                raise ValueError("anchor_every has no effect with of='start', where every delta is one of the start")
            check_whole_number(1, anchor_every=anchor_every)
            if anchor_every > MOST_LINKS:
                raise ValueError(f"anchor_every must be at most {MOST_LINKS}, got {anchor_every}")
        if keep is not None:
            check_whole_number(1, keep=keep)
        if of == "last" and (push_to is not None or base_name is not None):
            name = "push_to" if push_to is not None else "base_name"
            raise ValueError(f"{name} needs of='start': others do not have the checkpoint before")
        if private is not None and push_to is None:
            raise ValueError("private has no effect without push_to")
        self._base, self._of, self._keep, self._push_to = base, of, keep, push_to
        self._anchor_every = _ANCHOR_EVERY if anchor_every is None else anchor_every
        self._base_revision, self._base_name = base_revision, base_name
        self._token, self._private = token, private
        self._start = ""
        self._options = HubOptions(token=token)
        self._last: Path | None = None
        self._is_shared = True

    @staticmethod
    def restore(folder: str | Path, base: str | None = None) -> str | None:
        """Return a checkpoint with its dense weights for `Trainer.train(resume_from_checkpoint=...)`.

        The weights are written beside the delta, bit for bit, and removed when the training has read them. Of several
        processes, all call this.

        Args:
            folder: a checkpoint, or the Trainer's output folder, of which the newest checkpoint is taken that is whole
                and can be read; one that cannot is logged.
            base: folder or Hub id of the base, instead of the recorded one.

        Returns:
            The checkpoint's folder; None if the output folder is missing or holds no whole checkpoint.

        Raises:
            CheckpointError: if a checkpoint is not whole, or its base is missing.
            DeltaFormatError, WrongBaseError: if its delta is damaged, or the base is another.
            OutputError: if the disk has too little room.
        """
        return processes.in_first(lambda: _restored(Path(folder), base))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Check everything that can be checked before the first step.

        Raises:
            CheckpointError: if the base cannot be reached.
            ValueError: if the model or the Trainer's settings do not allow deltas.
        """
        trained = trained_model(model)
        check_training(args, state.is_hyper_param_search, self._of)
        self._find_start(trained, args)
        self._last = None
        if state.global_step:
            before = checkpoint_of(_output(args), state.global_step)
            self._last = before if before.is_dir() else None
        output = _output(args)
        with ExitStack() as stack:
            holder = processes.in_first(lambda: _new_holder(output, stack))
            self._is_shared = all(processes.together(lambda: _is_visible(holder)))
            processes.in_first(lambda: self._tidy(args, state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make a delta of the checkpoint that the Trainer has just saved."""
        checkpoint = checkpoint_of(_output(args), state.global_step)
        base, options = processes.in_first(lambda: self._base_of_next(checkpoint))
        with ExitStack() as stack:
            holder = processes.in_first(lambda: _new_holder(checkpoint.parent, stack))
            delta = holder / "delta"
            dense = processes.in_first(lambda: stand_in(Path(base), holder) if base == str(self._last) else None)

            def make() -> None:
                compress(
                    base if dense is None else str(dense), str(checkpoint), delta, ExactConfig(),
                    base_revision=options.revision, base_name=self._base_name, token=self._token,
                )  # fmt: skip

            def alone() -> None:
                with processes.alone():
                    make()

            if self._is_shared:
                make()
            else:
                processes.in_first(alone)

            def place() -> None:
                with processes.alone():
                    if dense is not None:
                        rest_on(delta, base)
                    self._push(delta, state.global_step)
                    place_delta(checkpoint, delta)

            processes.in_first(place)
            # Until here a kill leaves the dense checkpoint, from here on the delta.
            self._last = checkpoint
            processes.in_first(lambda: self._tidy(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove the last dense weights: of the best checkpoint, which the Trainer has read, and of the last."""
        processes.in_first(lambda: _remove_dense(_output(args)))

    def _find_start(self, model: PreTrainedModel, args: TrainingArguments) -> None:
        """Find the base and its commit."""
        config: Any = model.config
        self._start = os.fspath(self._base) if self._base is not None else config._name_or_path or ""
        revision = self._base_revision
        if revision is None and self._start == config._name_or_path:
            revision = getattr(config, "_commit_hash", None)
        options = HubOptions(None if os.path.isdir(self._start) else revision, self._token)
        if self._start:
            options = processes.each(lambda: pinned(self._start, options))
        processes.each(lambda: check_base(self._start, options, self._base_name, model, _output(args), self._push_to))
        self._options = options

    def _base_of_next(self, checkpoint: Path) -> tuple[str, HubOptions]:
        """Return what the next delta is of, and how that is found.

        Raises:
            CheckpointError: if the Trainer has written no dense weights.
        """
        check_dense(checkpoint)
        if self._of == "last" and self._last is not None and self._last.is_dir() and self._last != checkpoint:
            chain = chain_of(self._last)
            folder = os.path.realpath(self._last.parent)
            links = sum(os.path.realpath(path.parent) == folder for path in chain)
            if links < self._anchor_every and len(chain) <= MOST_LINKS:
                return str(self._last), HubOptions(token=self._token)
        return self._start, self._options

    def _push(self, delta: Path, step: int) -> None:
        if self._push_to is None:
            return
        try:
            push(delta, self._push_to, token=self._token, private=self._private, commit_message=f"Step {step}")
        except Exception as error:  # the Hub's and the network's own errors: no reason to lose a training
            logger.warning(f"the delta of step {step} was not uploaded to '{self._push_to}': {error}")

    def _tidy(self, args: TrainingArguments, state: TrainerState) -> None:
        """Leave dense weights only where they are needed again, and remove old checkpoints.

        They are needed of the best checkpoint, if the Trainer will read it, and of the last, if the next is one of it.
        """
        best = state.best_model_checkpoint
        read = best if args.load_best_model_at_end else None
        _remove_dense(_output(args), read, self._last if self._of == "last" else None)
        if read is not None and os.path.isdir(read):
            restore_dense(Path(read), self._start if self._base_name else None)
        if self._keep is not None:
            rotate(_output(args), self._keep, best)


def _output(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))  # never None once the Trainer has it


def _restored(folder: Path, base: str | None) -> str | None:
    """Do what `DeltaCheckpointCallback.restore` does, in one process."""
    inside = checkpoints_in(folder)
    # An output folder may hold a model and the Trainer's state as well: those of the end of a training.
    if is_checkpoint_name(folder) or (not inside and (folder / STATE).exists()):
        if not is_whole(folder):
            raise CheckpointError(
                f"{folder} is a checkpoint that was not written to its end: resume from one before it"
            )
        inside = [folder]
    errors: list[Exception] = []
    for checkpoint in reversed([path for path in inside if is_whole(path)]):
        try:
            restore_dense(checkpoint, base)
            return str(checkpoint)
        except (DeltaFormatError, WrongBaseError) as error:
            # Of the last, it may rest on one that a training that was resumed before it has written again.
            errors.append(error)
            logger.warning(f"{checkpoint} cannot be restored, an earlier one is taken: {error}")
    if errors:
        raise errors[0]
    return None


def _new_holder(output: Path, stack: ExitStack) -> Path:
    """Return a hidden folder in the output folder, removed with the stack, or by the next process if it is killed."""
    output.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(LockedFolder(output, _HOLDER))


def _is_visible(folder: Path) -> bool:
    try:
        check_visible(folder)
    except OutputError:
        return False
    return True


def _remove_dense(output_dir: Path, *but: str | Path | None) -> None:
    """Remove the dense weights of all delta checkpoints but some."""
    kept = {os.path.realpath(path) for path in but if path is not None}
    for checkpoint in checkpoints_in(output_dir):
        if os.path.realpath(checkpoint) not in kept:
            remove_dense(checkpoint)
