"""`Segments`: every form of the masks says the same; ways in, other segments, targets."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.models.run_lengths import MaskRuns, Runs
from maskcls_hf.models.segments import NO_SEGMENT, VOID, Segments

NUMBER = 3  # of segments
maps = st.tuples(st.integers(1, 7), st.integers(1, 9)).flatmap(
    lambda size: arrays.arrays(np.int16, size, elements=st.integers(NO_SEGMENT, NUMBER - 1))
)


def labels() -> torch.Tensor:
    return torch.tensor([4, 2, 4])


def forms(index_map: np.ndarray) -> dict[str, Segments]:
    """The same segments from each form that can be stored."""
    stack = np.stack([index_map == place for place in range(NUMBER)])
    void = torch.from_numpy(index_map == VOID)
    codes = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in stack]
    return {
        "map": Segments(labels(), index_map),
        "runs": Segments(labels(), Runs.of(index_map)),
        "stack": Segments(labels(), stack, void=void),
        "mask runs": Segments(labels(), MaskRuns.of_masks(stack), void=void),
        "run lengths": Segments(labels(), codes, void=void),
    }


class TestForms:
    @settings(deadline=None)  # machines can be busy
    @given(maps)
    def test_all_say_the_same(self, index_map):
        codes = forms(index_map)["run lengths"].masks
        for name, segments in forms(index_map).items():
            for one in (segments, pickle.loads(pickle.dumps(segments)), copy.deepcopy(segments)):
                assert one.size == index_map.shape and not one.overlap, name
                assert np.array_equal(one.index_map.numpy(), index_map)
                assert np.array_equal(one.runs.map(), index_map)
                assert np.array_equal(one.stack.numpy(), [index_map == place for place in range(NUMBER)])
                assert [mask.area for mask in one.mask_runs] == [(index_map == place).sum() for place in range(NUMBER)]
                decoded = [coco_mask.decode(code) for code in one.run_lengths]
                assert np.array_equal(decoded, [coco_mask.decode(code) for code in codes])
                assert one.visible == [place for place in range(NUMBER) if (index_map == place).any()]
                classes = np.array([4, 2, 4, 255, 255])[index_map]
                assert np.array_equal(one.semantic_map(255).numpy(), classes)
                assert np.array_equal(one.semantic_runs(255).map(), classes)

    def test_the_index_map_is_small(self):
        runs = Runs.of(np.arange(6).reshape(2, 3) % 3 - 1)
        assert Segments([0, 1], runs).index_map.dtype == torch.int8
        assert Segments(torch.zeros(200), runs).index_map.dtype == torch.int16

    def test_other_forms_are_not_pickled(self):
        index_map = np.zeros((400, 500), dtype=np.int64)
        index_map[100:200] = 1
        segments = Segments([0, 1], torch.from_numpy(index_map))
        assert segments.stack.sum() == 200_000 and segments.mask_runs and segments.semantic_map() is not None
        assert len(pickle.dumps(segments)) < 2500
        stack = Segments([0, 1], np.ones((2, 400, 500), dtype=bool), void=torch.ones(400, 500).bool(), name="street")
        again = pickle.loads(pickle.dumps(stack))
        assert len(pickle.dumps(stack)) < 4000
        assert again.overlap and again.name == "street" and torch.equal(again.stack, stack.stack)
        assert torch.equal(again.void, stack.void)

    def test_segments_that_overlap_have_no_map(self):
        segments = Segments([0, 1], np.ones((2, 3, 4), dtype=bool), name="street")
        assert segments.overlap
        for form in ("index_map", "runs"):
            with pytest.raises(ValueError, match="street: segments overlap"):
                getattr(segments, form)
        with pytest.raises(ValueError, match="^segments overlap.*stack and mask_runs do"):
            _ = Segments([0, 1], np.ones((2, 3, 4), dtype=bool)).index_map

    def test_what_does_not_fit_is_said(self):
        with pytest.raises(ValueError, match="street: 2 masks, 3 class labels, 3 scores and 3 flags"):
            Segments([0, 1, 2], np.ones((2, 3, 4), dtype=bool), name="street")
        with pytest.raises(ValueError, match="street: the index map holds places outside its 1 segments"):
            _ = Segments([0], torch.tensor([[0, 1]]), name="street").runs


class TestOthers:
    def segments(self, overlap: bool) -> Segments:
        masks = np.zeros((3, 4, 6), dtype=bool)
        masks[0, :2], masks[1, 2:, :3], masks[2, 2 - overlap :, 3:] = True, True, True
        return Segments(
            labels(),
            masks,
            is_crowd=torch.tensor([False, True, False]),
            areas=torch.tensor([5.0, 6.0, 7.0]),
            scores=torch.tensor([0.5, 0.6, 0.7]),
            ids=[10, 20, 30],
            void=torch.zeros(4, 6).bool(),
        )

    @pytest.mark.parametrize("overlap", [False, True])
    def test_selection(self, overlap):
        whole = self.segments(overlap)
        for segments in (whole, whole if overlap else Segments(**vars_of(whole) | {"masks": whole.index_map})):
            found = segments.select([2, 0])
            assert torch.equal(found.stack, whole.stack[[2, 0]])
            assert found.class_labels.tolist() == [4, 4] and found.is_crowd.tolist() == [False, False]
            assert found.areas.tolist() == [7, 5] and found.ids == [30, 10]
            assert found.scores.tolist() == pytest.approx([0.7, 0.5])

    @pytest.mark.parametrize("overlap", [False, True])
    def test_changed_pixels(self, overlap):
        whole = self.segments(overlap)
        assert whole.pixels.dtype == (torch.bool if overlap else torch.int8)
        cropped = whole.with_pixels(whole.pixels[:, :2])
        assert torch.equal(cropped.stack, whole.stack[:, :2]) and cropped.areas is None
        assert cropped.select(cropped.visible).ids == ([10, 30] if overlap else [10])
        assert torch.equal(whole.resized((8, 12)).stack, whole.stack.repeat_interleave(2, 1).repeat_interleave(2, 2))

    def test_drawn_over_each_other(self):
        whole = self.segments(True)
        assert torch.equal(whole.drawn([2, 0]).stack[0], whole.stack[0])
        assert not whole.drawn([2, 0]).stack[1].any()
        assert torch.equal(whole.drawn([0, 2]).stack[2], whole.stack[2])
        assert [record["area"] for record in whole.records] == [12, 6, 9]

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("as_map", [False, True])
    def test_targets(self, overlap, as_map):
        """Crowds and unlabeled pixels are void; segments without a pixel are none; padding is neither."""
        whole = self.segments(overlap)
        whole.void[0, 0] = True
        masks = whole.stack.clone()
        if not overlap:
            masks[0, 0, 0] = False  # what is void is in no segment of a map
        else:
            whole.void[3, 0] = True  # in the crowd
        stack = Segments(**vars_of(whole) | {"masks": masks})
        for segments in [stack] if overlap else [stack, Segments(labels(), stack.index_map, whole.is_crowd)]:
            found = segments.targets((5, 8), as_map)
            assert found["class_labels"].tolist() == [4, 4]
            kept = torch.nn.functional.pad(masks[[0, 2]], (0, 2, 0, 1))
            if as_map and not overlap:
                assert found["mask_labels"].dtype == torch.int32
                assert torch.equal(found["mask_labels"], kept[0] * 1 + kept[1] * 2 - 1)
            else:
                assert torch.equal(found["mask_labels"], kept)
            void = torch.nn.functional.pad(masks[1] | whole.void, (0, 2, 0, 1)) & ~kept.any(0)
            assert torch.equal(found["void_mask"], void) and void.any()

    def test_the_image_processor_takes_them(self):
        whole = self.segments(False)
        image = np.zeros((4, 6, 3), dtype=np.uint8)
        options = dict(do_resize=False, size_divisor=1, return_tensors="pt", input_data_format="channels_last")
        found = MaskClsImageProcessor(num_labels=5)([image], segmentation_maps=[whole], **options)
        ids = torch.tensor([4, 255, 4])[whole.index_map.long()]
        assert found["class_labels"][0].tolist() == [4, 4]
        assert torch.equal(found["mask_labels"][0], whole.stack[[0, 2]])
        assert torch.equal(found["void_mask"][0], ids == 255)
        semantic = MaskClsImageProcessor(num_labels=5, label_format="semantic")
        assert torch.equal(semantic([image], segmentation_maps=[whole], **options)["labels"][0], ids)
        with pytest.raises(ValueError, match=r"image 0: label ids \[4, 4\] are outside the 4 classes"):
            MaskClsImageProcessor(num_labels=4)([image], segmentation_maps=[whole], **options)
        with pytest.raises(ValueError, match="image 0: the segmentation map is 4 x 6 but the image is 4 x 5"):
            MaskClsImageProcessor(num_labels=5)([image[:, :5]], segmentation_maps=[whole], **options)


def vars_of(segments: Segments) -> dict:
    names = ("class_labels", "is_crowd", "areas", "scores", "ids", "void")
    return {name: getattr(segments, name) for name in names}
