"""Run Gluon kernels for Hopper on the CPU, with every freedom that the device takes, and find what is wrong with them.

Reading order: `emulator` (launches), `machine` (partitions, barriers and what happened before what), `hopper` (what
kernels call that happens asynchronously), `language` (what else they call), `shared_memory` and `memory`, `values`
(numbers and tensors), `aggregates` (classes); `running` and `places` know where in which kernel something happens.
`example` is a kernel to go by, README.md the guide.
"""

from gluon_emulator.emulator import Emulator, emulate
from gluon_emulator.places import EmulationError

__all__ = ["EmulationError", "Emulator", "emulate"]
