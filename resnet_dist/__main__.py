"""`python -m resnet_dist ...` is `resnet-dist ...`: what `ray job submit` runs."""

from __future__ import annotations

from data_prep.import_path import look_here_last

if __name__ == "__main__":
    look_here_last()  # `python -m` looks here first: before anything else is imported
    from resnet_dist.cli import main

    main()
