"""What tests with several processes share."""

import os


def leave_group():
    """End this process, which has written what it found.

    Under torch 2.4 destroy_process_group holds Python's lock and may wait for ever for gloo's thread, which needs it.
    """
    os._exit(0)
