"""DiSK, and methods guided by it, in mdistiller (megvii-research/mdistiller), none of whose files is edited.

From the command line, with everything that the host's own ``tools/train.py`` does::

    python -m disk_plugin.integrations.mdistiller --host ../mdistiller --distiller DISK --cfg configs/cifar100/kd.yaml

or in a script of one's own that has the checkout on ``sys.path``, before the configuration is read::

    from disk_plugin.integrations.mdistiller import register

    register()

Run with commit a08d46f (2023-11-05) of the host, torch 2.15, torchvision 0.29 and yacs 0.1.8. The host is not on the
package registry: ``git clone https://github.com/megvii-research/mdistiller``, and
``pip install "disk-plugin[mdistiller]"`` for what it needs beside torch.
"""


def register() -> None:
    """Add DiSK to the ``mdistiller`` that is on ``sys.path``; may be called again.

    - ``distiller_dict``: ``DISK`` and, of each of ``disk_plugin.features.METHODS``, ``<NAME>`` (unless the host has
      one) and ``DISK_<NAME>``, the method weighted by the guide.
    - ``trainer_dict``: ``disk``, Algorithm 1. The host's trainers are replaced by subclasses with the same loops that
      also seed each epoch if ``SOLVER.SEED`` is set, start the student from ``DISTILLER.WARM_START``, log DiSK's terms
      and the teacher's accuracy, evaluate DiSK's loss once over the gathered batch instead of once per replica, and put
      an epoch's files in their places together.
    - ``CFG``: their sections, the keys ``SOLVER.SEED`` and ``DISTILLER.WARM_START``;
      ``LOG.WANDB`` becomes False, as the host fails with True where wandb is not installed.
    - ``mdistiller.engine.trainer``: checkpoints are replaced atomically, and learning rates are Python floats, as the
      NumPy scalars that the host saves after a decay cannot be loaded by torch 2.6 and later.

    Raises:
        ImportError: ``mdistiller``, or what it needs, cannot be imported; the message says how to get it.
    """
    try:
        import mdistiller.distillers
        import mdistiller.engine  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"mdistiller cannot be imported ({error}): put a checkout of https://github.com/megvii-research/mdistiller "
            f'on sys.path (its root, not tools/) and pip install "disk-plugin[mdistiller]"'
        ) from error
    from . import config, distillers, trainers

    config.add_defaults()
    distillers.add()
    trainers.add()
