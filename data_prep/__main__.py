"""`python -m data_prep` is `data-prep`: what `ray job submit -- python -m data_prep ...` runs."""

from __future__ import annotations

from data_prep.cli import main

if __name__ == "__main__":
    main()
