"""From images to a bundle on S3: data, train, trace, bundle, upload, each with a command line."""

import os

# OpenMP's threads spin while they wait for each other. Where cores are shared that made training
# several times slower than sleeping does. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# PyTorch says once a process that its quantised tensors are deprecated; docs/serving.md does too.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
