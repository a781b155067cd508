"""Two coordinates that published recipes agree on better than on learning rate and weight decay. Pure.

    lr_per_256   lr * 256 / B: the linear scaling rule (Goyal et al. 2017) taken out
    tau_epochs   (1 - m) / (lr * wd * steps per epoch): over how many epochs the weights are an exponential moving
                 average of their updates (Wang and Aitchison 2024, arXiv 2405.13698; for SGD, lr / (1 - m) is the rate
                 that momentum m amounts to)

Where batch norm follows a weight, only the product lr * wd decides the size of a relative step in the long run, so good
values of lr and wd lie on a ridge; in (lr_per_256, tau_epochs) that ridge is parallel to an axis.
"""

from __future__ import annotations


def lr_of(lr_per_256: float, *, global_batch_size: int) -> float:
    """The learning rate of the whole global batch."""
    return lr_per_256 * global_batch_size / 256


def lr_per_256_of(lr: float, *, global_batch_size: int) -> float:
    return lr * 256 / global_batch_size


def weight_decay_of(tau_epochs: float, *, lr: float, momentum: float, steps_per_epoch: int) -> float:
    return (1 - momentum) / (lr * tau_epochs * steps_per_epoch)


def tau_epochs_of(weight_decay: float, *, lr: float, momentum: float, steps_per_epoch: int) -> float:
    """Infinite without weight decay."""
    if weight_decay == 0:
        return float("inf")
    return (1 - momentum) / (lr * weight_decay * steps_per_epoch)
