"""Settings of the whole suite."""

import torch

# The suite runs one process for each core; threads of one would only wait for those of another.
torch.set_num_threads(1)
