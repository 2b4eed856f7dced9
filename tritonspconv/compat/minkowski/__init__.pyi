from compat.minkowski import *
