"""Drop-in namespaces for code written against other sparse-convolution libraries.

``compat.spconv`` follows spconv 2.3.8, ``compat.minkowski`` follows MinkowskiEngine 0.5.4. Both are
translation only: foreign names, signatures and weight layouts over the ``tritonspconv`` engine.

Code that cannot be edited keeps its imports: ``compat.install("spconv")`` makes ``import spconv``
mean ``compat.spconv`` from then on, and ``python -m compat --as spconv -- train.py`` does this for
a whole program. Both also hold in the Python processes that are started afterwards. They take
``"MinkowskiEngine"`` too.
"""

from compat._install import Installation, install, uninstall

__all__ = ["Installation", "install", "uninstall"]
