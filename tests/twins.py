"""The same module and batch twice: in float64 on the CPU, and in float32 on a device."""

import copy

import torch

N, C, D = 37, 23, 6


def batch(seed=0, ignored=True):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(N, C, generator=generator, dtype=torch.double) for _ in range(2))
    target = torch.randint(C, (N,), generator=generator)
    if ignored:
        target[5] = -100
    return student, teacher, target, torch.randn(N, D, generator=generator, dtype=torch.double)


def moved(values, device, dtype=torch.float32):
    return [value.to(device, dtype if value.is_floating_point() else None) for value in values]


def twins(make, device):
    """The same module twice: float64 on the CPU, float32 on the device."""
    torch.manual_seed(1)
    module = make()
    return copy.deepcopy(module).double(), module.to(device)


def evaluated(terms_of, student, *others, parameters=()):
    """Terms, then the gradients by student and parameters."""
    student = student.clone().requires_grad_()
    terms = terms_of(student, *others)
    gradients = torch.autograd.grad(terms.loss.sum(), [student, *parameters])
    return [value.detach() for value in terms], gradients


def assert_close(found, expected, tolerance=2e-5):
    """Equal but for float32's rounding, which is that of the largest value."""
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().cpu().double(), other.detach().double()
        bound = tolerance * max(other.abs().max().item(), 1.0)
        torch.testing.assert_close(one, other, rtol=0, atol=bound)
