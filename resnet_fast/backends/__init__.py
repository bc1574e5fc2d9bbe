"""Backends: a module or package each, with functions named like the ops of ``resnet_fast.ops`` and ``why_not``.

A backend imports torch, its own kernels, ``buffers`` and ``switches``, and nothing else of the package but what lies
beside them for all to call: library.py, winograd.py, pointwise.py, direct.py, own.py. ``dispatch`` imports it on first
use.
"""
