"""A net with global average pooling made fully convolutional (He et al. 2015, section 3.4).

At training's size the last map has S x S places (7 x 7 at 224 px) and is averaged whole. On a larger image the same
S x S average slides over the map, the linear layer scores every place, and the scores are averaged. The layer is
linear, so the average may be taken before it: border places of the map count less than with one global average.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from resnet_dist.errors import UserError
from resnet_dist.models.classifier import ImageClassifier


class DensePool(nn.Module):
    """[N, C, H, W] -> [N, C, 1, 1]: mean over all positions of a window of `side` x `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        window = (min(self.side, x.shape[2]), min(self.side, x.shape[3]))
        return avg_pool2d(x, window, stride=1).mean(dim=(2, 3), keepdim=True)


def make_fully_convolutional(classifier: ImageClassifier, train_size: int, name: str) -> None:
    """Changes the classifier's net in place. `train_size`: side of the images it was trained on, px.

    Raises UserError for a net whose last map is not averaged whole (VGG), naming it `name`.
    """
    pool = getattr(classifier.net, "avgpool", None)
    if not isinstance(pool, nn.AdaptiveAvgPool2d) or pool.output_size not in (1, (1, 1)):
        raise UserError(
            f"{name}: multi-scale needs a net that averages its last map; this one has fully connected layers: take "
            "--protocol 10-crop"
        )
    classifier.net.avgpool = DensePool(_map_side(classifier, pool, train_size))


@torch.no_grad()
def _map_side(classifier: ImageClassifier, pool: nn.Module, train_size: int) -> int:
    seen: list[int] = []
    hook = pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    was_training = classifier.training
    try:
        classifier.eval()(torch.zeros((1, train_size, train_size, 3), dtype=torch.uint8))
    finally:
        hook.remove()
        classifier.train(was_training)
    return seen[0]
