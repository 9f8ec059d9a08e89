"""Weights of an official architecture, each tensor a function of its original name and shape alone.

So nobody has to store them: the paper's code computed the cases of tests/data/papers_code with these weights, and ours
makes them again. For a tensor of n numbers, t is uniform in [-1, 1),

    raw = numpy.random.Philox(key=zlib.crc32(name)).random_raw(n)
    t = 2 * (raw >> 11) * 2**-53 - 1

and the values are float32(a + b * t) in C order, with (a, b) of `offset_and_scale`. Then, for 4-D tensors and those of
AFTER_RELU, value[:, 1::2] = -value[:, 0::2] where the number of inputs is even: the inputs come out of a ReLU, and the
pairs cancel what they have in common. Without that and the gains, an untrained network gives nearly the same feature
at all pixels and the same query 100 times, and a comparison would notice little.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

CONSTANTS = ("empty_weight", "relative_position_index", "num_batches_tracked")  # the modules fix them
AFTER_RELU = ("linear2.weight", "mask_embed.layers.1.weight", "mask_embed.layers.2.weight")
# By the end of a name.
WHOLE_RULES = {
    "running_var": (1.0, 0.5),
    "running_mean": (0.0, 0.1),
    "relative_position_bias_table": (0.0, 1.0),
    "query_embed.weight": (0.0, 2 * math.sqrt(3)),
}
GAINS = {
    "self_attn.out_proj.weight": 0.2,
    "linear2.weight": 0.3,
    "multihead_attn.out_proj.weight": 3.0,
    "in_proj_weight": 2.0,
    "class_embed.weight": 2.0,
    "mask_embed.layers.2.weight": 0.5,
}


def offset_and_scale(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """(a, b) of value = a + b * t."""
    for end, rule in WHOLE_RULES.items():
        if name.endswith(end):
            return rule
    if len(shape) <= 1:
        return (1.0, 0.2) if name.endswith("weight") else (0.0, 0.2)  # scales of norms; biases
    gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), None)
    if gain is None and len(shape) == 4 and name.startswith("backbone."):
        if any(part in name for part in (".stem.", ".conv1.", ".conv2.")):
            gain = math.sqrt(2)
        elif ".conv3." in name:
            gain = 0.4
    return 0.0, (1.0 if gain is None else gain) * math.sqrt(3 / math.prod(shape[1:]))


def tensor(name: str, shape: Sequence[int]) -> np.ndarray:
    a, b = offset_and_scale(name, shape)
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(math.prod(shape))
    t = 2.0 * ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53) - 1.0
    value = (a + b * t).astype(np.float32).reshape(shape)
    if (len(shape) == 4 or name.endswith(AFTER_RELU)) and shape[1] % 2 == 0:
        value[:, 1::2] = -value[:, 0::2]
    return value


def state_dict(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """All tensors but the constants."""
    return {name: tensor(name, shape) for name, shape in shapes.items() if not name.endswith(CONSTANTS)}


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """crc32 over all tensors, in the order of their names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).tobytes(), crc)
    return f"{crc:08x}"
