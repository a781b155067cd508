"""The command `data-prep`, and `python -m data_prep`, which is what `ray job submit` runs."""

from __future__ import annotations

from data_prep.runtime.import_path import begin


def main() -> None:
    """Runs the command line and exits."""
    begin("data-prep")  # before anything else is imported
    from data_prep.cli import main as run

    run()


if __name__ == "__main__":
    main()
