"""DiSK, and methods guided by it, in mdistiller (megvii-research/mdistiller), without editing its files.

From the command line, with all that the host's own ``tools/train.py`` does:

```bash
python -m disk_plugin.integrations.mdistiller --host ../mdistiller --distiller DISK --cfg configs/cifar100/kd.yaml
```

or in your own script that has the checkout on ``sys.path``, before the configuration is read:

```python
from disk_plugin.integrations.mdistiller import register

register()
```

Forks run too, such as sunshangquan/logit-standardization-KD: their tables, loaders and trainers are looked up, and what
this adapter cannot use of them is an error of one line before anything is written.

Run with commit a08d46f (2023-11-05) of the host, torch 2.15, torchvision 0.29 and yacs 0.1.8. The host is not on PyPI:
``git clone https://github.com/megvii-research/mdistiller``, and ``pip install "disk-plugin[mdistiller]"`` for what it
needs beside torch.
"""


def register() -> None:
    """Add DiSK to the ``mdistiller`` that is on ``sys.path``; may be called again.

    - ``distiller_dict`` gets ``DISK`` and, for each of ``disk_plugin.features.METHODS``, ``<NAME>`` (unless the host
      has one) and ``DISK_<NAME>``, the method weighted by the guide.
    - ``trainer_dict`` gets ``disk``, Algorithm 1. The host's trainers are replaced by subclasses with the same loops.
      These also seed each epoch if ``SOLVER.SEED`` is set, start the student from ``DISTILLER.WARM_START``, log DiSK's
      terms and the teacher's accuracy, evaluate DiSK's loss once over the gathered batch instead of once per replica,
      and commit an epoch's files together.
    - ``CFG`` gets their sections, the keys ``SOLVER.SEED``, ``DISTILLER.WARM_START`` and, for the launcher,
      ``DATASET.HELD_OUT``. ``LOG.WANDB`` becomes False, as the host fails with True if wandb is not installed.
    - In ``mdistiller.engine`` checkpoints are replaced atomically and loaded with ``weights_only``, which is torch's
      default from 2.6 on. Learning rates are Python floats, as it refuses the NumPy scalars that the host saves after a
      decay.

    Raises:
        ImportError: ``mdistiller``, or a package that it needs, cannot be imported; the message says how to get it.
    """
    from .checkout import import_host

    import_host()
    from . import config, distillers, trainers

    config.add_defaults()
    distillers.add()
    trainers.add()
