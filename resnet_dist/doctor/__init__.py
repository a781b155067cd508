"""`resnet-dist doctor`: what a run's storage holds, and whether a cluster is fit for a run."""
