"""The command `resnet-dist`, and `python -m resnet_dist`, which is what `ray job submit` runs."""

from __future__ import annotations

from data_prep.runtime.import_path import begin


def main() -> None:
    """Runs the command line and exits."""
    begin("resnet-dist")  # before anything else is imported
    from resnet_dist.cli import main as run

    run()


if __name__ == "__main__":
    main()
