"""The part of ``cumm.conv`` that code around spconv's layers imports."""
