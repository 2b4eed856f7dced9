"""A comparison of every layer of two LiDAR networks with float64."""
