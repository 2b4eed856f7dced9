"""A network's time and memory, layer by layer."""

from tritonspconv.profile.layers import LayerProfile, NetworkProfile, profile_network
from tritonspconv.profile.script import profile_script

__all__ = ["LayerProfile", "NetworkProfile", "profile_network", "profile_script"]
