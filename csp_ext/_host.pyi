from typing import Literal, TypedDict

__version__: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    torch_headers: str
    torch_target: str
    cuda_compiler: str
    cuda_architectures: str

class Plan(TypedDict):
    workspace_bytes: int
    bytes_read: int
    bytes_written: int
    flops: int
    tasks: int

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def plan(op: Literal["score", "select", "compact", "decode", "prune"], **shape: int | str | bool) -> Plan: ...
