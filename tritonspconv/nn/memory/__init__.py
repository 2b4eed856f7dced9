"""Training in less memory: :func:`tritonspconv.save_memory`."""

from tritonspconv.nn.memory.save_memory import MemoryPlan, save_memory

__all__ = ["MemoryPlan", "save_memory"]
