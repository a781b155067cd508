"""What a run will cost on hardware that is not at hand: speed, bottleneck, failures, hours, money; see README.md."""
