"""`train.gradient_compression: powersgd`: which gradients workers send as factors, and how many numbers that is."""

from __future__ import annotations

RANK = 4
"""Vogels et al. 2019: rank 2 to 4 keep the accuracy of ResNet-18 on CIFAR-10."""


def sent_as_factors(shape: tuple[int, ...]) -> bool:
    """Whether a parameter of `shape`, as a matrix [first, all others], goes as factors: at least half is saved."""
    rows, columns = matrix(shape)
    return len(shape) > 1 and 2 * RANK * (rows + columns) < rows * columns


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter of `shape`."""
    columns = 1
    for side in shape[1:]:
        columns *= side
    return shape[0], columns


def numbers_sent(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """In a step's two messages: left factors with the whole gradients of all others, then right factors."""
    first = second = 0
    for shape in shapes:
        rows, columns = matrix(shape)
        if sent_as_factors(shape):
            first += RANK * rows
            second += RANK * columns
        else:
            first += rows * columns
    return first, second
