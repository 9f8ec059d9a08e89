"""transformers' Trainer for masks: an exact normaliser of the loss, evaluation in constant memory, exact resumes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor

from ..data import AugmentedDataset, EpochSampler, MaskClsCollator
from ..hub.publishing_trainer import PublishingTrainer
from ..models.post_processing import give_back_memory
from .checkpointing_trainer import CheckpointingTrainer
from .divergence import check_finite, evaluation_after, forward_pass
from .processes import filled_up, items_of_step, share_buffers, without_copies

NO_TRUTH = "The evaluator needs ground_truth: eval_collator with keep_ground_truth=True gives it."


class MaskClsTrainer(PublishingTrainer, CheckpointingTrainer):
    """`CheckpointingTrainer` and `PublishingTrainer` with these differences.

    - The loss of a step is divided by the counts of the whole step, over accumulated batches and processes: 2
      processes, or 2 accumulated batches, give the gradients of one batch of twice the size.
    - Evaluation reduces each image to measurements on the spot; masks of many sizes are never gathered.
    - Samples reach the collator whole (`remove_unused_columns=False`).
    - A loss, gradient or weight that is NaN or infinite ends the training with a `DivergenceError`.
    - The log has the terms of the loss (of the deepest decoder layer, unweighted) beside their sum.

    Args:
        data_collator: makes batches of samples; None: a `MaskClsCollator` with the `processing_class`.
        sampler: order of the training samples, with `set_epoch`, such as `maskcls_hf.data.EpochSampler`; None:
            that for an `AugmentedDataset` (else each epoch would show the same crops), else random.
        evaluator: its `measure(outputs, ground_truth)` gives measurements of each image, and its call the scores;
            None evaluates the loss alone.
        eval_collator: for evaluation, without augmentation; None: `data_collator`. With an evaluator its batches have
            `ground_truth`.
        ema: running average of the weights, such as `ExponentialMovingAverage`, updated after each step; evaluation
            and the final `save_model()` use it. Checkpoints have both weights.
        kwargs: as for `Trainer`, without `compute_metrics` and `preprocess_logits_for_metrics`, which `evaluator`
            replaces.

    Raises:
        TypeError: one of these two is given.
        ValueError: there is neither a collator nor an image processor to make one with; `torch.nn.DataParallel` would
            be used (several GPUs, one process), which splits each mask; or checkpoints would be written on each node.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        data_collator: Callable[..., Any] | None = None,
        *,
        sampler: Sampler | None = None,
        evaluator: Any = None,
        eval_collator: Callable[..., Any] | None = None,
        ema: Any = None,
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
        if sampler is None and isinstance(train_dataset, AugmentedDataset):
            sampler = EpochSampler(len(train_dataset), args.seed)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            sampler=sampler,
            ema=ema,
            compute_metrics=evaluator,
            **kwargs,
        )
        self.evaluator = evaluator
        self.eval_collator = eval_collator or self.data_collator
        if evaluator is not None and not getattr(self.eval_collator, "keep_ground_truth", True):
            raise ValueError(NO_TRUTH)
        forward = self.accelerator.unwrap_model(self.model).forward
        self.model_accepts_loss_kwargs = "num_items_in_batch" in inspect.signature(forward).parameters
        self._grad_norm: Any = None
        self._evaluated: Any = None  # ground truth of the batch
        self._terms: dict[str, Tensor] = {}  # of the losses of the step that is under way
        self._logged: list[dict[str, Tensor]] = []  # of the steps since the last log
        self.add_callback(_CheckStep(self))

    # -- loss ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device, weight: float = 1.0) -> Tensor | None:
        """What the loss of one optimiser step is divided by, over its accumulated batches and all processes."""
        if not batch_samples or not self.model_accepts_loss_kwargs:
            return None
        over_all = self.accelerator if self.args.average_tokens_across_devices else None
        config = self.accelerator.unwrap_model(self.model).config
        return items_of_step(batch_samples, config, over_all, weight).to(device)

    @property
    def _shares_the_loss(self) -> bool:
        """Each process has its share of a sum, instead of dividing by its own counts."""
        return self.model_accepts_loss_kwargs and self.args.average_tokens_across_devices

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        step = self.state.global_step
        moment = step + 1 if model.training else evaluation_after(step, self._evaluated)
        with forward_pass(moment, self.args.output_dir):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name, term in {**(outputs.get("loss_dict") or {}), "loss": loss}.items():
                self._terms[name] = self._terms.get(name, 0) + term.detach()
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self._grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP: norms of the parts
        return self._grad_norm

    def check_step(self) -> None:
        """The step's loss and gradients are finite. With a loss scaler (fp16) gradients may overflow: it skips them."""
        give_back_memory()
        terms, self._terms = self._terms, {}
        loss = terms.pop("loss")
        grad_norm = self._grad_norm if self.accelerator.scaler is None else None
        check_finite(loss, terms, self.state.global_step + 1, self.args.output_dir, grad_norm)
        self._logged.append({name: term for name, term in terms.items() if not name[-1].isdigit()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        names = list(self._logged[0]) if self._logged else []  # none of models that tell their loss alone
        if "loss" in logs and names:
            means = torch.stack([torch.stack([terms[name] for name in names]) for terms in self._logged]).mean(0)
            means = self.accelerator.reduce(means, "sum" if self._shares_the_loss else "mean")  # as the loss
            logs |= dict(zip(names, means.tolist(), strict=True))
            self._logged = []
        super().log(logs, start_time)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._evaluating():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._evaluating():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Data loaders made inside use `eval_collator` and every image (`dataloader_drop_last` is for training)."""
        kept = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = kept

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.averaged_weights():
            share_buffers(self.accelerator.unwrap_model(self.model))
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Loss, measurements of each image, and zeros (B,) where Trainer expects labels.

        The loss is that of the batches of all processes, where it is divided by the counts of all.
        """
        number = len(inputs["pixel_values"])
        inputs, weight = without_copies(inputs, self.accelerator)
        inputs = self._prepare_inputs(inputs)
        if self.args.bf16_full_eval or self.args.fp16_full_eval:  # outside of a training Trainer casts the weights
            dtype = self.accelerator.unwrap_model(self.model).dtype
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        ground_truth = self._evaluated = inputs.pop("ground_truth", None)
        with torch.no_grad(), self.compute_loss_context_manager():
            items = self._get_num_items_in_batch([inputs], self.args.device, weight)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        loss = loss.detach()
        if self._shares_the_loss:
            loss = self.accelerator.reduce(loss * weight, "mean")
        if prediction_loss_only or self.evaluator is None:
            return loss, None, None
        if ground_truth is None:
            raise ValueError(NO_TRUTH)
        measurements = self.evaluator.measure(outputs, ground_truth)
        measurements = {name: values.to(loss.device) for name, values in filled_up(measurements, number).items()}
        return loss, measurements, loss.new_zeros(number)


OTHERS = {
    "compute_metrics": "evaluator=maskcls_hf.metrics.Evaluator(...) measures each image, and gives the scores",
    "preprocess_logits_for_metrics": "logits are never gathered; evaluator=maskcls_hf.metrics.Evaluator(...) measures "
    "them",
}


def _collator_of(image_processor: Any, **options: Any) -> MaskClsCollator:
    if not isinstance(image_processor, BaseImageProcessor):
        raise ValueError(
            "MaskClsTrainer needs data_collator=maskcls_hf.data.MaskClsCollator(image_processor), or the image "
            "processor as processing_class."
        )
    return MaskClsCollator(image_processor, **options)


class _CheckStep(TrainerCallback):
    def __init__(self, trainer: MaskClsTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.check_step()


def _check_and_set(args: TrainingArguments, train_dataset: Any, evaluator: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: start one process a GPU with `accelerate launch` or "
            "`torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    args.remove_unused_columns = False
    args.batch_eval_metrics = evaluator is not None
    args.logging_nan_inf_filter = False  # waits for the device in each batch, and hides what check_finite reports
    loading: Any = args.accelerator_config
    if isinstance(train_dataset, IterableDataset) and loading.dispatch_batches is None:
        loading.dispatch_batches = False  # lists of masks cannot be cut up and sent to processes
