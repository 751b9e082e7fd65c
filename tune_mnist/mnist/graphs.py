"""CUDA graphs: a row of operations that is recorded once and then started as one."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3  # torch's own advice: what only first times do is done before the recording


def capture(
    work: Callable[[], None],
    before: Callable[[], object],
    generator: torch.Generator,
    pool: Any,
) -> Callable[[], None]:
    """Record some work and return what replays it; on the way it is really done a few times.

    Args:
        work: operations on the current CUDA device that wait for nothing, on tensors that stay
            where they are.
        before: called before each of the real ones.
        generator: what the work draws from, if it does; each replay goes on from its state.
        pool: `torch.cuda.graph_pool_handle()`, memory that may be shared by graphs that never
            run at the same time and leave nothing there for each other.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            before()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        # Later versions of torch see by themselves what is drawn from, and say so.
        warnings.filterwarnings("ignore", message=".*register_generator_state")
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay
