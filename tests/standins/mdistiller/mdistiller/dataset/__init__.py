from . import cifar100, imagenet, tiny_imagenet


def get_dataset(cfg):
    if cfg.DATASET.TYPE != "cifar100":
        raise NotImplementedError(cfg.DATASET.TYPE)
    train, val = cifar100.loaders(cfg.SOLVER.BATCH_SIZE, cfg.DATASET.TEST.BATCH_SIZE, cfg.DATASET.NUM_WORKERS)
    return train, val, len(train.dataset), 100


__all__ = ["cifar100", "get_dataset", "imagenet", "tiny_imagenet"]
