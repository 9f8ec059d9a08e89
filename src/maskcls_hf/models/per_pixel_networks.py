"""Per-pixel models without their classifier, as the pixel-level module of mask classification (paper Section 3.2).

`convert.from_per_pixel` makes such models. `PER_PIXEL_NETWORKS` has transformers' families; another is a class and a
line: `register_per_pixel_network(config_class, cls)`.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig
from transformers.modeling_outputs import BackboneOutput


class PerPixelNetwork(nn.Module):
    """The adapter protocol: image -> context features and per-pixel embeddings; and where the classifier is.

    A subclass says `classifier`, and overrides `build` and `features` where its network is not one of transformers'
    semantic segmentation models. `examples/adapt_smp.py` does it for segmentation_models.pytorch.

    Args:
        config (`PreTrainedConfig`): of the per-pixel model; the network is built from it, without weights.
    """

    classifier: str
    """Path, in the network, of the convolution whose output are the scores of the classes, or of what wraps it."""
    upsampling: str | None = None
    """Path of an upsampling of these scores, bilinear by a whole factor with aligned corners, if there is one."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.network: Any = self.build(config)
        self.multiple = self.size_multiple(config)
        self.channels = [classifier_of(type(self), self.network).in_channels, self.context_channels(config)]
        self.left_out = [self.classifier, *self.unused_parts(config)] + ([self.upsampling] if self.upsampling else [])
        for path in self.left_out:
            parent, _, name = path.rpartition(".")
            setattr(self.network.get_submodule(parent), name, nn.Identity())

    def build(self, config: PreTrainedConfig) -> nn.Module:
        """The whole per-pixel model of a configuration."""
        return AutoModelForSemanticSegmentation.from_config(config, trust_remote_code=False)

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> what the classifier gets (B, C_E, h, w), and the coarsest features of the encoder
        (B, C_F, h', w'), which the transformer decoder attends to.
        """
        raise NotImplementedError

    def context_channels(self, config: PreTrainedConfig) -> int:
        """C_F."""
        raise NotImplementedError

    def size_multiple(self, config: PreTrainedConfig) -> int:
        """Height and width of its input must be multiples of it."""
        return 1

    def unused_parts(self, config: PreTrainedConfig) -> list[str]:
        """Paths of what neither embeddings nor context need: a parameter without gradient stops DDP."""
        return []

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """`feature_maps`: per-pixel embeddings, context; finest first, as those of a backbone."""
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % self.multiple, 0, -height % self.multiple))
        maps: Any = tuple(crop(m, padded, pixel_values) for m in self.features(padded))
        return BackboneOutput(feature_maps=maps)


class TransformersNetwork(PerPixelNetwork):
    """transformers' models: with the classifier gone, their logits are the per-pixel embeddings."""

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As of `PerPixelNetwork`: logits, and the last hidden state."""
        outputs = self.network(pixel_values=pixel_values, output_hidden_states=True)
        return outputs.logits, outputs.hidden_states[-1]

    def context_channels(self, config: PreTrainedConfig) -> int:
        """Of the last stage."""
        return config.hidden_sizes[-1]


class SegformerNetwork(TransformersNetwork):
    """SegFormer (Xie et al., NeurIPS 2021)."""

    classifier = "decode_head.classifier"


class MobileViTNetwork(TransformersNetwork):
    """MobileViT (Mehta and Rastegari, ICLR 2022)."""

    classifier = "segmentation_head.classifier"

    def context_channels(self, config: PreTrainedConfig) -> int:
        """Of the last hidden state."""
        return config.neck_hidden_sizes[-2]  # the last is that of the classification head


class MobileViTV2Network(MobileViTNetwork):
    """MobileViTv2 (Mehta and Rastegari, 2022)."""

    def context_channels(self, config: PreTrainedConfig) -> int:
        """Of what its head takes."""
        return self.network.segmentation_head.aspp.convs[0].convolution.in_channels


class MobileNetV2Network(MobileViTNetwork):
    """MobileNetV2 (Sandler et al., CVPR 2018) with the head of DeepLabV3+."""

    def unused_parts(self, config: PreTrainedConfig) -> list[str]:
        """The last convolution, which is for classification."""
        return ["mobilenet_v2.conv_1x1"]

    def context_channels(self, config: PreTrainedConfig) -> int:
        """Of what its head takes."""
        return self.network.segmentation_head.conv_aspp.convolution.in_channels


class UperNetNetwork(TransformersNetwork):
    """UPerNet (Xiao et al., ECCV 2018) over a backbone of transformers."""

    classifier = "decode_head.classifier"

    def unused_parts(self, config: PreTrainedConfig) -> list[str]:
        """The auxiliary head, and of Swin the last norm, whose output nothing looks at."""
        swin = ["backbone.swin.layernorm"] if config.backbone_config.model_type == "swin" else []
        return ["auxiliary_head", *swin]

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As of `PerPixelNetwork`: of the head before its upsampling, and the backbone's last map."""
        maps = self.network.backbone(pixel_values).feature_maps  # its own forward would upsample the embeddings
        return self.network.decode_head(maps), maps[-1]

    def context_channels(self, config: PreTrainedConfig) -> int:
        """Of the backbone's last map."""
        return self.network.backbone.channels[-1]


class PlainViTNetwork(TransformersNetwork):
    """A plain ViT under the decoder: its tokens, without the class token, are the context."""

    classifier = "decode_head.classifier"

    def unused_parts(self, config: PreTrainedConfig) -> list[str]:
        """The auxiliary head."""
        return ["auxiliary_head"]

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As of `PerPixelNetwork`: logits, and the tokens of patches as a map."""
        embeddings, tokens = super().features(pixel_values)
        return embeddings, self.as_map(tokens, pixel_values)

    def as_map(self, tokens: Tensor, pixel_values: Tensor) -> Tensor:
        """(B, 1 + h * w, C_F) -> (B, C_F, h, w)."""
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (pixel_values.shape[-2] // self.multiple, -1))

    def context_channels(self, config: PreTrainedConfig) -> int:
        """Of a token."""
        return config.hidden_size

    def size_multiple(self, config: PreTrainedConfig) -> int:
        """A patch."""
        return config.patch_size


class DPTNetwork(PlainViTNetwork):
    """DPT (Ranftl et al., ICCV 2021), also with its hybrid ViT."""

    classifier = "head.head.4"
    upsampling = "head.head.5"

    def unused_parts(self, config: PreTrainedConfig) -> list[str]:
        """The auxiliary head, and a layer of the fusion that has no second input."""
        return ["auxiliary_head", "neck.fusion_stage.layers.0.residual_layer1"]

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        # The network's own forward takes square images only.
        """As of `PlainViTNetwork`, of images that need not be squares."""
        outputs = self.network.dpt(pixel_values, output_hidden_states=True)
        config, layers = self.network.config, outputs.hidden_states[1:]
        convolutional = list(outputs.intermediate_activations) if config.is_hybrid else []
        chosen = convolutional + [layers[index] for index in config.backbone_out_indices[len(convolutional) :]]
        context = self.as_map(outputs.last_hidden_state, pixel_values)
        return self.network.head(self.network.neck(chosen, *context.shape[-2:])), context


class FixedSizeNetwork(PlainViTNetwork):
    """BEiT and Data2Vec: the relative positions of their attention are those of one image size."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.image_size = config.image_size

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As of `PlainViTNetwork`. Raises `ValueError` for images of another size."""
        height, width = pixel_values.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"This network takes images of {self.image_size} x {self.image_size} pixels, got {height} x {width}. "
                f"Set the image processor's size to {{'height': {self.image_size}, 'width': {self.image_size}}}, and "
                f"crop_size to {self.image_size} in training."
            )
        return super().features(pixel_values)


# model_type of the configuration -> class.
PER_PIXEL_NETWORKS: dict[str, type[PerPixelNetwork]] = {
    "segformer": SegformerNetwork,
    "upernet": UperNetNetwork,
    "dpt": DPTNetwork,
    "beit": FixedSizeNetwork,
    "data2vec-vision": FixedSizeNetwork,
    "mobilevit": MobileViTNetwork,
    "mobilevitv2": MobileViTV2Network,
    "mobilenet_v2": MobileNetV2Network,
}


def register_per_pixel_network(config_class: type[PreTrainedConfig], network_class: type[PerPixelNetwork]) -> None:
    """Make models of another library convertible; call it before loading a converted one, too.

    Args:
        config_class: configuration with a `model_type` of its own that holds all `network_class` needs to be built.
        network_class: the adapter.
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    PER_PIXEL_NETWORKS[config_class.model_type] = network_class


def build_per_pixel_network(config: PreTrainedConfig) -> PerPixelNetwork:
    """Network of a configuration, without weights.

    Raises:
        `ValueError`: no adapter for its `model_type`.
    """
    if config.model_type not in PER_PIXEL_NETWORKS:
        raise ValueError(
            f"pixel_decoder='per_pixel': no adapter for backbone_config of model_type={config.model_type!r}. There are "
            f"{sorted(PER_PIXEL_NETWORKS)}; others join by register_per_pixel_network(config_class, network_class)."
        )
    return PER_PIXEL_NETWORKS[config.model_type](config)


def classifier_of(adapter: type[PerPixelNetwork], network: nn.Module) -> nn.Conv2d:
    """The classifier of a per-pixel model.

    Raises:
        `ValueError`: lists what the model or its adapter lacks.
    """
    missing = []
    path = getattr(adapter, "classifier", None)
    try:
        inside = list(network.get_submodule(path).modules()) if path else []
    except AttributeError:
        inside = []
    convolutions = [module for module in inside if isinstance(module, nn.Conv2d)]
    if path is None:
        missing.append("the adapter's `classifier`, the path of the convolution that gives the scores of the classes")
    elif len(convolutions) != 1:
        missing.append(f"one convolution at the adapter's `classifier`, {path!r}; there are {len(convolutions)}")
    elif not _is_plain(convolutions[0]):
        missing.append(f"a classifier of stride 1 that keeps the size of the map; {path!r} is {convolutions[0]}")
    for name in ("features", "context_channels"):
        if getattr(adapter, name) is getattr(PerPixelNetwork, name):
            missing.append(f"the adapter's `{name}`")
    if missing:
        raise ValueError(
            f"{type(network).__name__} cannot be converted by {adapter.__name__}. Missing:\n- " + "\n- ".join(missing)
        )
    return convolutions[0]


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether its output at a cell is one product with the k x k cells around it."""
    size = convolution.kernel_size[0]
    steps = {*convolution.stride, *convolution.dilation, convolution.groups}
    return convolution.kernel_size == (size, size) and steps == {1} and convolution.padding == (size // 2, size // 2)


def crop(features: Tensor, padded: Tensor, image: Tensor) -> Tensor:
    """The part of a map (B, C, h, w) of a padded image that holds the image; a cell partly inside counts.

    Args:
        features: of the padded image.
        padded: images (B, 3, H', W').
        image: the same before padding, (B, 3, H, W).
    """
    rows, columns = (-(-features.shape[axis] * image.shape[axis] // padded.shape[axis]) for axis in (-2, -1))
    return features[..., :rows, :columns]
