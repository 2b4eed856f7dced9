"""Timings beside the libraries that tritonspconv replaces; every result is checked first."""
