"""Our stand-in for the module that runs upstream's tensor-parallel tests on several processes."""

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from transformers_tests.distributed_testing_utils import run_distributed


def _sum_of_ranks(rank, expected):
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    assert total == expected, f"rank {rank} got {total}"


def test_ranks_form_one_group_and_their_errors_arrive():
    run_distributed(world_size=2)(_sum_of_ranks)(3)
    with pytest.raises(ProcessRaisedException, match="got 3"):
        run_distributed(world_size=2)(_sum_of_ranks)(4)
