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
