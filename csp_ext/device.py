"""What the planner needs to know of a GPU."""

from __future__ import annotations

from typing import Any

import torch


def cuda_device(device: int | str | torch.device | None = None) -> dict[str, int]:
    """Return the properties of a GPU that launches depend on, as :func:`csp_ext.plan` takes them.

    Parameters
    ----------
    device : int, str or torch.device, optional
        Default: the current device.

    Returns
    -------
    dict
        ``multiprocessors``, ``capability`` (10 * major + minor), ``shared_bytes`` (shared memory that one
        block may have) and ``l2_bytes``.

    Examples
    --------
    >>> csp_ext.plan("compact", device="cuda", **csp_ext.cuda_device(), batch=1, num_kv_heads=32,
    ...              keys=4096, budget=820, head_dim=128, dtype="float16")
    """
    properties: Any = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": properties.multi_processor_count,
        "capability": 10 * properties.major + properties.minor,
        "shared_bytes": properties.shared_memory_per_block_optin,
        "l2_bytes": properties.L2_cache_size,
    }
