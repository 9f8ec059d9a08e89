"""A model of segmentation_models.pytorch, converted to mask classification: what an adapter has to say.

    pip install segmentation-models-pytorch
    python examples/adapt_smp.py --architecture Unet --encoder resnet18 --out unet-as-maskcls

Fine-tune what it writes with `maskcls train` or `Trainer`; a program that loads it imports this file first, so that the
adapter is known.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from maskcls_hf.convert import from_per_pixel
from maskcls_hf.models.per_pixel_networks import PerPixelNetwork, register_per_pixel_network


class SmpConfig(PreTrainedConfig):
    """All that is needed to build the network again, and the names of the classes (`id2label`)."""

    model_type = "smp"

    architecture: str = "Unet"
    encoder_name: str = "resnet18"


def create(config: Any) -> Any:
    """The per-pixel model of a configuration, untrained."""
    return smp.create_model(config.architecture, config.encoder_name, encoder_weights=None, classes=config.num_labels)


class SmpNetwork(PerPixelNetwork):
    """Encoder and decoder of a model of smp; its head is taken apart."""

    classifier = "segmentation_head.0"
    upsampling = "segmentation_head.1"

    def build(self, config: Any) -> nn.Module:
        return create(config)

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings at the resolution of the decoder, context from the encoder's last stage."""
        stages = self.network.encoder(pixel_values)
        return self.network.decoder(stages), stages[-1]

    def context_channels(self, config: Any) -> int:
        return self.network.encoder.out_channels[-1]

    def size_multiple(self, config: Any) -> int:
        return self.network.encoder.output_stride


register_per_pixel_network(SmpConfig, SmpNetwork)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="Unet", help="of smp (%(default)s)")
    parser.add_argument("--encoder", default="resnet18", help="of smp (%(default)s)")
    parser.add_argument("--classes", type=int, default=11, help="number of classes (%(default)s)")
    parser.add_argument("--weights", type=Path, help="state dict of a trained model (none: an untrained one)")
    parser.add_argument("--queries", type=int, help="number of queries (one a class)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)

    names = {label: f"class {label}" for label in range(arguments.classes)}
    config = SmpConfig(architecture=arguments.architecture, encoder_name=arguments.encoder, id2label=names)
    per_pixel = create(config)
    if arguments.weights:
        per_pixel.load_state_dict(torch.load(arguments.weights, map_location="cpu", weights_only=True))
    model = from_per_pixel(per_pixel, num_queries=arguments.queries, config=config)
    model.save_pretrained(arguments.out)
    print(f"{arguments.out}: {model.config.num_queries} queries, {model.config.matching} matching.")


if __name__ == "__main__":
    main()
