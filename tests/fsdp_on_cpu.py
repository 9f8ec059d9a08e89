"""`python fsdp_on_cpu.py SCRIPT ...` runs a script whose Accelerate shards with FSDP2 although it is on a CPU.

Accelerate takes FSDP for GPUs alone, and falls back to DDP without a word; torch's FSDP2 itself works with gloo.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ |= {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "TransformerLayer"),
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
make_state = PartialState.__init__


def as_if_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    make_state(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = as_if_on_gpus
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
