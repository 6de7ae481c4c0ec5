from typing import TypedDict

__version__: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    torch_headers: str
    torch_target: str
    cuda_compiler: str
    cuda_architectures: str

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def score_workspace_bytes(
    *,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    keys: int,
    head_dim: int,
    dtype: str,
    shared: bool = False,
    with_lse: bool = False,
    threads: int = 1,
) -> int: ...
