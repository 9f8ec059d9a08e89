"""`compatibility`: exact for new models, of whoever made it for imported ones; single settings count more."""

import pytest
from transformers import (
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerImageProcessor,
)

from maskcls_hf import MaskClsConfig, MaskClsImageProcessor
from maskcls_hf.convert.maskformer import config_from_maskformer
from tiny import maskcls_config, resnet


class TestConfiguration:
    def test_new_ones_are_exact_and_imported_ones_are_of_their_origin(self, tmp_path):
        assert MaskClsConfig().compatibility == "exact" and not MaskClsConfig().attend_to_padding
        theirs = Mask2FormerConfig(backbone_config=resnet())
        theirs.save_pretrained(tmp_path)
        loaded = MaskClsConfig.from_pretrained(tmp_path)
        assert (loaded.compatibility, loaded.attend_to_padding) == ("transformers", True)
        of_maskformer = MaskClsConfig(**config_from_maskformer(MaskFormerConfig().to_dict()))
        assert (of_maskformer.compatibility, of_maskformer.attend_to_padding) == ("transformers", True)

    def test_single_settings_count_more_and_a_new_choice_sets_them_anew(self, tmp_path):
        maskcls_config(compatibility="paper", attend_to_padding=False).save_pretrained(tmp_path)
        kept = MaskClsConfig.from_pretrained(tmp_path)
        assert (kept.compatibility, kept.attend_to_padding) == ("paper", False)
        chosen = MaskClsConfig.from_pretrained(tmp_path, compatibility="transformers")
        assert (chosen.compatibility, chosen.attend_to_padding) == ("transformers", True)
        both = MaskClsConfig.from_pretrained(tmp_path, compatibility="exact", attend_to_padding=True)
        assert (both.compatibility, both.attend_to_padding) == ("exact", True)
        with pytest.raises(ValueError, match="compatibility='papers' must be one of"):
            maskcls_config(compatibility="papers")


class TestImageProcessor:
    @pytest.mark.parametrize(
        ("processor_class", "expected"),
        [
            (Mask2FormerImageProcessor, "transformers"),
            (EomtImageProcessor, "transformers"),
            (MaskFormerImageProcessor, "exact"),
            (MaskClsImageProcessor, "exact"),
        ],
    )
    def test_is_of_its_origin(self, processor_class, expected, tmp_path):
        processor_class().save_pretrained(tmp_path)
        processor = MaskClsImageProcessor.from_pretrained(tmp_path)
        assert processor.compatibility == expected
        processor.save_pretrained(tmp_path / "ours")
        assert MaskClsImageProcessor.from_pretrained(tmp_path / "ours").compatibility == expected
        assert MaskClsImageProcessor.from_pretrained(tmp_path, compatibility="paper").compatibility == "paper"
        with pytest.raises(ValueError, match="compatibility must be one of"):
            MaskClsImageProcessor(compatibility="theirs")
