from compat.spconv import *
