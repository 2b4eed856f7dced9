"""Two LiDAR networks on one scan: a table of layers, a check and a picture."""
