"""Parts as somebody else would write them: they import nothing of the package. See test_parts.py."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .outside_blocks import Block


class SumDecoder(nn.Module):
    """A pixel decoder: all feature maps at stride 4, summed."""

    def __init__(self, config, in_channels: list[int], gain: float = 1.0):
        super().__init__()
        self.context_channels = in_channels[-1]
        self.blocks = nn.ModuleList(Block(channels, config.mask_feature_size) for channels in in_channels)
        self.gain = gain
        self.scale = nn.Parameter(torch.ones(1))

    def init_weights(self):
        nn.init.constant_(self.scale, self.gain)

    def forward(self, feature_maps, region=None):
        size = feature_maps[0].shape[-2:]
        maps = [block(maps) for block, maps in zip(self.blocks, feature_maps, strict=True)]
        pyramid = [F.interpolate(maps, size) for maps in reversed(maps)]
        embeddings = self.scale * torch.stack(pyramid).sum(0)
        return SimpleNamespace(context=feature_maps[-1], pyramid=pyramid, per_pixel_embeddings=embeddings)


class MeanDecoder(nn.Module):
    """A transformer decoder: each query is moved by the mean of the context."""

    def __init__(self, config, in_channels: int):
        super().__init__()
        self.queries_embedder = nn.Embedding(config.num_queries, config.hidden_size)
        self.projection = nn.Linear(in_channels, config.hidden_size)

    def forward(self, features, predict, output_attentions=False):
        moved = self.projection(features.context.mean((2, 3)))[:, None]  # (B, 1, C)
        queries = [self.queries_embedder.weight + moved]
        queries.append(queries[0] + predict(queries[0], features).class_logits.mean(-1, keepdim=True))
        return SimpleNamespace(segment_embeddings=queries, attentions=[], cross_attentions=[])


class Pairs(NamedTuple):
    layer: torch.Tensor
    image: torch.Tensor
    query: torch.Tensor
    segment: torch.Tensor


class InOrderMatcher:
    """A matcher: the first query predicts the first segment of an image, and so on, from the query `start`."""

    def __init__(self, config, start: int = 0):
        self.start = start

    def __call__(self, predictions, targets):
        layers = range(predictions.class_logits.shape[1])
        pairs = [
            (layer, image, self.start + segment, segment)
            for layer in layers
            for image, number in enumerate(targets.numbers)
            for segment in range(number)
        ]
        return Pairs(*torch.tensor(pairs, device=predictions.class_logits.device).view(-1, 4).T)


class AreaLoss:
    """A loss: the mean probability of the matched masks, to a power."""

    normalizer = "segments"

    def __init__(self, config, power: float = 1.0):
        self.power = power

    def __call__(self, predictions, targets, assignment):
        layer, image, query, _ = assignment
        areas = predictions.mask_logits[image, layer, query].float().sigmoid().mean((1, 2)) ** self.power  # (T,)
        return areas.new_zeros(predictions.mask_logits.shape[1]).index_add(0, layer, areas)
