"""Decoding steps as CUDA graphs, replayed without launching their kernels one by one."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def replayed(step: Callable[[int], None], state: Tensor, slots: int) -> Callable[[int], None]:
    """`step` as CUDA graphs for a few numbers of rows: launching its kernels takes longer than running them.

    Other numbers are rounded up; idle slots are computed too.
    """
    sizes = sorted({min(1 << i, slots) for i in range(slots.bit_length() + 1)})
    graphs: dict[int, Callable[[], None]] = {}
    pool = torch.cuda.graph_pool_handle()  # one for all: no graph leaves anything in it

    def replay(rows: int) -> None:
        size = next(size for size in sizes if size >= rows)
        with torch.cuda.device(state.device):  # streams are the current device's
            if size not in graphs:
                graphs[size] = captured(lambda: step(size), state, pool)
            graphs[size]()

    return replay


def captured(work: Callable[[], None], state: Tensor, pool) -> Callable[[], None]:
    """`work` as a CUDA graph; `state` is left as it is. `work` must only use memory that stays in place."""
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
    """One for the whole process: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)
