"""Drop-in namespaces for code written against other sparse-convolution libraries.

``compat.spconv`` follows spconv 2.3.8, ``compat.minkowski`` follows MinkowskiEngine 0.5.4. Both are
translation only: foreign names, signatures and weight layouts over the ``tritonspconv`` engine.
"""
