"""transformers' Trainer for masks: an exact normaliser of the loss and evaluation in constant memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..criterion import count_items
from ..metrics.evaluator import SemanticEvaluator


class MaskClsTrainer(Trainer):
    """`Trainer` with three differences.

    - The loss of a step is divided by the counts of the whole step, over accumulated batches and processes: 2
      processes, or 2 accumulated batches, give the gradients of one batch of twice the size.
    - Evaluation reduces each batch to confusion matrices on the spot; masks of many sizes are never gathered.
    - Samples reach the collator whole (`remove_unused_columns=False`).

    Args:
        evaluator: gives mean IoU on evaluation; None evaluates the loss alone.
        eval_collator: for evaluation, without augmentation; None: `data_collator`.
        kwargs: as for `Trainer`, without `compute_metrics`.

    Raises:
        ValueError: `torch.nn.DataParallel` would be used (several GPUs, one process); it splits each mask.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        evaluator: SemanticEvaluator | None = None,
        eval_collator: Callable[..., Any] | None = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one process a GPU with `accelerate launch` or "
                "`torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        args.remove_unused_columns = False
        args.batch_eval_metrics = evaluator is not None
        super().__init__(model=model, args=args, compute_metrics=cast(Any, evaluator), **kwargs)
        self.evaluator = evaluator
        self.eval_collator = eval_collator or self.data_collator
        forward = self.accelerator.unwrap_model(self.model).forward
        self.num_queries = getattr(model.config, "num_queries", 0)
        self.model_accepts_loss_kwargs = "num_items_in_batch" in inspect.signature(forward).parameters

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

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """What the loss of one optimiser step is divided by, over its accumulated batches and all processes."""
        if not batch_samples or not self.model_accepts_loss_kwargs:
            return None
        counts = torch.stack([count_items(batch["class_labels"], self.num_queries) for batch in batch_samples])
        counts = counts.sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, confusion matrix of each image (B, K, K), and zeros (B,) where Trainer expects labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            items = self._get_num_items_in_batch([inputs], self.args.device)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        loss = loss.detach()
        if prediction_loss_only or self.evaluator is None:
            return loss, None, None
        counts = self.evaluator.batch_counts(outputs, inputs)
        return loss, counts, counts.new_zeros(len(counts))
