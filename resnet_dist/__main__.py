"""`python -m resnet_dist ...` is `resnet-dist ...`: what `ray job submit` runs."""

from __future__ import annotations

from resnet_dist.cli import main

if __name__ == "__main__":
    main()
