"""NVIDIA GPUs: what NVML tells about a node's, whether this PyTorch build runs on them, how NCCL connects them."""
