"""What a step does over and over on a GPU, recorded once as a CUDA graph and launched as one.

A step of `record` is some ten thousand kernels, most of them of a few microseconds: to launch one by one from Python
takes longer than to run them.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


def directly(key: Hashable, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`: what stands in the place of a CudaGraphs where nothing is recorded."""
    return function(*tensors)


class CudaGraphs:
    """`graphs(key, function, *tensors)` is `function(*tensors)`, one tensor; from a key's second call on as a replay of
    what the first one recorded.

    The function must do the same for every call with its key but for what it reads in `tensors`, which have the same
    shapes each time. What else it reads or changes must stay where it is in memory: parameters, buffers, gradients that
    are views. It may not wait for the GPU. The result is overwritten by the next call with its key.
    """

    def __init__(self, device: torch.device) -> None:
        # Not the default stream, which cannot be recorded, and the same for all that the process does from here on:
        # autograd adds up gradients on the stream that was there when it first saw their parameters.
        torch.cuda.set_stream(torch.cuda.Stream(device))
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # of memory for all of them: no two run at a time

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        if key not in self._recorded:
            result = function(*tensors)  # compiles all that there is to compile; a recording only records
            inputs, graph = tuple(tensor.clone() for tensor in tensors), torch.cuda.CUDAGraph()
            # Other threads, one that pins memory for batches among them, may go on meanwhile.
            stream = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                    output = function(*inputs)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise RuntimeError(
                    f"this cannot be recorded as a CUDA graph ({reason}): --run.no-cuda-graphs does without"
                ) from error
            self._recorded[key] = graph, inputs, output
            return result
        graph, inputs, output = self._recorded[key]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return output
