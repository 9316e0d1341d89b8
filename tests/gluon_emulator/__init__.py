"""Run Gluon kernels for Hopper on the CPU, with every freedom that the device takes, and find what is wrong with them.

Reading order: `emulator` (launches), `machine` (partitions, barriers and what happened before what), `language` (what
kernels call), `values` (their numbers, tensors and pointers).
"""

from gluon_emulator.emulator import Emulator, emulate
from gluon_emulator.values import EmulationError

__all__ = ["EmulationError", "Emulator", "emulate"]
