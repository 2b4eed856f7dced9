from compat.spconv.pytorch import *
