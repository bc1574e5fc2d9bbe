"""Backends: one module each, with functions named like the ops of ``resnet_fast.ops`` and ``why_not``.

A backend imports torch and its own kernels, and nothing else of the package. ``dispatch`` imports it on first use.
"""
