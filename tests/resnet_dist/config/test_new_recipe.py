"""`resnet-dist new`: for any data set a recipe that loads, has steps, and does what its comments say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.config.loading import bare_profile, recipe_from_yaml
from resnet_dist.config.new_recipe import (
    MOST_LEFT_OUT,
    DataFacts,
    StartFacts,
    choose_batch,
    new_recipe,
    suggest_net,
)
from resnet_dist.config.recipe import PadCrop, RandomResizedCrop, Recipe
from resnet_dist.errors import UserError
from resnet_dist.training.schedule import plan_run

PROFILE = bare_profile((), workers=2, cpus_per_worker=1)


def facts(*counts: int, side: int = 300, sides: tuple[int, int] | None = None, **others: Any) -> DataFacts:
    smallest, largest = sides or (side, side)
    names = [f"class {label}" for label in range(len(counts))]
    return DataFacts(**{"dataset": "my", "class_names": names, **others}, class_counts=counts, short_side=side,
                     smallest_side=smallest, largest_side=largest)  # fmt: skip


def written(data: DataFacts, net: str | None = None, start: StartFacts | None = None) -> tuple[Recipe, str, list[str]]:
    net = net or suggest_net(data)
    for_cifar = net in ("resnet20", "resnet56")
    text, warnings = new_recipe(data, net, start, for_cifar=for_cifar, command="resnet-dist train my.yaml --on p.yaml")
    return recipe_from_yaml(text, "my.yaml"), text, warnings


@st.composite
def data_sets(draw: st.DrawFn) -> DataFacts:
    sides = sorted(draw(st.lists(st.integers(1, 65_535), min_size=3, max_size=3)))
    if draw(st.booleans()):
        sides = sides[:1] * 3
    num_classes = draw(st.integers(1, 20))
    counts = draw(st.lists(st.integers(0, draw(st.sampled_from([4, 100, 1_000_000]))), min_size=num_classes,
                           max_size=num_classes).filter(lambda c: sum(c) >= 2))  # fmt: skip
    return DataFacts(
        dataset=draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")),
        class_names=draw(st.lists(st.text(min_size=1), min_size=num_classes, max_size=num_classes)),
        class_counts=counts,
        short_side=sides[1],
        smallest_side=sides[0],
        largest_side=sides[2],
    )


STARTS = st.one_of(
    st.none(),
    st.builds(StartFacts, st.text(min_size=1).filter(str.isprintable)),
    st.builds(
        StartFacts,
        st.just("w.pth"),
        net_options=st.sampled_from([{}, {"zero_init_residual": True}]),
        same_classes=st.booleans(),
        size=st.integers(16, 512),
        resize=st.integers(512, 600),
        interpolation=st.sampled_from([None, "bicubic"]),
    ),
)


@settings(max_examples=80, deadline=None)
@given(data=data_sets(), start=STARTS, net=st.sampled_from([None, "resnet20", "resnet50"]))
def test_any_data_set_gets_a_recipe_that_trains_on_two_workers(
    data: DataFacts, start: StartFacts | None, net: str | None
) -> None:
    recipe, text, warnings = written(data, net, start)
    assert plan_run(recipe, PROFILE, data.num_images).total_steps >= 10
    assert recipe.train.num_micro_batches >= 2
    assert recipe.data.dataset == data.dataset
    assert recipe.model.num_classes == len(data.class_counts)
    assert max(map(len, text.splitlines())) <= 120 or "resnet-dist train" in max(text.splitlines(), key=len)
    left_out = data.num_images % recipe.train.global_batch_size
    assert (left_out > MOST_LEFT_OUT * data.num_images) == any("left out" in warning for warning in warnings)
    if isinstance(recipe.data.train, PadCrop):
        assert data.smallest_side == data.largest_side == recipe.data.train.size == recipe.data.eval.size
    elif recipe.data.eval.resize > data.short_side:
        assert any("enlarged" in warning for warning in warnings)


def test_a_small_set_leaves_out_no_more_than_it_must() -> None:
    lossy = [
        num_images
        for num_images in range(2, 2_000)
        if num_images % choose_batch(num_images, 128, 64)[0] / num_images > 0.05
    ]
    assert lossy == [5, 7, 11, 13, 17, 19]


def test_eight_images_of_two_classes() -> None:
    recipe, _, warnings = written(facts(4, 4))
    assert (recipe.model.name, recipe.train.global_batch_size, recipe.train.micro_batch_size) == ("resnet18", 8, 4)
    assert warnings == []


def test_imagenet_gets_the_published_recipe() -> None:
    recipe, _, warnings = written(facts(*[1300] * 731, *[1050] * 269, side=375, sides=(20, 9331)))
    assert (recipe.model.name, recipe.train.total_epochs, recipe.train.global_batch_size) == ("resnet50", 90, 256)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.train.precision) == (0.1, 1e-4, "bf16")
    assert (recipe.data.train.size, recipe.data.eval.resize) == (224, 256)
    assert isinstance(recipe.data.train, RandomResizedCrop)
    assert recipe.data.train.scale == (0.08, 1)
    assert warnings == []


def test_cifar_gets_the_papers_net_batch_and_crop() -> None:
    recipe, _, _ = written(facts(*[5000] * 10, side=32))
    assert (recipe.model.name, recipe.train.global_batch_size, recipe.optim.lr) == ("resnet56", 128, 0.1)
    assert isinstance(recipe.data.train, PadCrop)
    assert recipe.data.train.pad == 4


def test_fine_tuning_takes_the_weights_own_transform_and_fewer_steps_at_a_lower_rate() -> None:
    data = facts(100, 100, side=500, sides=(300, 800))
    source = "torchvision:resnet50.IMAGENET1K_V2"
    start = StartFacts(source, mean=(1, 2, 3), std=(50, 50, 50), size=224, resize=232, interpolation="bicubic")
    tuned, text, warnings = written(data, "resnet50", start)
    scratch, _, _ = written(data, "resnet50")
    assert tuned.model.init is not None
    assert (tuned.model.init.weights, tuned.model.init.head) == (source, "new")
    assert (tuned.data.mean, tuned.data.std) == ((1, 2, 3), (50, 50, 50))
    assert (tuned.data.eval.size, tuned.data.eval.resize, tuned.data.eval.interpolation) == (224, 232, "bicubic")
    assert scratch.data.mean == scratch.data.std == "from_data"
    assert tuned.train.total_epochs < scratch.train.total_epochs
    assert tuned.optim.lr < scratch.optim.lr
    assert tuned.optim.lr_factors == {"head": 10}
    assert f"from {source}" in text
    assert warnings == []


def test_weights_of_the_same_classes_keep_their_classifier() -> None:
    tuned, _, _ = written(facts(100, 100), None, StartFacts("runs/first", same_classes=True, net="resnet18"))
    assert tuned.model.init is not None
    assert tuned.model.init.head == "keep"


def test_small_micro_batches_leave_batch_norm_as_the_weights_have_it() -> None:
    start = StartFacts("w.pth")
    assert written(facts(100, 100), None, start)[0].train.freeze_bn_statistics
    assert not written(facts(10_000, 10_000), None, start)[0].train.freeze_bn_statistics
    assert not written(facts(100, 100))[0].train.freeze_bn_statistics


def test_weights_that_do_not_say_their_normalisation_are_warned_of() -> None:
    recipe, _, warnings = written(facts(100, 100, side=32), "resnet20", StartFacts("resnet20.th"))
    assert ["which mean and std" in warning for warning in warnings] == [True]
    assert recipe.data.mean == (123.675, 116.28, 103.53)


def test_a_manifest_without_statistics_gets_imagenets() -> None:
    assert written(facts(100, 100, has_statistics=False))[0].data.mean == (123.675, 116.28, 103.53)


def test_lopsided_classes_get_weights_and_very_lopsided_ones_are_sampled() -> None:
    even, _, _ = written(facts(100, 250))
    assert (even.train.loss.class_weights, even.data.sampling, even.eval.best_by) == (None, None, "top1")
    lopsided, text, _ = written(facts(100, 0, 400))
    assert (lopsided.train.loss.class_weights, lopsided.data.sampling) == ("balanced", None)
    assert lopsided.eval.best_by == "balanced_top1"
    assert "The largest class has 4 times the images of the smallest" in text
    rare, _, _ = written(facts(5, 5000))
    assert rare.train.loss.class_weights is None
    assert rare.data.sampling is not None
    assert rare.data.sampling.kind == "balanced"


def test_a_net_for_other_sizes_is_warned_of_and_nothing_is_enlarged() -> None:
    small = facts(100, 100, side=32)
    recipe, _, (warning,) = written(small, "resnet50")
    assert "these have 32 px" in warning
    assert "--net resnet20" in warning
    assert recipe.data.train.size == 32
    _, _, (warning,) = written(replace(small, short_side=500, largest_side=600), "resnet20")
    assert "--net resnet18" in warning


def test_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="has 1 image"):
        written(facts(1))


def test_small_pictures_are_seen_nearly_whole_by_large_nets() -> None:
    start = StartFacts("torchvision:resnet18.IMAGENET1K_V1", net="resnet18", size=224, resize=256)
    recipe, _, warnings = written(facts(100, 100, side=33, sides=(24, 60)), start=start)
    assert (recipe.data.eval.size, recipe.data.eval.resize) == (28, 33)
    assert any("size of 112" in warning or "size 112" in warning for warning in warnings)


def test_a_head_that_is_kept_learns_as_fast_as_the_rest() -> None:
    same = StartFacts("runs/before", net="resnet20", same_classes=True)
    assert written(facts(100, 100, side=32), start=same)[0].optim.lr_factors == {}
    assert written(facts(100, 100, side=32), start=StartFacts("w.pth", net="resnet20"))[0].optim.lr_factors == {
        "head": 10
    }
