"""Decoding steps as CUDA graphs: launching a step's kernels one by one takes longer than running them."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def replayed(step: Callable[[int], None], state: Tensor, slots: int) -> Callable[[int], None]:
    """`step` as CUDA graphs for a few row counts; other counts are rounded up, so idle slots are computed."""
    sizes = sorted({min(1 << i, slots) for i in range(slots.bit_length() + 1)})
    graphs: dict[int, Callable[[], None]] = {}
    pool = torch.cuda.graph_pool_handle()  # shared, since no graph leaves anything in it

    def replay(rows: int) -> None:
        size = next(size for size in sizes if size >= rows)
        with torch.cuda.device(state.device):  # streams belong to the current device
            if size not in graphs:
                graphs[size] = captured(lambda: step(size), state, pool)
            graphs[size]()

    return replay


def captured(work: Callable[[], None], state: Tensor, pool) -> Callable[[], None]:
    """`work` as a CUDA graph; `state` is left unchanged. `work` may only use memory that stays in place."""
    before = state.clone()
    side = _side_stream(state.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # creates workspaces and handles, which must not be captured
    torch.cuda.current_stream().wait_stream(side)
    state.copy_(before)
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) may call CUDA during the capture.
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        work()
    return graph.replay


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per process: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)
