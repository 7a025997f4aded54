"""`run_distributed`, which runs a function of the tensor-parallel suite on several ranks (gloo, on the CPU)."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_distributed(world_size: int) -> Callable:
    """
    `run_distributed(world_size)(function)(*args)` calls `function(rank, *args)` in `world_size` processes that form
    a process group, and raises what any of them raises. The function and its arguments are pickled.
    """

    def wrap(function: Callable) -> Callable:
        def run(*args) -> None:
            with tempfile.TemporaryDirectory() as folder:
                # One server imports the libraries once; each rank is forked from it, before torch has any threads.
                torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["transformers.modeling_utils"])
                torch.multiprocessing.start_processes(
                    _run_rank, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver"
                )

        return run

    return wrap


def _run_rank(rank: int, world_size: int, folder: str, function: Callable, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))  # as torchrun sets them
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
