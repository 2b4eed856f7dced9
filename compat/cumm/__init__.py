"""The part of ``cumm``, spconv's companion package, that code around voxel generators imports."""
