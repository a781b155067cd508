"""Source -> beton: plan, read (one part file per unit), write (ranges of the beton), publish; and verify."""
