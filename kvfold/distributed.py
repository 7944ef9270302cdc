"""Several processes of one run (torchrun, accelerate launch): which of them this is, and sums over all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor

LONGEST_WAIT = timedelta(days=1)
"""For the first process, which writes what all have found."""


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """Of several of a machine the one that belongs to this process."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device.startswith("cuda") and "LOCAL_RANK" in os.environ else device


def start(device: str) -> str:
    """Make the processes know each other, by NCCL between GPUs and gloo between CPUs. Returns `device`."""
    if world_size() > 1:
        PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT)
    return device


def wait_for_all() -> None:
    """Until every process has come here."""
    if world_size() > 1:
        torch.distributed.barrier()


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process goes through alone: the others find what it wrote."""
    if rank():
        wait_for_all()
    yield
    if not rank():
        wait_for_all()


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in each of them."""
    if world_size() > 1:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, one process after the other, in each of them."""
    if world_size() == 1:
        return rows
    found: list[Tensor] = [rows] * world_size()
    torch.distributed.all_gather_object(found, rows.cpu())
    return torch.cat(found).to(rows.device)


def values_of_all(value: int) -> set[int]:
    """What the processes have, each its own."""
    if world_size() == 1:
        return {value}
    found: list[int] = [0] * world_size()
    torch.distributed.all_gather_object(found, value)
    return set(found)
