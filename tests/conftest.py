"""Settings of the whole suite."""

import torch
from hypothesis import settings

# The suite runs one process for each core; threads of one would only wait for those of another.
torch.set_num_threads(1)

# Speed is no test: a busy machine must not fail the suite.
settings.register_profile("suite", settings(deadline=None))
settings.load_profile("suite")
