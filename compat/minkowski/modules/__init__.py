"""Residual blocks of ``MinkowskiEngine.modules``."""
