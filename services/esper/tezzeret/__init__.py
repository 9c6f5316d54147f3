"""Tezzeret, the compilation forge: turns blueprints of the library into kernels, in processes that may crash."""
