"""Every layer of two LiDAR networks beside float64."""
