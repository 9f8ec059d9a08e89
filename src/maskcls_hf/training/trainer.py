"""transformers' Trainer for masks.

An exact normalizer of the loss, evaluation in constant memory, checkpoints that are whole or absent, resumes that
change nothing.

Three private methods of `Trainer` are overridden, each for a reason that its docstring gives; the rest is public
methods and callbacks.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import seed_worker

from ..data import AugmentedDataset, EpochSampler, MaskClsCollator, SegmentationDataset
from ..data.validation.occurrence import refuse_binary_masks
from ..hub.card_options import card_options
from ..hub.model_card import write_model_card
from ..hub.push import push
from ..models.options import require_range
from ..models.post_processing import give_back_memory
from ..utils.writing import replacing, saving_model
from .callbacks import CollapseGuard, TimeBudget, choose_annealing
from .checkpoints import (
    CheckpointLoads,
    CorruptCheckpoint,
    checkpoint_to_resume,
    require_whole_checkpoint,
    rng_free,
    rotate,
    saving,
)
from .divergence import check_finite, check_weights, evaluation_after, reraise_as_divergence
from .lora import network_of, save_base
from .processes import filled_up, items_of_step, own_class, share_buffers, whole_norm, without_copies
from .progress import LossMeans
from .stopping import EvaluationStopped, shield_workers

STATE, ARGUMENTS = "trainer_state.json", "training_args.bin"  # as Trainer names them
CALLBACKS, EMA = "callbacks.pt", "ema.pt"
_NO_TRUTH = "The evaluator needs ground_truth: eval_collator with keep_ground_truth=True gives it."
_REPLACED_BY = "maskcls_hf.metrics.Evaluator(...) measures"
OTHERS = {
    "compute_metrics": f"evaluator={_REPLACED_BY} each image, and gives the scores",
    "preprocess_logits_for_metrics": f"logits are never gathered; evaluator={_REPLACED_BY} them",
}


class MaskClsTrainer(Trainer):
    """`Trainer` for samples of images and segments.

    It differs in this:

    - The loss of a step is divided by the counts of the whole step, over accumulated batches and processes: 2
      processes, or 2 accumulated batches, give the gradients of one batch of twice the size.
    - Evaluation reduces each image to measurements on the spot; masks of many sizes are never gathered.
    - Samples reach the collator whole (`remove_unused_columns=False`).
    - A loss, gradient or weight that is NaN or infinite ends the training with a `DivergenceError`.
    - The masked attention of a new EoMT is annealed; a collapse to empty masks is warned of.
    - The log has the terms of the loss (of the deepest decoder layer, unweighted) beside their sum.
    - A checkpoint is whole or absent; a damaged one is named and skipped. It also has the averaged weights, and the
      state of callbacks with `state_dict()` and `load_state_dict()`.
    - After a resume losses and weights are those of an uninterrupted training, on a CPU bit for bit, if samples depend
      on nothing random but the sampler's keys.
    - Cards and pushes are those of `maskcls push`.

    Args:
        model: as for `Trainer`.
        args: as for `Trainer`; `remove_unused_columns`, `batch_eval_metrics` and `logging_nan_inf_filter` are set.
        data_collator: makes batches of samples; None: a `MaskClsCollator` with the `processing_class`.
        sampler: order of the training samples, with `set_epoch`, such as `maskcls_hf.data.EpochSampler`; None:
            that for an `AugmentedDataset` (else each epoch would show the same crops), else random.
        evaluator: its `measure(outputs, ground_truth)` gives measurements of each image, and its call the scores;
            None evaluates the loss alone.
        eval_collator: for evaluation, without augmentation; None: `data_collator`. With an evaluator its batches have
            `ground_truth`.
        ema: running average of the weights, such as `ExponentialMovingAverage`, updated after each step; evaluation
            and the final `save_model()` use it.
        mask_annealing: of an EoMT's masked attention: True, False, or its intervals, see `MaskAnnealing`; None: True
            for an EoMT that was not loaded from a checkpoint. A `TimeBudget` among the callbacks counts for it.
        kwargs: as for `Trainer`, without `compute_metrics` and `preprocess_logits_for_metrics`, which `evaluator`
            replaces.

    Raises:
        TypeError: one of these two is given.
        ValueError: there is neither a collator nor an image processor to make one with; `torch.nn.DataParallel` would
            be used (several GPUs, one process), which splits each mask; checkpoints would be written on each node;
            masks have 255 for a class, and it is read as void; or FSDP shares out weights that are to be averaged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        data_collator: Callable[..., Any] | None = None,
        *,
        sampler: Sampler[Any] | None = None,
        evaluator: Any = None,
        eval_collator: Callable[..., Any] | None = None,
        ema: Any = None,
        mask_annealing: bool | Sequence[Sequence[float]] | None = None,
        **kwargs: Any,
    ):
        train_dataset = kwargs.get("train_dataset")
        for name, why in OTHERS.items():
            if kwargs.pop(name, None) is not None:
                raise TypeError(f"MaskClsTrainer has no {name}: {why}.")
        _check_and_set(args, train_dataset, evaluator)
        if data_collator is None and train_dataset is None:
            data_collator = eval_collator
        if data_collator is None:
            data_collator = _collator_of(kwargs.get("processing_class"))
            if evaluator is not None and eval_collator is None:
                eval_collator = _collator_of(kwargs.get("processing_class"), keep_ground_truth=True)
        self._loads = CheckpointLoads(None)
        callbacks = [_Follow(self), *(kwargs.get("callbacks") or ())]
        budget = next((callback for callback in callbacks if isinstance(callback, TimeBudget)), None)
        annealing = None
        if train_dataset is not None:
            annealing = choose_annealing(model, mask_annealing, None if budget is None else budget.progress)
        kwargs["callbacks"] = callbacks if annealing is None else [*callbacks, annealing]
        super().__init__(model=model, args=args, data_collator=data_collator, compute_metrics=evaluator, **kwargs)
        if ema is not None and self.is_fsdp_enabled:
            raise ValueError("FSDP shares out the weights, but their average needs them whole: leave out ema.")
        if isinstance(train_dataset, AugmentedDataset) and isinstance(train_dataset.dataset, SegmentationDataset):
            refuse_binary_masks(train_dataset.dataset)
        if sampler is None and isinstance(train_dataset, AugmentedDataset):
            sampler = EpochSampler(len(train_dataset), args.seed)
        self.sampler, self.ema, self.evaluator = sampler, ema, evaluator
        self.eval_collator = eval_collator or self.data_collator
        if evaluator is not None and not getattr(self.eval_collator, "keep_ground_truth", True):
            raise ValueError(_NO_TRUTH)
        forward = network_of(self.accelerator.unwrap_model(self.model)).forward
        self.model_accepts_loss_kwargs = "num_items_in_batch" in inspect.signature(forward).parameters
        self._evaluated: Any = None  # ground truth of the batch
        self._losses: dict[str, Tensor] = {}  # of the step that is under way
        self._means = LossMeans()
        self._guard = CollapseGuard()

    def add_callback(self, callback: Any) -> None:
        """As `Trainer.add_callback`."""
        self.callback_handler.callbacks = [c for c in self.callback_handler.callbacks if not isinstance(c, _LogAtSaves)]
        super().add_callback(callback)
        self.callback_handler.callbacks.append(_LogAtSaves())  # the last one: it sees what the others have asked for

    # -- data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Loader of the training samples, in the order of the sampler; else as of `Trainer`."""
        self._loads.end()
        args, dataset = self.args, self.train_dataset
        if self.sampler is None or dataset is None or isinstance(dataset, IterableDataset):
            return _protected(super().get_train_dataloader(), args.seed)
        loader = DataLoader(
            dataset,
            self._train_batch_size,
            sampler=self.sampler,
            collate_fn=self.data_collator,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        return _protected(self.accelerator.prepare(loader), args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As `Trainer.get_eval_dataloader`, with `eval_collator`, and of every image."""
        with self._evaluating():
            return _protected(super().get_eval_dataloader(eval_dataset), self.args.seed)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As `Trainer.get_test_dataloader`, with `eval_collator`, and of every image."""
        with self._evaluating():
            return _protected(super().get_test_dataloader(test_dataset), self.args.seed)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Data loaders made inside use `eval_collator` and every image (`dataloader_drop_last` is for training)."""
        kept = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = kept

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of an optimizer step, and what its loss is divided by.

        Args:
            epoch_iterator: of batches.
            num_batches: that make a step; fewer come at the end of an epoch.
            device: not looked at: the number goes to that of the arguments.
        """
        batches = list(islice(epoch_iterator, num_batches))
        return batches, self.num_items(batches) if batches else None

    def num_items(self, batches: list[Any], weight: float = 1.0) -> Tensor | None:
        """What the loss of these batches is divided by, over all processes; see [`items_of_step`].

        Args:
            batches: of this process.
            weight: of their counts.

        Returns:
            None for a model whose `forward` takes no `num_items_in_batch`.
        """
        if not self.model_accepts_loss_kwargs:
            return None
        over_all = self.accelerator if self.args.average_tokens_across_devices else None
        config = self.accelerator.unwrap_model(self.model).config
        return items_of_step(batches, config, over_all, weight).to(self.args.device)

    # -- loss ------------------------------------------------------------------------------------------------------

    @property
    def _shares_the_loss(self) -> bool:
        """Each process has its share of a sum, instead of dividing by its own counts."""
        return self.model_accepts_loss_kwargs and self.args.average_tokens_across_devices

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As `Trainer.compute_loss`; the terms of the loss go to the log, and a collapse is looked for.

        Args:
            model: with its wrappers.
            inputs: a batch.
            return_outputs: give the outputs of the model, too.
            num_items_in_batch: see `num_items`.

        Raises:
            DivergenceError: the matching met costs that are not finite.
        """
        step = self.state.global_step
        moment = step + 1 if model.training else evaluation_after(step, self._evaluated)
        with reraise_as_divergence(moment, self.args.output_dir):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._guard.watch(outputs, inputs.get("class_labels"))
            terms = outputs.get("loss_dict") if hasattr(outputs, "get") else None  # with return_dict=False a tuple
            for name, term in {**(terms or {}), "loss": loss}.items():
                self._losses[name] = self._losses.get(name, 0) + term.detach()
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The step's loss and gradients are finite, before the optimizer uses them.

        Private: no callback is told the norm, which takes all gradients to compute. With a loss scaler (fp16)
        gradients may overflow: it skips them.
        """
        norm = whole_norm(super()._get_grad_norm(*args, **kwargs))  # type: ignore[no-untyped-call]
        give_back_memory()
        losses, self._losses = self._losses, {}
        loss, checked = losses.pop("loss"), norm if self.accelerator.scaler is None else None
        check_finite(loss, losses, self.state.global_step + 1, self.args.output_dir, checked)
        self._means.add(losses)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the terms of the loss."""
        if "loss" in logs and self._means:  # as the loss; none of models that tell their loss alone
            logs |= self._means.pop(self.accelerator, "sum" if self._shares_the_loss else "mean")
        if "loss" in logs:
            max_steps = self.state.max_steps
            self._guard.check(self.state.global_step, max_steps, self.args.get_warmup_steps(max_steps))
        super().log(logs, start_time)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`.

        Where a signal has stopped it there are no scores ([`StopTraining`]): the training ends with a checkpoint, and a
        resume begins with the evaluation.
        """
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationStopped:
            if self.evaluator is not None:
                self.evaluator.reset()
            control = self.control
            control.should_training_stop, control.should_evaluate = True, False
            control.should_save = self.args.eval_strategy == "epoch"  # after steps the end of the epoch saves
            metric = self.args.metric_for_best_model  # which Trainer looks for
            return {} if metric is None else {f"eval_{metric.removeprefix('eval_')}": math.nan}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, with the averaged weights."""
        with self.averaged_weights():
            share_buffers(self.accelerator.unwrap_model(self.model))
            return super().evaluation_loop(*args, **kwargs)

    def averaged_weights(self) -> Any:
        """Context in which the model has the averaged weights."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.accelerator.unwrap_model(self.model))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Loss, measurements of each image, and zeros (B,) where Trainer expects labels.

        The loss is that of the batches of all processes, where it is divided by the counts of all.

        Args:
            model: with its wrappers.
            inputs: a batch, with `ground_truth` where there is an evaluator.
            prediction_loss_only: no measurements.
            ignore_keys: not looked at.

        Raises:
            ValueError: an evaluator without `ground_truth`.
        """
        number = len(inputs["pixel_values"])
        inputs, weight = without_copies(inputs, self.accelerator)
        inputs = self._prepare_inputs(inputs)
        if self.args.bf16_full_eval or self.args.fp16_full_eval:  # outside of a training Trainer casts the weights
            dtype = self.accelerator.unwrap_model(self.model).dtype
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        ground_truth = self._evaluated = inputs.pop("ground_truth", None)
        with torch.no_grad(), self.compute_loss_context_manager():
            items = self.num_items([inputs], weight)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        loss = loss.detach()
        if self._shares_the_loss:
            loss = self.accelerator.reduce(loss * weight, "mean")
        if prediction_loss_only or self.evaluator is None:
            return loss, None, None
        if ground_truth is None:
            raise ValueError(_NO_TRUTH)
        measurements = self.evaluator.measure(outputs, ground_truth)
        measurements = {name: values.to(loss.device) for name, values in filled_up(measurements, number).items()}
        return loss, measurements, loss.new_zeros(number)

    # -- resuming --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: True: go on from the last whole checkpoint of the output folder; a path names one,
                which must be whole.
            args: of `Trainer.train`.
            kwargs: of `Trainer.train`.

        Raises:
            CheckpointNotFound: there is none.
            CorruptCheckpoint: none is whole, or what it holds is not for this training.
            DivergenceError: the loss, a gradient or a weight became NaN or infinite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoint_to_resume(Path(str(self.args.output_dir)), self.accelerator))
        elif resume_from_checkpoint:
            require_whole_checkpoint(resume_from_checkpoint)
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model:
            # After an evaluation Accelerate takes the model for prepared, and processes would not average gradients.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        checkpoint = resume_from_checkpoint or None
        # Trainer loads until it asks for the training data, and from the scheduler to its first event.
        with CheckpointLoads(checkpoint) as self._loads:
            self._loads.begin()
            if checkpoint is not None:
                self._check_states(Path(checkpoint))
                self._load_own_states(Path(checkpoint))
            return super().train(checkpoint, *args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.create_scheduler`; what is loaded next is the state of optimizer and scheduler."""
        scheduler = super().create_scheduler(*args, **kwargs)
        self._loads.begin()
        return scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch; before it the evaluation that a signal has kept out of the checkpoint.

        Private, as callbacks end a training only after a step: after the last step, and where a signal stops that
        evaluation, there is none. Trainer does not reach the sampler after a resume in several processes.
        """
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        best = self.state.best_model_checkpoint
        if self.control.should_training_stop and self.args.load_best_model_at_end and best is not None:
            require_whole_checkpoint(best)  # which Trainer loads next
            self._loads.begin(best)

    def _check_states(self, checkpoint: Path) -> None:
        """Trainer would begin anew where its state is missing, and fail anywhere where it is of another kind."""
        file = checkpoint / STATE
        if not file.is_file():
            raise CorruptCheckpoint(f"{file} is missing.")
        state = TrainerState.load_from_json(str(file))
        for name in ("global_step", "train_batch_size", "total_flos"):
            require_range(name, getattr(state, name), "[0, inf)", integer=name != "total_flos")
        if not isinstance(state.log_history, list) or not all(isinstance(e, dict) for e in state.log_history):
            raise TypeError("log_history must be a list, each keys and values")
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        file = checkpoint / f"rng_state{rank}.pth"
        if file.is_file():
            numbers = torch.load(file, weights_only=True)
            random.Random().setstate(numbers["python"])
            np.random.RandomState().set_state(numbers["numpy"])
            torch.Generator().set_state(numbers["cpu"])

    def _load_own_states(self, checkpoint: Path) -> None:
        """Of callbacks, and the average."""
        states = torch.load(checkpoint / CALLBACKS, weights_only=True)
        for name, callback in self._stateful():
            if name in states:
                callback.load_state_dict(states[name])
        self.load_average(checkpoint)

    def load_average(self, checkpoint: Path) -> None:
        """The averaged weights of a checkpoint, if this training has an average."""
        if self.ema is None:
            return
        file = checkpoint / EMA
        if not file.is_file():
            raise CorruptCheckpoint(f"{file} is missing: the checkpoint is of a training without averaged weights.")
        self.ema.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _stateful(self) -> list[tuple[str, Any]]:
        callbacks = self.callback_handler.callbacks
        return [(type(c).__name__, c) for c in callbacks if hasattr(c, "state_dict") and hasattr(c, "load_state_dict")]

    # -- writing ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint that is whole or absent, and has all that an exact resume needs.

        Private, as Trainer writes file by file into the folder that a resume would take, and callbacks come after.
        """
        args, step = self.args, self.state.global_step
        final = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        check_weights(model, step, final.parent)
        with saving(final, self.accelerator) as folder:
            with _set(args, output_dir=str(folder.parent), push_to_hub=False):
                super()._save_checkpoint(model, None)  # no trial: it would add the name of its folder
            if self.state.best_model_checkpoint == str(folder):
                self.state.best_model_checkpoint = str(final)
            if args.should_save:
                self._save_more(folder)
        if args.should_save:
            rotate(final.parent, args.save_total_limit, final, self.state.best_model_checkpoint)
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _save_more(self, folder: Path) -> None:
        """What Trainer does not save, or saves with the temporary name."""
        torch.save({name: callback.state_dict() for name, callback in self._stateful()}, folder / CALLBACKS)
        torch.save(self.args, folder / ARGUMENTS)
        self.state.save_to_json(str(folder / STATE))
        if self.ema is not None:
            torch.save(self.ema.state_dict(), folder / EMA)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, whole or not at all, with averaged weights if there are any.

        Inside a checkpoint (`_internal_call`) with its own. With `TrainingArguments(push_to_hub=True)` [`push_to_hub`]
        follows.
        """
        folder, network = str(output_dir or self.args.output_dir), self.accelerator.unwrap_model(self.model)
        is_direct = _internal_call or not self.args.should_save  # into a checkpoint; or it writes nothing
        with (
            nullcontext() if _internal_call else self.averaged_weights(),
            own_class(network),
            _own_names(network) if _internal_call else nullcontext(),
            nullcontext(folder) if is_direct else saving_model(Path(folder)) as out,
        ):
            super().save_model(str(out), _internal_call=True)
            if self.args.should_save:
                save_base(network, out)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def save_state(self) -> None:
        """Write `trainer_state.json`, whole or not at all."""
        if self.is_world_process_zero():
            with replacing(Path(str(self.args.output_dir)) / STATE) as path:
                self.state.save_to_json(str(path))

    # -- the Hub ---------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` into the output folder, where the model is saved (`save_model`).

        Args:
            args: none: arguments are given by name.
            kwargs: see [`card_options`].

        Raises:
            FileNotFoundError: no model is saved there.
            TypeError: an argument without a name.
        """
        if args:
            raise TypeError("create_model_card takes its arguments by name.")
        if self.is_world_process_zero():
            options = card_options(**kwargs)
            self.save_state()
            write_model_card(str(self.args.output_dir), options)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and upload it with its card, and nothing else of the output folder. All processes call it.

        Args:
            commit_message: of the upload.
            blocking: wait for the end of the upload; False returns a `Future`.
            token: of the Hub; None: that of the arguments, or of the login.
            revision: branch; None: that of the arguments.
            private: whether a new repository is; None: as the arguments say.
            kwargs: see [`card_options`].
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        options = card_options(**kwargs)
        token = args.hub_token if token is None else token
        private = args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            with _set(args, hub_private_repo=private):
                self.init_hf_repo(token=token)
        with _set(args, push_to_hub=False):
            self.save_model()
        if not self.is_world_process_zero():
            return None
        self.save_state()
        self._finish_current_push()
        upload: dict[str, Any] = {
            "private": private,
            "token": token,
            "revision": revision or args.hub_revision,
            "commit_message": commit_message or "End of training",
        }
        upload_now = push if blocking else partial(HfApi().run_as_future, push)
        return upload_now(str(args.output_dir), str(self.hub_model_id), options, **upload)


class _Follow(TrainerCallback):
    """Averages the weights, and tells when a checkpoint is loaded."""

    def __init__(self, trainer: MaskClsTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._loads.end()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.trainer.load_average(Path(state.best_model_checkpoint))
        self.trainer._loads.end()


class _LogAtSaves(TrainerCallback):
    """No mean of logged losses spans a checkpoint: a resume has only its second part."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


@contextmanager
def _set(args: TrainingArguments, **values: Any) -> Iterator[None]:
    """Inside, arguments have these values."""
    kept = {name: getattr(args, name) for name in values}
    try:
        vars(args).update(values)
        yield
    finally:
        vars(args).update(kept)


@contextmanager
def _own_names(network: nn.Module) -> Iterator[None]:
    """Inside, weights are saved by their names of this version of transformers.

    By default it saves those of some ViTs by older names, which a Trainer that resumes does not find: it would go on
    with its new weights.
    """
    if not isinstance(network, PreTrainedModel):
        yield
        return
    network.save_pretrained = partial(network.save_pretrained, save_original_format=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del network.save_pretrained


def _protected(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """A loader that leaves the random numbers of the model alone, and whose workers outlive signals to the group."""
    return shield_workers(rng_free(loader, seed))


def _collator_of(image_processor: Any, **options: Any) -> MaskClsCollator:
    if not isinstance(image_processor, BaseImageProcessor):
        raise ValueError(
            "MaskClsTrainer needs data_collator=maskcls_hf.data.MaskClsCollator(image_processor), or the image "
            "processor as processing_class."
        )
    return MaskClsCollator(image_processor, **options)


def _check_and_set(args: TrainingArguments, train_dataset: Any, evaluator: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: start one process a GPU with `accelerate launch` or "
            "`torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if args.save_on_each_node:
        raise ValueError("save_on_each_node=True: checkpoints are written to one folder that all nodes share.")
    args.remove_unused_columns = False
    args.batch_eval_metrics = evaluator is not None
    args.logging_nan_inf_filter = False  # waits for the device in each batch, and hides what check_finite reports
    loading: Any = args.accelerator_config
    if isinstance(train_dataset, IterableDataset) and loading.dispatch_batches is None:
        loading.dispatch_batches = False  # lists of masks cannot be cut up and sent to processes
