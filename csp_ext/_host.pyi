from typing import Literal, TypedDict

from typing_extensions import Required

__version__: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    torch_headers: str
    torch_target: str
    cuda_compiler: str
    cuda_architectures: str

class Plan(TypedDict, total=False):
    workspace_bytes: Required[int]
    bytes_read: Required[int]
    bytes_written: Required[int]
    flops: Required[int]
    tasks: int  # device="cpu"
    launches: int  # device="cuda"

Op = Literal[
    "n_softmax",
    "segmented_column_sum",
    "score",
    "dual_top_k",
    "select",
    "compact",
    "compact_",
    "prune",
    "prune_",
    "decode",
]

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def plan(op: Op, device: Literal["cpu", "cuda"] = "cpu", **shape: int | float | str | bool) -> Plan: ...
