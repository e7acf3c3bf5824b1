"""Arithmetic that a decoder repeats to the last bit, whatever the number of processor cores at either end.

How a library cuts a convolution into blocks, and so the order in which it sums, depends on the number of threads that it
is given. What encoder and decoder must both compute therefore runs on one thread at a time, and what more cores can
share is cut here, always in the same two parts: each is computed by one thread, at the same time or one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from threading import RLock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 1 << 23
"""Multiplications from which on a convolution is cut: fewer take less time than waking a thread."""
_VECTOR = 16
"""Output channels that a processor computes together; the first half is a multiple of it."""
_inside: ContextVar[bool] = ContextVar("inside repeatable()", default=False)
_helper: ContextVar[ThreadPoolExecutor | None] = ContextVar("the second thread", default=None)
_turn = RLock()
"""Held in `repeatable()`: what it sets, PyTorch keeps for the whole process."""


@contextmanager
def repeatable() -> Iterator[None]:
    """In it the convolutions of this module, and all else on a CPU, give the same bits for any number of threads.

    On a GPU cuDNN's deterministic algorithms do, in full float32. An autocast around it has no effect in it, and threads
    that enter it take turns.
    """
    with ExitStack() as stack:
        stack.enter_context(_turn)
        threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        stack.enter_context(
            torch.backends.cudnn.flags(True, benchmark=False, deterministic=True, allow_tf32=False)
        )
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        helper = (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) if threads > 1 else None
        )
        for variable, value in ((_inside, True), (_helper, helper and stack.enter_context(helper))):
            stack.callback(variable.reset, variable.set(value))
        yield


def both(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The results of two independent computations, inside `repeatable` on two threads where there are two."""
    helper = _helper.get()
    if helper is None:
        return first(), second()
    later = helper.submit(torch.inference_mode()(second))
    return first(), later.result()


class Conv2d(nn.Conv2d):
    """A convolution which inside `repeatable` is computed in two halves of its output channels."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_cut(self, x):
            return super().forward(x)
        return _in_halves(self._conv_forward, x, self.weight, self.bias, 0)


class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution which inside `repeatable` is computed in two halves of its output channels."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_cut(self, x):
            return super().forward(x)
        run = partial(
            F.conv_transpose2d, stride=self.stride, padding=self.padding, output_padding=self.output_padding
        )
        return _in_halves(run, x, self.weight, self.bias, 1)


def _is_cut(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """By the sizes alone, so that encoder and decoder agree."""
    large = layer.out_channels > _VECTOR and layer.weight.numel() * x.shape[2] * x.shape[3] >= _LEAST
    return large and _inside.get() and not x.is_cuda


def _in_halves(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor, dim: int
) -> Tensor:
    middle = _VECTOR * -(-len(bias) // (2 * _VECTOR))
    cuts = (middle, len(bias) - middle)
    halves = [partial(run, x, *half) for half in zip(weight.split(cuts, dim), bias.split(cuts))]
    return torch.cat(both(*halves), 1)
