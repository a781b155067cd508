"""10-crop and multi-scale on torchvision's ResNet-18, compared with a reference in plain Pillow and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from data_prep.beton.manifest import load_manifest
from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import CenterCrop, Interpolation
from resnet_dist.data.decoder import ImageSettings
from resnet_dist.data.loader import BetonLoader
from resnet_dist.errors import Fault, UserError
from resnet_dist.evaluation.evaluate import EvaluationJob, _evaluate_share, on_local_workers, open_protocol
from resnet_dist.evaluation.predictions import part_path
from resnet_dist.evaluation.protocols import Box, Protocol, View, make_fully_convolutional, window
from resnet_dist.evaluation.views import ViewLoader
from resnet_dist.training.model import build_classifier
from resnet_dist.weights.source import TrainedModel

pytestmark = pytest.mark.system

RECIPE = Path(__file__).parents[3] / "resnet_dist" / "recipes" / "resnet152_90ep.yaml"
SIZE, RESIZE, SCALES = 64, 72, (64, 72, 96)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small nets; on a busy machine more threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torchvision_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = torchvision.models.resnet18(num_classes=3)
    for module in net.modules():  # random statistics, so that pictures get unlike answers
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def trained(net: nn.Module, name: str = "resnet18", *sets: str) -> TrainedModel:
    recipe = load_recipe(
        RECIPE,
        [
            f"model.name={name}",
            "model.num_classes=3",
            "train.precision=fp32",
            "eval.batch_size=4",
            f"data.train.size={SIZE}",
            f"data.eval.size={SIZE}",
            f"data.eval.resize={RESIZE}",
            *sets,
        ],
    )
    classifier = build_classifier(recipe).eval()
    classifier.net.load_state_dict(net.state_dict())
    return TrainedModel("test", recipe, classifier, None)


def probabilities(models: list[TrainedModel], beton: Path, protocol: Protocol) -> Tensor:
    """[samples, classes], as the command computes them."""
    manifest = load_manifest(beton)
    if protocol.fully_convolutional:
        for model in models:
            make_fully_convolutional(model.classifier, SIZE, model.name)
    job = EvaluationJob(tuple(models), protocol, beton, num_threads=2)
    with ExitStack() as stack, torch.inference_mode():
        module, batches, _ = open_protocol(job, CPU, stack)
        return torch.cat([module(batch.images) for batch in batches(np.arange(manifest.num_samples))]).softmax(dim=1)


def normalised(picture: Image.Image) -> Tensor:
    """[1, 3, H, W], by torchvision."""
    tensor = v2.functional.to_dtype(v2.functional.to_image(picture), torch.float32, scale=True)
    return v2.functional.normalize(tensor, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]


@torch.inference_mode()
def reference_ten_crop(net: nn.Module, picture: Image.Image) -> Tensor:
    """Five crops and their mirror images. (`TenCrop` crops the mirrored picture: half a px off the middle differs.)"""
    crops = v2.FiveCrop(SIZE)(v2.Resize(RESIZE)(picture))
    shown = [*crops, *(v2.functional.hflip(crop) for crop in crops)]
    return torch.stack([net(normalised(crop))[0].softmax(dim=0) for crop in shown]).mean(dim=0)


@torch.inference_mode()
def reference_flip(net: nn.Module, picture: Image.Image) -> Tensor:
    crop = v2.CenterCrop(SIZE)(v2.Resize(RESIZE)(picture))
    return torch.stack([net(normalised(x))[0].softmax(dim=0) for x in (crop, v2.functional.hflip(crop))]).mean(dim=0)


@torch.inference_mode()
def reference_multi_scale(net: Any, picture: Image.Image) -> Tensor:
    """Every place of the last map that a window of training's size can take is scored by itself."""
    side = SIZE // 32
    answers = []
    for scale in SCALES:
        for image in (v2.Resize(scale)(picture), v2.functional.hflip(v2.Resize(scale)(picture))):
            x = net.maxpool(net.relu(net.bn1(net.conv1(normalised(image)))))
            maps = net.layer4(net.layer3(net.layer2(net.layer1(x))))[0]
            scores = [
                net.fc(maps[:, top : top + side, left : left + side].mean(dim=(1, 2)))
                for top in range(maps.shape[1] - side + 1)
                for left in range(maps.shape[2] - side + 1)
            ]
            answers.append(torch.stack(scores).mean(dim=0).softmax(dim=0))
    return torch.stack(answers).mean(dim=0)


@pytest.mark.parametrize(
    ("protocol", "reference"),
    [
        (Protocol("flip"), reference_flip),
        (Protocol("10-crop"), reference_ten_crop),
        (Protocol("multi-scale", scales=SCALES), reference_multi_scale),
    ],
    ids=["flip", "10-crop", "multi-scale"],
)
def test_equal_to_a_straightforward_reference(
    pictures: Any, protocol: Protocol, reference: Callable[[nn.Module, Image.Image], Tensor]
) -> None:
    nets = [torchvision_net(seed) for seed in (1, 2)]
    images = [Image.open(path).convert("RGB") for path in pictures.files]
    wanted = [torch.stack([reference(net, image) for image in images]) for net in nets]
    assert wanted[0].std(dim=0).min() > 1e-3, "pictures that all look alike would prove nothing"
    alone = probabilities([trained(nets[0])], pictures.beton, protocol)
    torch.testing.assert_close(alone, wanted[0], rtol=0, atol=2e-6)
    both = probabilities([trained(net) for net in nets], pictures.beton, protocol)
    torch.testing.assert_close(both, (wanted[0] + wanted[1]) / 2, rtol=0, atol=2e-6)


def test_members_of_an_ensemble_see_crops_of_their_own(pictures: Any) -> None:
    nets = [torchvision_net(seed) for seed in (1, 2)]
    own = [[], ["data.eval.size=96", "data.eval.resize=96", "data.eval.interpolation=bicubic"]]
    models = [trained(net, "resnet18", *sets) for net, sets in zip(nets, own, strict=True)]
    alone = [probabilities([model], pictures.beton, Protocol("flip")) for model in models]
    both = probabilities(models, pictures.beton, Protocol("flip"))
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2, rtol=0, atol=2e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pictures_read_by_pillow_are_the_loaders_pixel_by_pixel(pictures: Any, interpolation: Interpolation) -> None:
    manifest = load_manifest(pictures.beton)
    ids = np.arange(manifest.num_samples)
    crop = CenterCrop(kind="center_crop", size=SIZE, resize=RESIZE, interpolation=interpolation)
    crops = BetonLoader(pictures.beton, ImageSettings(crop), batch_size=4)
    view = View(RESIZE, "centre", SIZE, interpolation)
    views = ViewLoader(pictures.beton, [view], batch_size=4, num_threads=2, device=CPU)
    for ours, theirs in zip(crops.epoch(0, ids), views.batches(ids), strict=True):
        (group,) = theirs.images[view]
        assert group.places.tolist() == list(range(len(ours.labels)))
        assert torch.equal(ours.images, group.images)
        assert torch.equal(ours.labels, theirs.labels)
    crops.close()
    views.close()


def test_a_picture_too_large_in_full_is_named_before_any_is_read(pictures: Any) -> None:
    arguments = {"batch_size": 4, "num_threads": 1, "device": CPU}
    whole = [View(3_000, "whole", 0), View(12_000, "centre", 8)]
    ViewLoader(pictures.beton, whole[1:], **arguments).close()
    with pytest.raises(UserError, match=r"sample 4 of .* is 200 x 64 px: with a shorter side of 3400 px .* 10-crop"):
        ViewLoader(pictures.beton, [View(3_400, "whole", 0), *whole], **arguments)


def test_two_processes_give_the_same_numbers_to_the_last_bit(pictures: Any, tmp_path: Path) -> None:
    model = trained(torchvision_net(1))
    make_fully_convolutional(model.classifier, SIZE, model.name)
    job = EvaluationJob((model,), Protocol("multi-scale", scales=(64, 80)), pictures.beton, num_threads=1)
    parts = {}
    for num_workers in (1, 2):
        (tmp_path / str(num_workers)).mkdir()
        job = replace(job, predictions=tmp_path / str(num_workers), keeps_all=True)
        parts[num_workers], _ = on_local_workers(partial(_evaluate_share, job), num_workers)
    alone, both = parts[1], parts[2]
    predictions = [b"".join(part_path(tmp_path / str(n), rank).read_bytes() for rank in range(n)) for n in (1, 2)]
    assert predictions[0] == predictions[1] != b""
    assert both.metrics() == alone.metrics()
    assert both.calibration == alone.calibration
    np.testing.assert_array_equal(both.confusion, alone.confusion)


class BreaksOn(nn.Module):
    """Gives one broken logit for each picture that is as bright as the one at `place` of the beton."""

    def __init__(self, net: nn.Module, bad: float, pixels: Tensor) -> None:
        super().__init__()
        self.net, self.bad, self.pixels = net, bad, pixels

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        is_it = (images == self.pixels).flatten(1).all(dim=1, keepdim=True)
        return logits.index_fill(1, torch.tensor([2]), self.bad).where(is_it, logits)


@pytest.mark.parametrize(
    ("bad", "kind", "num_nets"),
    [(torch.nan, "1-crop", 1), (torch.inf, "10-crop", 1), (-torch.inf, "flip", 2), (torch.nan, "1-crop", 2)],
)
def test_a_net_that_gives_nan_for_a_picture_is_counted_and_the_picture_named(
    pictures: Any, bad: float, kind: Any, num_nets: int
) -> None:
    """However many views and nets are averaged: one that has no answer leaves the sample without one."""
    views = ViewLoader(pictures.beton, [View(RESIZE, "centre", SIZE)], batch_size=7, num_threads=1, device=CPU)
    (batch,) = views.batches(np.arange(7))
    views.close()
    nets = [trained(torchvision_net(seed)) for seed in range(num_nets)]
    fifth = next(iter(batch.images.values()))[0].images[5]
    broken = replace(nets[0], classifier=BreaksOn(nets[0].classifier, bad, fifth))
    job = EvaluationJob((broken, *nets[1:]), Protocol(kind), pictures.beton, num_threads=1)
    result, _ = _evaluate_share(job, 0, 1)
    assert (result.num_not_finite, result.first_not_finite, result.is_finite) == (1, 5, False)
    assert result.confusion is not None
    assert result.confusion.sum() == 6


def fails_on_the_second(rank: int, world_size: int) -> int:
    if rank == 1:
        raise Fault("the second has no more to say")
    torch.distributed.barrier()
    return rank


@pytest.mark.slow
def test_the_user_reads_a_failed_workers_message() -> None:
    with pytest.raises(Fault, match="the second has no more to say"):
        on_local_workers(fails_on_the_second, 2)


def test_windows_of_the_views() -> None:
    assert window(View(256, "top-left", 224), 300, 256) == Box(0, 0, 224, 224)
    assert window(View(256, "bottom-right", 224), 300, 256) == Box(76, 32, 300, 256)
    assert window(View(256, "centre", 224), 301, 257) == Box(38, 16, 262, 240)  # 38.5 and 16.5 px go to the even side
    assert window(View(224, "whole", 0), 300, 224) == Box(0, 0, 300, 224)


OWN = CenterCrop(kind="center_crop", size=224, resize=256)


@pytest.mark.parametrize(
    ("protocol", "size", "resize"),
    [
        (Protocol(), 224, 256),
        (Protocol(size=288), 288, 329),
        (Protocol(size=288, resize=288), 288, 288),
        (Protocol(resize=232), 224, 232),
    ],
)
def test_other_test_sizes_keep_the_recipes_ratio_by_default(protocol: Protocol, size: int, resize: int) -> None:
    assert protocol.views(OWN) == (View(resize, "centre", size),)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (Protocol(resize=200), "raise --resize"),
        (Protocol("multi-scale", size=288), "multi-scale takes --scales"),
        (Protocol("multi-scale", scales=(224, 20000)), "--scales: 20,000 px is more than 16,384"),
        (Protocol(size=16384), "--size, --resize: 18,725 px is more than 16,384"),
        (Protocol(resize=10**9), "--size, --resize: 1,000,000,000 px is more than"),
    ],
)
def test_sides_that_do_not_fit_are_refused(protocol: Protocol, message: str) -> None:
    with pytest.raises(UserError, match=message):
        protocol.views(OWN)


def test_a_net_with_fully_connected_layers_cannot_be_made_convolutional() -> None:
    with torch.device("meta"):
        classifier = build_classifier(load_recipe(RECIPE, ["model.name=vgg16"]))
    with pytest.raises(UserError, match="use --protocol 10-crop"):
        make_fully_convolutional(classifier, 224, "runs/vgg")
