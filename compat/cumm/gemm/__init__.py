"""The part of ``cumm.gemm`` that code around linear indices imports."""
