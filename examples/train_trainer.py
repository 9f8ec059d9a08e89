"""Train or fine-tune a mask-classification model on a folder of images, with transformers' Trainer.

The folder holds labels.json and SPLIT/images with SPLIT/labels (class maps) or SPLIT/instances (instance maps), see
maskcls_hf.data.SegmentationFolder. From scratch, then fine-tuned on another folder:

    python examples/train_trainer.py --data camvid --output runs/camvid --preset small --epochs 100
    python examples/train_trainer.py --data mine --output runs/mine --model runs/camvid --epochs 20
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.utils.data import Subset
from transformers import ResNetConfig, TrainingArguments, set_seed

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.data import CentreCrop, MaskClsCollator, SegmentationFolder, train_transform
from maskcls_hf.metrics import SemanticEvaluator
from maskcls_hf.training import SCHEDULES, MaskClsTrainer, TimeBudget, build_optimizer


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    files = parser.add_argument_group("files")
    files.add_argument("--data", type=Path, required=True, help="folder with labels.json and the splits")
    files.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the final model")
    files.add_argument("--train-split", default="train", help="its folder in DATA (default: %(default)s)")
    files.add_argument("--eval-split", default="val", help="its folder in DATA (default: %(default)s)")
    files.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT")

    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="fine-tune this saved model; its classes are replaced by DATA's")
    model.add_argument("--preset", choices=sorted(PRESETS), default="small", help="else one of this size from scratch")
    model.add_argument("--num-queries", type=int, help="N, most segments of an image, for a model from scratch")
    model.add_argument("--dice-weight", type=float, default=1.0, help="lambda_dice of a model from scratch (1)")
    model.add_argument("--autocontrast", action="store_true", help="the image processor stretches contrast; dim images")
    model.add_argument("--image-size", type=int, default=512, help="shortest edge in use, 0 to keep sizes (512)")

    augmentation = parser.add_argument_group("training crops")
    augmentation.add_argument("--crop", type=int, default=256, help="height and width in pixels (256)")
    augmentation.add_argument(
        "--scale", type=float, nargs=2, default=(0.5, 2.0), metavar=("LOW", "HIGH"), help="enlargement (0.5 2.0)"
    )
    augmentation.add_argument("--by-area", action="store_true", help="large images are seen more often, by their area")
    augmentation.add_argument("--any-orientation", action="store_true", help="quarter turns; for images without an up")
    augmentation.add_argument("--any-contrast", action="store_true", help="also invert, blur, stretch; for microscopes")
    augmentation.add_argument("--colour-jitter", type=float, default=0.4, help="strength, 0 for none (0.4)")

    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=100, help="(100)")
    length.add_argument("--max-steps", type=int, help="instead of epochs")
    training.add_argument("--max-minutes", type=float, help="end on time: the schedule then follows the clock too")
    training.add_argument("--batch-size", type=int, default=8, help="images a step and process (8)")
    training.add_argument("--accumulate", type=int, default=1, help="batches a step (1)")
    training.add_argument("--lr", type=float, default=1e-4, help="(1e-4)")
    training.add_argument("--backbone-multiplier", type=float, default=1.0, help="its part of the learning rate (1)")
    training.add_argument("--weight-decay", type=float, default=1e-2, help="not on norms and embeddings (0.01)")
    training.add_argument("--schedule", choices=sorted(SCHEDULES), default="poly", help="(poly)")
    training.add_argument("--warmup-steps", type=int, default=100, help="(100)")
    training.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient, 0 for none (1)")
    training.add_argument("--bf16", action="store_true", help="mixed precision; loss and matching stay in float32")
    training.add_argument("--seed", type=int, default=0, help="(0)")
    training.add_argument("--workers", type=int, default=2, help="processes that load images (2)")
    training.add_argument("--cache", action="store_true", help="each of them keeps the decoded images in memory")

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--eval-crop", type=int, help="evaluate the middle of images; default: whole images")
    evaluation.add_argument("--eval-every", type=int, default=500, help="steps between evaluations (500)")
    evaluation.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (500)")
    evaluation.add_argument("--log-every", type=int, default=50, help="steps between lines of the log (50)")
    arguments = parser.parse_args(argv)
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model}: no saved model there (config.json is missing)")
    if arguments.resume and not any(arguments.output.glob("checkpoint-*")):
        parser.error(f"--resume: no checkpoint in {arguments.output}")
    return arguments


# -- model -------------------------------------------------------------------------------------------------------


def small_resnet(widths: list[int], depths: list[int]) -> ResNetConfig:
    """A ResNet of basic blocks; its stages have strides 4, 8, 16, ..."""
    return ResNetConfig(
        embedding_size=widths[0],
        hidden_sizes=widths,
        depths=depths,
        layer_type="basic",
        out_features=[f"stage{index + 1}" for index in range(len(widths))],
    )


# Small ones have three stages, so that the transformer sees the image at stride 16: small things stay apart.
PRESETS = {
    "tiny": dict(
        backbone_config=small_resnet([16, 32], [1, 1]),
        pixel_decoder="fpn",
        fpn_feature_size=32,
        mask_feature_size=32,
        hidden_size=32,
        num_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=64,
        num_queries=20,
        dropout=0.0,
    ),
    "small": dict(
        backbone_config=small_resnet([32, 64, 192], [2, 2, 2]),
        pixel_decoder="fpn_encoder",
        encoder_layers=2,
        encoder_ffn_dim=256,
        fpn_feature_size=64,
        mask_feature_size=64,
        hidden_size=128,
        decoder_layers=3,
        decoder_ffn_dim=512,
        num_queries=64,
        dropout=0.0,
    ),
    "resnet50": dict(),
}


def build_model(arguments: argparse.Namespace, id2label: dict[int, str]) -> MaskClsForUniversalSegmentation:
    if arguments.model is not None:
        model = MaskClsForUniversalSegmentation.from_pretrained(arguments.model)
        return model if model.config.id2label == id2label else model.reset_classes(id2label)
    options = PRESETS[arguments.preset] | {"dice_weight": arguments.dice_weight}
    if arguments.num_queries is not None:
        options["num_queries"] = arguments.num_queries
    label2id = {name: label_id for label_id, name in id2label.items()}
    return MaskClsForUniversalSegmentation(MaskClsConfig(**options, id2label=id2label, label2id=label2id))


def build_image_processor(arguments: argparse.Namespace, data: SegmentationFolder) -> MaskClsImageProcessor:
    return MaskClsImageProcessor(
        do_resize=arguments.image_size > 0,
        size={"shortest_edge": arguments.image_size or 512, "longest_edge": 4 * (arguments.image_size or 512)},
        do_autocontrast=arguments.autocontrast,
        num_labels=len(data.id2label),
        label_ids_to_fuse=data.stuff_ids,
    )


def by_area(data: SegmentationFolder, side: int) -> Subset:
    """Each image as often as it holds squares of `side` pixels, and at least once."""
    sizes = [data[index]["image"].shape[-2:] for index in range(len(data))]
    return Subset(
        data, [i for i, (height, width) in enumerate(sizes) for _ in range(max(1, height * width // side**2))]
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse_arguments(argv)
    set_seed(arguments.seed)

    # -- data ----------------------------------------------------------------------------------------------------
    try:
        train_data = SegmentationFolder(arguments.data, arguments.train_split, cache=arguments.cache)
        eval_data = SegmentationFolder(arguments.data, arguments.eval_split, cache=arguments.cache)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"--data {arguments.data}: {error}")
    image_processor = build_image_processor(arguments, train_data)
    augment = train_transform(
        arguments.crop,
        scale=tuple(arguments.scale),
        any_orientation=arguments.any_orientation,
        colour_jitter=arguments.colour_jitter,
        any_contrast=arguments.any_contrast,
    )
    train_collator = MaskClsCollator(image_processor, augment, do_resize=False)
    if arguments.eval_crop:
        eval_collator = MaskClsCollator(image_processor, CentreCrop(arguments.eval_crop), do_resize=False)
    else:
        eval_collator = MaskClsCollator(image_processor)

    # -- model ---------------------------------------------------------------------------------------------------
    # channels_last: convolutions run faster, the numbers are the same.
    model = build_model(arguments, train_data.id2label).to(memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(train_data)} training and {len(eval_data)} evaluation images, classes {train_data.id2label}")
    print(f"{parameters / 1e6:.2f} million parameters, {model.config.num_queries} queries")

    # -- optimiser and schedule ----------------------------------------------------------------------------------
    optimizer = build_optimizer(model, arguments.lr, arguments.weight_decay, arguments.backbone_multiplier)
    training_arguments = TrainingArguments(
        output_dir=str(arguments.output),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        max_grad_norm=arguments.clip,
        bf16=arguments.bf16,
        seed=arguments.seed,
        dataloader_num_workers=arguments.workers,
        dataloader_persistent_workers=arguments.workers > 0,
        dataloader_drop_last=len(train_data) >= arguments.batch_size,  # batch norm needs more than one image
        logging_steps=arguments.log_every,
        eval_strategy="steps",
        eval_steps=arguments.eval_every,
        save_strategy="steps",
        save_steps=arguments.save_every,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )
    images_a_step = arguments.batch_size * arguments.accumulate * training_arguments.world_size
    max_steps = arguments.max_steps or math.ceil(arguments.epochs * max(1, len(train_data) // images_a_step))
    budget = TimeBudget(arguments.max_minutes)
    scheduler = budget.schedule(optimizer, arguments.schedule, arguments.warmup_steps, max_steps)

    # -- training ------------------------------------------------------------------------------------------------
    trainer = MaskClsTrainer(
        model=model,
        args=training_arguments,
        train_dataset=by_area(train_data, 2 * arguments.crop) if arguments.by_area else train_data,
        eval_dataset=eval_data,
        data_collator=train_collator,
        eval_collator=eval_collator,
        evaluator=SemanticEvaluator(image_processor, train_data.id2label),
        processing_class=image_processor,
        optimizers=(optimizer, scheduler),
        callbacks=[budget],
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)

    # -- result --------------------------------------------------------------------------------------------------
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


if __name__ == "__main__":
    main()
