"""Stored images in, logits out: normalisation, memory layout, precision, export."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as tvf

from resnet_dist.models import ImageClassifier, build_model

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def some_images(num: int, height: int = 32, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(0, 256, (num, height, width, 3), dtype=torch.uint8, generator=generator)


def classifier(name: str = "resnet20", channels_last: bool = True) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(build_model(name, 10), mean=MEAN, std=STD, channels_last=channels_last).eval()


def what_the_net_sees(model: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.net.register_forward_pre_hook(lambda _net, inputs: seen.append(inputs[0]))
    model(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalises_as_torchvision_does(channels_last: bool) -> None:
    images = some_images(3)
    reference = torch.stack([tvf.to_tensor(image.numpy()) for image in images])
    reference = tvf.normalize(reference, [m / 255 for m in MEAN], [s / 255 for s in STD])
    seen = what_the_net_sees(classifier(channels_last=channels_last), images)
    torch.testing.assert_close(seen, reference, rtol=1e-5, atol=1e-6)


def test_memory_layout_is_as_asked_for_and_changes_no_result() -> None:
    images = some_images(3)
    nhwc, nchw = classifier(channels_last=True), classifier(channels_last=False)
    assert what_the_net_sees(nhwc, images).is_contiguous(memory_format=torch.channels_last)
    assert what_the_net_sees(nchw, images).is_contiguous()
    assert nhwc.net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert nchw.net.layer1[0].conv1.weight.is_contiguous()
    torch.testing.assert_close(nhwc(images), nchw(images), rtol=1e-4, atol=1e-5)


def test_the_state_dict_is_the_nets_alone() -> None:
    model = classifier("resnet18")
    net = build_model("resnet18", 10)
    assert model.net.state_dict().keys() == net.state_dict().keys()
    assert model.state_dict().keys() == {f"net.{key}" for key in net.state_dict()}
    net.load_state_dict(model.net.state_dict())
    again = ImageClassifier(net.eval(), mean=MEAN, std=STD, channels_last=True)
    assert torch.equal(again(some_images(2, 64, 64)), model(some_images(2, 64, 64)))


def test_float64_throughout() -> None:
    images = some_images(3)
    model = classifier().double()
    seen = what_the_net_sees(model, images)
    expected = (images.double().permute(0, 3, 1, 2) - model.mean.view(3, 1, 1)) / model.std.view(3, 1, 1)
    assert seen.dtype == torch.float64
    assert torch.equal(seen, expected)
    logits = model(images)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), classifier()(images), rtol=1e-4, atol=1e-5)


def test_bf16_autocast_normalises_in_float32() -> None:
    images, model = some_images(3), classifier()
    expected = what_the_net_sees(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(what_the_net_sees(model, images), expected)
        logits = model(images)
    assert expected.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - model(images)).abs().max() < 0.1
