"""What tests with several processes share."""

from torch import distributed as dist


def leave_group():
    """Destroy the process group once its work is done.

    Gloo's thread frees the last tensors under Python's lock, which torch 2.4 holds while it waits for that thread.
    """
    dist.barrier()
    dist.destroy_process_group()
