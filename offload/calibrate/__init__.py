"""This machine, measured with the work that it is to do: a HardwareProfile comes out."""

from .effort import FULL, QUICK, Effort
from .hardware import measure_hardware
from .link import measure_copies
from .models import Subject
from .threads import own_threads

__all__ = ["FULL", "QUICK", "Effort", "Subject", "measure_copies", "measure_hardware", "own_threads"]
