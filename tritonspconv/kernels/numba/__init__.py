"""CPU kernels compiled by numba, and their launchers.

The extra ``cpu`` installs numba. A launcher that numba does not speed up is not in this room: its
face takes the one in ``eager/``. Nothing is compiled on import.
"""
