"""Half precision and compiled networks, for a predictor that is asked for them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from .eval_mode import eval_copy

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
# As torch.cpu.get_capabilities names the instructions, of Intel and AMD, and of ARM.
_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "arm_bf16", "bf16")

logger = logging.get_logger(__name__)


def faster_network(model: Any, dtype: Dtype, compile: bool) -> Any:
    """What predicts in place of the model, in evaluation mode; None: the model does so itself.

    Args:
        model: on its device.
        dtype: see [`Predictor`].
        compile: by `torch.compile`.

    Raises:
        ValueError: the device does not compute in `dtype`.
    """
    device = model.device
    if dtype == "float16" and device.type == "cpu":
        raise ValueError('dtype="float16" is for GPUs. On a CPU use "bfloat16", or "float32".')
    if dtype == "bfloat16":
        if not torch.amp.is_autocast_available(device.type):
            raise ValueError(f'dtype="bfloat16": torch has no autocast for {device.type} devices.')
        if device.type == "cpu" and not has_bfloat16():
            logger.warning(
                "This processor has no instructions for bfloat16 (AMX or AVX512-BF16): predicting takes longer than in "
                "float32."
            )
    weights = {"float16": torch.float16, "float32": torch.float32}.get(dtype, model.dtype)
    network = None
    if weights != model.dtype:
        network = copy.deepcopy(eval_copy(model)).to(weights)
    return _CompiledNetwork(network or eval_copy(model)) if compile else network


def autocast(device: torch.device, dtype: Dtype) -> AbstractContextManager[Any]:
    """What a network predicts within."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in _BFLOAT16_INSTRUCTIONS)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of older versions
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


class _CompiledNetwork(nn.Module):
    """A network by `torch.compile`, or itself where that fails.

    On CUDA what it starts is recorded for each size of its inputs, and replayed: at a few images most of the time goes
    into starting kernels.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.compiled: Any = torch.compile(network)
        self.graphs: _CudaGraphs | None = _CudaGraphs() if torch.cuda.is_available() else None

    def forward(self, **inputs: Any) -> Any:
        if self.compiled is not None:
            try:
                if self.graphs is not None and next(self.network.parameters()).is_cuda:
                    return self.graphs(self.compiled, inputs)
                return self.compiled(**inputs)
            except Exception as error:
                from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

                if not isinstance(error, TorchDynamoException):
                    raise
                reason = " ".join(str(error).split("\n")[:2])  # by what, and why
                logger.warning(f"The network cannot be compiled and runs as it is: {reason}")
                self.compiled = None
        return self.network(**inputs)


class _CudaGraphs:
    """What a function starts on CUDA, recorded for each size of its inputs and replayed.

    The inputs are tensors or None by name, the outputs any structure of tensors. Threads take turns.
    """

    MOST = 8  # sizes; a new one takes the place of the one that was used least recently

    def __init__(self) -> None:
        self.recorded: OrderedDict[Any, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Any]] = OrderedDict()
        self.lock = Lock()
        self.pool: Any = None  # of memory that all recordings share, as one is replayed at a time

    @torch.no_grad()
    def __call__(self, function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        if len(tensors) < sum(value is not None for value in inputs.values()):
            return function(**inputs)
        sizes = tuple((name, value.shape, value.dtype) for name, value in tensors.items())
        key = (sizes, torch.is_autocast_enabled("cuda"))
        with self.lock:
            if key not in self.recorded:
                if len(self.recorded) == self.MOST:
                    self.recorded.popitem(last=False)
                self.recorded[key] = self.record(function, tensors)
            self.recorded.move_to_end(key)
            graph, places, outputs = self.recorded[key]
            for name, value in tensors.items():
                places[name].copy_(value)
            graph.replay()
            return tree_map_only(Tensor, Tensor.clone, outputs)

    def record(self, function: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
        places = {name: value.clone() for name, value in tensors.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile, choose algorithms, reserve workspaces
            for _ in range(3):
                function(**places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = function(**places)
        return graph, places, outputs
