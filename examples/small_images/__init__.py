"""CIFAR-100 at equal cost: data and augmented views, the ResNet10 family, methods, joint training."""
