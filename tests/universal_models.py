"""Tiny random universal models of transformers, which are sure of some segments, and their processors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPTokenizer,
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessor,
    OneFormerProcessor,
)

from checkpoints import CLASSES, STUFF, picture
from tiny import resnet, swin

SIZE = {"shortest_edge": 64, "longest_edge": 128}
DECODER = dict(
    hidden_dim=32, encoder_feedforward_dim=40, dim_feedforward=48, num_attention_heads=4, encoder_layers=1,
    decoder_layers=3, num_queries=9, train_num_points=112, id2label=CLASSES,
)  # fmt: skip
METADATA = {str(label): {"name": name, "isthing": label not in STUFF} for label, name in CLASSES.items()}


def maskformer() -> tuple[Any, Any]:
    detr = dict(
        model_type="detr", d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=9,
    )  # fmt: skip
    sizes = dict(fpn_feature_size=32, mask_feature_size=16, id2label=CLASSES)
    config = MaskFormerConfig(backbone_config=swin().to_dict(), decoder_config=detr, **sizes)
    return MaskFormerForInstanceSegmentation(config), MaskFormerImageProcessor(size=SIZE)


def mask2former() -> tuple[Any, Any]:
    config = Mask2FormerConfig(backbone_config=resnet(), feature_size=32, mask_feature_size=24, **DECODER)
    return Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(size=SIZE)


def eomt() -> tuple[Any, Any]:
    config = EomtConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8, num_blocks=2,
        num_queries=9, num_register_tokens=2, num_upscale_blocks=1, train_num_points=112, id2label=CLASSES,
    )  # fmt: skip
    model = EomtForUniversalSegmentation(config)
    model.attn_mask_probs.fill_(0)  # as published
    size = {"shortest_edge": 64, "longest_edge": 64}
    return model, EomtImageProcessor(size=size, do_pad=True, do_split_image=False)


def oneformer(folder: Path, **options: Any) -> tuple[Any, Any]:
    """`folder`: of its class metadata."""
    config = OneFormerConfig(
        backbone_config=swin(), conv_dim=32, mask_dim=32, task_seq_len=20, text_encoder_width=16,
        text_encoder_num_layers=1, text_encoder_vocab_size=60, text_encoder_context_length=20, text_encoder_n_ctx=2,
        **DECODER,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(METADATA))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[])
    options = dict(class_info_file="classes.json", repo_path=str(folder), num_text=5) | options
    images = OneFormerImageProcessor(size=SIZE, **options)
    return OneFormerForUniversalSegmentation(config), OneFormerProcessor(
        images, tokenizer, max_seq_length=20, task_seq_length=20
    )


@torch.no_grad()
def random_and_sure(build: Any, *arguments: Any) -> tuple[Any, Any]:
    """Queries differ in class and mask, and are sure of both."""
    torch.manual_seed(0)
    model, processor = build(*arguments)
    for name, value in model.named_parameters():
        if value.ndim > 1 and "embed" in name and "quer" in name:
            value.copy_(3 * torch.randn_like(value))
        elif "layer_scale" in name:
            value.copy_(0.5 + 0.2 * torch.randn_like(value))
    task = {"task_inputs": ["panoptic"]} if hasattr(processor, "tokenizer") else {}
    inputs = processor(images=[picture()], return_tensors="pt", **task)
    modules = [(name, module) for name, module in model.named_modules() if hasattr(module, "weight")]
    classes = next(module for name, module in modules if name.endswith(("class_predictor", "class_embed")))
    masks = [module for name, module in modules if "mask_embed" in name or "mask_head" in name][-1]
    for _ in range(2):  # sharper, about a mean of zero
        outputs = model.eval()(**inputs)
        factor = 8 / outputs.class_queries_logits.std()
        classes.weight.mul_(factor)
        classes.bias.mul_(factor).sub_(factor * outputs.class_queries_logits.mean((0, 1)))
        for parameter in (masks.weight, masks.bias):
            parameter.mul_(4 / outputs.masks_queries_logits.std())
    return model, processor


BUILDERS = {"maskformer": maskformer, "mask2former": mask2former, "eomt": eomt}


def write_coco(root: Path) -> Path:
    """COCO panoptic: of each split two pictures with the sky, a road and two cars, and a void corner."""
    (root / "annotations").mkdir(parents=True)
    categories = [
        {"id": 10 + label, "name": name, "isthing": int(label not in STUFF)} for label, name in CLASSES.items()
    ]
    for split in ("train", "val"):
        maps = root / "annotations" / f"panoptic_{split}2017"
        maps.mkdir()
        (root / f"{split}2017").mkdir()
        content: dict[str, Any] = dict(images=[], annotations=[], categories=categories)
        for number, (height, width) in enumerate(((48, 80), (64, 64)), start=1):
            ids = np.full((height, width), 1, dtype=np.uint8)
            ids[height // 2 :] = 2
            ids[height // 2 - 6 : -4, 4:24], ids[height // 2 - 6 : -4, 34:54], ids[:4, :4] = 3, 4, 0
            picture(height, width).save(root / f"{split}2017" / f"{number}.png")
            Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1)).save(maps / f"{number}.png")
            content["images"].append(dict(id=number, file_name=f"{number}.png", height=height, width=width))
            info = [
                dict(id=id, category_id=10 + label, iscrowd=0, area=int((ids == id).sum()))
                for id, label in ((1, 0), (2, 1), (3, 2), (4, 2))
            ]
            content["annotations"].append(dict(image_id=number, file_name=f"{number}.png", segments_info=info))
        (root / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(content))
    return root
