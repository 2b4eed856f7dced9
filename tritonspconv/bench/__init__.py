"""Timings of tritonspconv and of the libraries that it replaces, after a check of every result."""
