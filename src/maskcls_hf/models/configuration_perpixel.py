"""Configuration of the per-pixel classification baselines."""

from .configuration_maskcls import SegmentationNetworkConfig, check_choice, check_number


class PerPixelConfig(SegmentationNetworkConfig):
    """Configuration of `PerPixelForSemanticSegmentation` (paper Section 4.1, baselines).

    All fields of `SegmentationNetworkConfig`; the transformer's count only for PerPixelBaseline+, whose number of
    queries is the number of classes. And:

    Args:
        transformer_module (`bool`, defaults to `False`):
            `False`: PerPixelBaseline, a linear classifier on the per-pixel embeddings. `True`: PerPixelBaseline+,
            transformer module and mask embeddings added, one query a class, its mask the score of the class.
        semantic_loss_ignore_index (`int`, defaults to 255): label of pixels that the loss leaves out.
    """

    model_type = "maskcls_perpixel"
    auto_classes = {"AutoModelForSemanticSegmentation": "modeling_perpixel.PerPixelForSemanticSegmentation"}

    transformer_module: bool = False
    semantic_loss_ignore_index: int = 255

    def check_fields(self) -> None:
        super().check_fields()
        check_choice(self, "transformer_module", (True, False))
        check_number(self, "semantic_loss_ignore_index", integer=True, minimum=-100)
        check_several_classes(len(self.id2label or {}))


def check_several_classes(number: int) -> None:
    """Raise `ValueError` for one class: the cross-entropy over it is 0, and nothing would be learned."""
    if number < 2:
        raise ValueError("A per-pixel model with one class has nothing to tell apart: give it two, one of background.")
