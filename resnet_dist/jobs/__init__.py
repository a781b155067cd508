"""`resnet-dist submit`: one of the project's commands as a Ray job on a cluster."""
