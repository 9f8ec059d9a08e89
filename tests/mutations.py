"""Small faults, put into the code one at a time, that the tests must catch: `python tests/mutations.py [NAME ...]`.

Each is a text that stands once in src/, in whichever file, what replaces it, and the tests that must fail then. They
run on a temporary copy of src/. First the same tests run without a fault, and must pass.

Where the code changed, so that a text is not found, the fault is written anew for the code as it is: what must stay is
that it is caught.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = "tests/test_golden.py::test_numbers_are_those_of_before"
LOSSES, MAPS = f"{GOLDEN}[losses]", f"{GOLDEN}[maps]"
PROCESSOR, SCORES = f"{GOLDEN}[image processor]", f"{GOLDEN}[scores]"
MODELING = "tests/test_modeling.py::"
ON_A_THRESHOLD = "tests/test_image_processing.py::test_what_lies_on_a_threshold"
PQ, METRICS = "tests/test_panoptic_quality.py::TestRules::", "tests/test_metrics.py::"
INFERENCE, TRAINING = "tests/test_inference.py::", "tests/test_training.py::"


class Mutation(NamedTuple):
    old: str
    new: str
    tests: tuple[str, ...]  # node ids; one that fails is enough


MUTATIONS = {
    # The exponent of the focal loss.
    "focal gamma": Mutation(
        "error.mul_(error).mul_(cross_entropy)",
        "error.mul_(cross_entropy)",
        ("tests/test_mask_losses.py::test_paired_losses_and_gradients_follow_the_definition", LOSSES),
    ),
    # The +1 of the dice loss, which keeps it finite without pixels.
    "dice smoothing": Mutation(
        "union = (pixels - signs) + signed_error + 1", "union = (pixels - signs) + signed_error", (LOSSES,)
    ),
    # Weight of the dice term in the matching cost, not in the loss.
    "matching weights": Mutation(
        '"mask": "mask_weight", "dice": "dice_weight"}', '"mask": "mask_weight", "dice": "mask_weight"}', (LOSSES,)
    ),
    # The focal loss is divided by the number of segments.
    "normalizer of masks": Mutation(
        "values = sums / getattr(normalizers, loss.normalizer)",
        'values = sums / getattr(normalizers, "images" if name == "loss_mask" else loss.normalizer)',
        (LOSSES,),
    ),
    # The class loss is divided by the sum of its weights, in which unmatched queries count less.
    "normalizer of classes": Mutation(
        "class_weight = matched + (images * num_queries - matched) * self.no_object_weight",
        "class_weight = images * num_queries",
        (LOSSES,),
    ),
    # Of an image with more segments than queries N are matched.
    "matched segments": Mutation("sum(min(number, num_queries) for number in numbers)", "sum(numbers)", (LOSSES,)),
    # Weight of unmatched queries in the class loss.
    "no-object weight": Mutation(
        "masked_fill_(wanted == no_object, self.no_object_weight)",
        "masked_fill_(wanted == no_object, 1.0)",
        (LOSSES,),
    ),
    # The loss looks neither at padding nor at void.
    "void in the loss": Mutation("return (pixel_mask != 0) & (void_mask == 0)", "return pixel_mask != 0", (LOSSES,)),
    # Boxes are relative to the image without its padding.
    "boxes without padding": Mutation(
        'if sizes is None:\n            sizes = torch.tensor([self.masks.shape[-2:]], device="cpu")',
        'if True:\n            sizes = torch.tensor([self.masks.shape[-2:]], device="cpu")',
        (LOSSES,),
    ),
    # Attention does not see the padding.
    "padding in attention": Mutation(
        "key_mask = None if inside is None else inside.flatten(1)\n        tokens = features",
        "key_mask = None\n        tokens = features",
        (f"{MODELING}test_an_image_gives_the_same_alone_or_padded",),
    ),
    # Targets of matching are those of the first pixel of each cell.
    "nearest rule of matching": Mutation(
        "torch.arange(int(at_centers), 2 * out_size, 2, device=device)",
        "torch.arange(1, 2 * out_size, 2, device=device)",
        (LOSSES,),
    ),
    # align_corners of the upsampling in the loss.
    "bilinear rule of the loss": Mutation(
        'mode="linear", align_corners=False)', 'mode="linear", align_corners=True)', (LOSSES,)
    ),
    # 1 - GIoU: the hull.
    "box loss": Mutation(
        "- (hull - union) / hull.clamp(min=tiny)",
        "- (hull - union)",
        ("tests/test_boxes.py::test_generalized_iou", LOSSES),
    ),
    # The PQ-style loss of Max-DeepLab: its two parts.
    "Max-DeepLab": Mutation(
        "PQ_ALPHA = 0.75", "PQ_ALPHA = 0.5", ("tests/test_max_deeplab_losses.py::TestPQStyleLoss::test_by_hand", LOSSES)
    ),
    # The loss of every decoder layer.
    "deep supervision": Mutation(
        "supervised = layers if self.config.deep_supervision else layers[-1:]", "supervised = layers[-1:]", (LOSSES,)
    ),
    # The pixel decoder goes from coarse to fine.
    "order of the pixel decoder": Mutation(
        "pyramid = [features]\n        for level in reversed(range(len(self.laterals))):",
        "pyramid = [features]\n        for level in range(len(self.laterals)):",
        (LOSSES,),
    ),
    # Class logits that a query has from the start.
    "query priors": Mutation(
        "class_logits = class_logits + all_rows(self.class_priors, class_logits.device)",
        "class_logits = class_logits + 0 * all_rows(self.class_priors, class_logits.device)",
        (LOSSES,),
    ),
    # Class id = label value - label_offset.
    "label offset": Mutation("classes = values - rules.label_offset", "classes = values - 0", (PROCESSOR,)),
    # The value of unlabeled pixels.
    "void": Mutation("void |= values == rules.void_id", "void |= values == -1", (PROCESSOR,)),
    # Labels take the pixel under the center of each new one.
    "nearest rule of labels": Mutation(
        "nearest_indices(source, length, labels.device, at_centers=True)",
        "nearest_indices(source, length, labels.device)",
        (PROCESSOR,),
    ),
    # Half-pixel centers of the upsampling of maps.
    "bilinear rule of maps": Mutation(
        "((positions.float() + 0.5) * (size / out_size) - 0.5).clamp", "(positions * (size / out_size)).clamp", (MAPS,)
    ),
    # What is padding is cropped before the resize to the target.
    "crop of padding": Mutation(
        "to_target = bilinear_windows(pixels, valid, target)",
        "to_target = bilinear_windows(pixels, padded, target)",
        (MAPS,),
    ),
    # A mask's own area counts pixels of exactly the threshold.
    "mask threshold": Mutation(
        "weights = scores[:, None, None]\n\n        def write",
        "weights, mask_logit = scores[:, None, None], mask_logit + 1e-6\n\n        def write",
        (ON_A_THRESHOLD,),
    ),
    # A mask of an instance does not.
    "mask threshold of instances": Mutation(
        "rows = block.to_padded_rows(cells)\n    for pairs",
        "rows, mask_logit = block.to_padded_rows(cells), mask_logit - 1e-6\n    for pairs",
        (ON_A_THRESHOLD,),
    ),
    # A query takes part above the threshold, not at it.
    "class threshold": Mutation(
        "kept = ((labels < class_probs.shape[1] - 1) & (scores > threshold))",
        "kept = ((labels < class_probs.shape[1] - 1) & (scores >= threshold))",
        (ON_A_THRESHOLD,),
    ),
    # Queries of one class of stuff make one segment.
    "fusing stuff": Mutation("(label, None if fuse else query), new)", "(label, query), new)", (MAPS,)),
    # Segments match above an IoU of one half, not at it.
    "PQ matching": Mutation(
        "comparable & (2 * common > unions)",
        "comparable & (2 * common >= unions)",
        (f"{PQ}test_iou_of_one_half_is_no_match",),
    ),
    # Void pixels of a predicted segment leave the union.
    "PQ void": Mutation(
        "unions = (predicted_areas - in_void)[:, None]",
        "unions = predicted_areas[:, None]",
        (f"{PQ}test_void_pixels_leave_the_union", SCORES),
    ),
    # Crowd regions of AP.
    "AP crowds": Mutation(
        'record["iscrowd"] = int(true.is_crowd[place])',
        'record["iscrowd"] = 0',
        ("tests/test_average_precision.py::TestEqualsCocoeval::test_all_scores_bit_for_bit",),
    ),
    # Width of the boundary.
    "boundary": Mutation(
        "size = 2 * distance + 1",
        "size = 2 * distance - 1",
        (f"{METRICS}TestBoundaryIoU::test_equals_masks_and_erosions", SCORES),
    ),
    # The IoU above which F1 counts a pair.
    "F1 matching": Mutation(
        "common > self.iou_threshold * unions",
        "common > 0.9 * unions",
        (f"{METRICS}TestInstanceF1::test_equals_the_best_of_all_pairings",),
    ),
    # Weights of overlapping tiles sum to one.
    "blending tiles": Mutation(
        "weights = 1 - weights if falls else weights",
        "weights = 1 - weights if not falls else weights",
        (f"{INFERENCE}TestStitching::test_blended_scores_are_the_weighted_mean_of_the_tiles",),
    ),
    # Parts of segments in neighboring tiles are joined where they have one class.
    "stitching tiles": Mutation(
        'if first["label_id"] == second["label_id"]:',
        "if True:",
        (f"{INFERENCE}TestStitching::test_classes_must_agree",),
    ),
    # The average moves by 1 - decay.
    "EMA": Mutation(
        "get_ema_multi_avg_fn(self.decay_after(int(number)))",
        "get_ema_multi_avg_fn(1 - self.decay_after(int(number)))",
        (f"{TRAINING}TestExponentialMovingAverage::test_is_the_average_by_hand",),
    ),
    # Its decay rises, so that the beginning of a training is soon forgotten.
    "EMA warm-up": Mutation(
        "return min(self.decay, (1 + updates) / (10 + updates))",
        "return self.decay",
        (
            f"{TRAINING}TestExponentialMovingAverage::test_the_decay_rises",
            f"{TRAINING}TestExponentialMovingAverage::test_after_few_steps_it_is_near_the_model",
        ),
    ),
    # The schedule of the paper.
    "poly schedule": Mutation(
        "warmup * (1 - progress) ** power",
        "warmup * (1 - progress)",
        ("tests/test_optim.py::TestSchedules::test_poly_equals_torchs",),
    ),
    # The backbone learns more slowly.
    "rate of the backbone": Mutation(
        "learning_rate * (multiplier if in_backbone else 1.0)",
        "learning_rate",
        ("tests/test_optim.py::TestGroups::test_norms_embeddings_and_backbone",),
    ),
    # A resume of a finished training makes no step more.
    "resume": Mutation(
        "or self.state.global_step >= self.state.max_steps:",
        "or self.state.global_step > self.state.max_steps:",
        ("tests/test_resume.py::test_a_finished_training_makes_no_step_more",),
    ),
    # Files of a checkpoint are those of its manifest, bit for bit.
    "manifest": Mutation(
        "if contents and sha256(path) != digest:",
        "if False:",
        (
            "tests/test_checkpoints.py::TestFinding::test_a_damaged_one_is_named_and_the_one_before_is_used",
            "tests/test_manifest.py::TestWhereverItIsLoaded::test_damaged_weights",
        ),
    ),
    # Crowd regions of COCO instances.
    "COCO crowd": Mutation(
        'crowd = bool(annotation.get("iscrowd"))',
        "crowd = False",
        ("tests/test_readers.py::TestCocoInstances::test_polygons_and_both_kinds_of_run_lengths",),
    ),
    # Crowd regions of COCO panoptic.
    "COCO panoptic crowd": Mutation(
        'label, bool(segment.get("iscrowd")), segment.get("area")',
        'label, False, segment.get("area")',
        ("tests/test_readers.py::TestCocoPanoptic::test_ids_crowd_void_and_gaps", SCORES),
    ),
    # Training sees crowd regions as void.
    "crowds of a batch": Mutation(
        "kept = (is_there[:-2] | keep_emptied) & ~crowd",
        "kept = is_there[:-2] | keep_emptied",
        ("tests/test_collate.py::TestCollator::test_crowds_and_unlabeled_pixels_are_void",),
    ),
    # Masks that matching made without gradients are made again for a loss.
    "masks for a loss": Mutation(
        "made is None or (self._products and torch.is_grad_enabled() > made.requires_grad)",
        "made is None",
        ("tests/test_mask_products.py::test_masks_made_for_matching_are_made_again_for_a_loss",),
    ),
    # The place of a matched mask among those of its image.
    "matched masks": Mutation(
        "place * room + rank",
        "place * room",
        ("tests/test_mask_products.py::test_losses_and_gradients_are_those_of_the_masks",),
    ),
    # A saved configuration names the classes for remote code.
    "remote code": Mutation(
        "self.auto_map = self.auto_classes | kept",
        "self.auto_map = kept",
        ("tests/test_remote_code.py::test_saved_folder",),
    ),
}


def run(source: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def verdict(mutation: Mutation) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        texts = {path: path.read_text() for path in source.rglob("*.py")}
        files = [path for path, text in texts.items() if mutation.old in text]
        if not files:
            return "text not found"
        if len(files) > 1 or texts[files[0]].count(mutation.old) > 1:
            return f"text found more than once: {', '.join(path.name for path in files)}"
        files[0].write_text(texts[files[0]].replace(mutation.old, mutation.new))
        result = run(source, list(mutation.tests))
    if result.returncode == 1:
        return "caught"
    if result.returncode == 0:
        return "NOT CAUGHT"
    return f"pytest could not run the tests ({result.returncode}): {result.stdout[-500:]}{result.stderr[-500:]}"


def main(names: list[str]) -> int:
    if unknown := set(names) - set(MUTATIONS):
        print(f"Unknown: {', '.join(sorted(unknown))}. There are: {', '.join(MUTATIONS)}.")
        return 2
    chosen = {name: MUTATIONS[name] for name in names or MUTATIONS}
    tests = sorted({test for mutation in chosen.values() for test in mutation.tests})
    sound = run(ROOT / "src", tests)
    if sound.returncode:
        print(f"The tests fail without a fault:\n{sound.stdout[-3000:]}{sound.stderr[-1000:]}")
        return 2
    uncaught = 0
    for name, mutation in chosen.items():
        result = verdict(mutation)
        uncaught += result != "caught"
        print(f"{name}: {result}", flush=True)
    print(f"{len(chosen) - uncaught} of {len(chosen)} caught")
    return int(uncaught > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
