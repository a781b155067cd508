"""`python -m data_prep` is `data-prep`: what `ray job submit -- python -m data_prep ...` runs."""

from __future__ import annotations

from data_prep.import_path import look_here_last

if __name__ == "__main__":
    look_here_last()  # `python -m` looks here first: before anything else is imported
    from data_prep.cli import main

    main()
