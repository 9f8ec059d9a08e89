"""transformers' Trainer with checkpoints that are whole or absent, and resumes that change nothing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerState

from ..models.options import require_range
from ..utils.writing import replacing, saving_model
from .checkpoints import NoGoodCheckpoint, checkpoint_to_resume, rng_free, rotate, saving, verify
from .divergence import check_weights
from .processes import own_class
from .unpickling import tensors_only

TRAINER_STATE_NAME = "trainer_state.json"  # as Trainer names it
CALLBACKS, EMA = "callbacks.pt", "ema.pt"


class CheckpointingTrainer(Trainer):
    """`Trainer` with these differences.

    - A checkpoint is whole or absent, a damaged one is named and skipped.
    - After a resume losses and weights are those of an uninterrupted training, on a CPU bit for bit, if samples depend
      on nothing random but the sampler's keys.
    - Checkpoints also have the averaged weights, and the state of callbacks with `state_dict()` and
      `load_state_dict()`.

    Args:
        sampler: order of the training samples, with `set_epoch`; None: random.
        ema: running average of the weights: `update(model)`, `swapped(model)`, `state_dict()`, `load_state_dict()`.
        kwargs: as for `Trainer`.
    """

    def __init__(self, *, sampler: Sampler | None = None, ema: Any = None, **kwargs: Any):
        if kwargs["args"].save_on_each_node:
            raise ValueError("save_on_each_node=True: checkpoints are written to one folder that all nodes share.")
        super().__init__(**kwargs)
        if ema is not None and self.is_fsdp_enabled:
            raise ValueError("FSDP shares out the weights, but their average needs them whole: leave out ema.")
        self.sampler = sampler
        self.ema = ema
        self._writing_to: Path | None = None
        if ema is not None:
            self.add_callback(_Average(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. `resume_from_checkpoint=True` goes on from the last whole checkpoint of the output
        folder; a path names one, which must be whole.

        Raises:
            NoGoodCheckpoint: there is none.
            DivergenceError: the loss, a gradient or a weight became NaN or infinite.
        """
        if resume_from_checkpoint is True:
            found = checkpoint_to_resume(Path(str(self.args.output_dir)), self.accelerator)
            if found is None:
                raise NoGoodCheckpoint(f"There is no checkpoint in {self.args.output_dir} to go on from.")
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            _require_whole(resume_from_checkpoint)
        if resume_from_checkpoint:
            _check_state(resume_from_checkpoint)
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model:
            # After an evaluation Accelerate takes the model for prepared, and processes would not average gradients.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    # -- the same samples and random numbers after a resume ---------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return rng_free(super()._get_dataloader(*args, **kwargs), self.args.seed)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch; none after the last step, where `Trainer` would make one step more when it resumes mid-epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:  # Trainer does not reach it after a resume in several processes
            set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_save:  # no mean of logged losses spans a checkpoint: a resume has only its second part
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # -- writing ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing_to is None else str(self._writing_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        check_weights(model, self.state.global_step, final.parent)
        with saving(final, self.accelerator) as folder:
            self._writing_to = folder.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            if self.args.should_save:
                self._save_more(folder, final)
        if self.args.should_save:
            rotate(final.parent, self.args.save_total_limit, final, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _save_more(self, folder: Path, final: Path) -> None:
        """What Trainer does not save, or saves with the temporary name."""
        torch.save({name: callback.state_dict() for name, callback in self._stateful()}, folder / CALLBACKS)
        if self.ema is not None:
            torch.save(self.ema.state_dict(), folder / EMA)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing_to is None:  # once the checkpoint has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, with averaged weights if there are any; inside a checkpoint (`_internal_call`) with its own."""
        with nullcontext() if _internal_call else self.averaged_weights():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = str(output_dir or self.args.output_dir)
        is_direct = self._writing_to is not None or not self.args.should_save  # into a checkpoint; or it writes nothing
        with (
            own_class(self.accelerator.unwrap_model(self.model)),
            nullcontext(folder) if is_direct else saving_model(Path(folder)) as out,
        ):
            super()._save(str(out), state_dict)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with replacing(Path(str(self.args.output_dir)) / TRAINER_STATE_NAME) as path:
                self.state.save_to_json(str(path))

    def averaged_weights(self) -> Any:
        """Context in which the model has the averaged weights."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.accelerator.unwrap_model(self.model))

    # -- loading -----------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with tensors_only(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else tensors_only(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with tensors_only(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            states = torch.load(Path(checkpoint) / CALLBACKS, weights_only=True)
            for name, callback in self._stateful():
                if name in states:
                    callback.load_state_dict(states[name])
            self._load_ema(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else tensors_only(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_best_model(self) -> None:
        best = cast(str, self.state.best_model_checkpoint)
        _require_whole(best)
        with tensors_only(best):
            super()._load_best_model()
            self._load_ema(best)

    def _load_ema(self, checkpoint: str) -> None:
        if self.ema is None:
            return
        file = Path(checkpoint) / EMA
        if not file.is_file():
            raise NoGoodCheckpoint(f"{file} is missing: the checkpoint is of a training without averaged weights.")
        self.ema.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _stateful(self) -> list[tuple[str, Any]]:
        callbacks = self.callback_handler.callbacks
        return [(type(c).__name__, c) for c in callbacks if hasattr(c, "state_dict") and hasattr(c, "load_state_dict")]


def _require_whole(checkpoint: str) -> None:
    problem = verify(Path(checkpoint))
    if problem is not None:
        raise NoGoodCheckpoint(f"{checkpoint} is not a whole checkpoint: {problem}.")


def _check_state(checkpoint: str) -> None:
    """Trainer would begin anew where its state is missing, and fail anywhere where it is of another kind."""
    file = Path(checkpoint) / TRAINER_STATE_NAME
    if not file.is_file():
        raise NoGoodCheckpoint(f"{file} is missing.")
    with tensors_only(checkpoint):  # for its errors
        state = TrainerState.load_from_json(str(file))
        for name in ("global_step", "train_batch_size", "total_flos"):
            require_range(name, getattr(state, name), "[0, inf)", integer=name != "total_flos")
        if not isinstance(state.log_history, list) or not all(isinstance(e, dict) for e in state.log_history):
            raise TypeError("log_history must be a list, each keys and values")


class _Average(TrainerCallback):
    def __init__(self, trainer: CheckpointingTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.ema.update(self.trainer.accelerator.unwrap_model(self.trainer.model))
