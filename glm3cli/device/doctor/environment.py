"""The environment variables that glm3 sets for NPUs, unless the user has set them."""

# What megatron-core and HCCL need.
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # launch order, on which communication overlap relies
    "HCCL_CONNECT_TIMEOUT": "1200",  # seconds; the 120 s default is short for many machines
    "MIND_SPEED_LOG_LEVEL": "WARNING",  # its INFO are megatron-core's settings, on every rank
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",  # less fragmentation
}
