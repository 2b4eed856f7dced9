"""Stands in for ``MinkowskiEngineBackend``, the original's package of compiled code."""
