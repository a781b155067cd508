"""`study responses`: how strongly each layer responds, figure 7 of He et al. 2015.

The response of a 3x3 layer is the standard deviation of its output after batch norm, before ReLU and addition. That is
nearly |gamma|, which starts at 1: in a short run with little decay it stays there, and the figure does not appear. With
decay on gamma it does: that is the second setting here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_high

import torch
from torch import Tensor, nn

from resnet_dist.config.profile import Profile
from resnet_dist.data.batch import Batch
from resnet_dist.launch.model_source import load_model
from resnet_dist.studies.batch import training_batches
from resnet_dist.studies.plots import draw_lines
from resnet_dist.studies.record import open_study, study_recipe
from resnet_dist.studies.tables import markdown_table

NETS = ("plain20", "resnet20", "plain56", "resnet56")
_RESPONSES = "Standard deviations of layer responses, figure 7 of He et al. 2015, on trained nets."


@dataclass(frozen=True)
class Setting:
    name: str
    overrides: tuple[str, ...]


SETTINGS = (
    Setting("decay 1e-4, weights only, 308 steps", ()),
    Setting(
        "decay 5e-3, gamma too, 1001 steps",
        ("optim.weight_decay=5e-3", "optim.decay=all", "train.total_epochs=91"),
    ),
)
Responses = Mapping[tuple[str, str], list[float]]
"""(setting, net) -> response of every 3x3 layer, in the order of layers."""


def responses(profile: Profile, nets: Sequence[str] = NETS) -> Path:
    """Trains what is missing, measures, and returns the report's path. Raises UserError, Fault."""
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[float]] = {}
    with open_study(profile, "responses", _RESPONSES) as study:
        (batch,) = training_batches(study_recipe(nets[0]), profile, 1)
        for number, setting in enumerate(SETTINGS):
            for net in nets:
                trained = study.train(
                    net, lr=0.1, seed=0, overrides=setting.overrides, name=f"{net}-setting{number}-seed0"
                )
                net_module = load_model(str(trained.prepared.run_dir), None).classifier
                found[setting.name, net] = layer_responses(net_module, batch)
            lines = {net: list(enumerate(found[setting.name, net], 1)) for net in nets}
            figure = study.report_folder / f"responses-{number}.png"
            draw_lines(lines, figure, x_label="layer", y_label="standard deviation", marker=None)
        return study.publish(response_report(found, nets))


@torch.no_grad()
def layer_responses(classifier: nn.Module, batch: Batch) -> list[float]:
    """The response of every 3x3 layer, with the batch's own statistics, in the order in which they are computed."""
    stds: list[float] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        stds.append(float(output.std()))

    hooks = [norm.register_forward_hook(note) for norm in classifier.modules() if isinstance(norm, nn.BatchNorm2d)]
    try:
        classifier.train()(batch.images)
    finally:
        for hook in hooks:
            hook.remove()
        classifier.eval()
    return stds


def response_report(found: Responses, nets: Sequence[str]) -> str:
    """Markdown. Pure."""
    rows = [
        [setting.name, net, f"{fmean(found[setting.name, net]):.2f}", f"{median_high(found[setting.name, net]):.2f}"]
        for setting in SETTINGS
        for net in nets
    ]
    return (
        "# Layer responses\n\nWritten by `study responses`: digits at 8 px, seed 0. Standard deviation of "
        "each 3x3 layer's output after batch norm, before ReLU and addition, on one batch.\n\n"
        f"{markdown_table(['setting', 'net', 'mean over layers', 'median'], rows)}\n\n"
        "The paper's claim, weaker responses in ResNets than in their plain twins, shows only where gamma has been "
        "decayed for long: without that a layer's response is its gamma, which starts at 1.\n"
    )
