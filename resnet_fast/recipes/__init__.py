"""The paper's system: data, recipes, training, evaluation, transfer and analyses of residual networks.

What ``resnet-fast train``, ``evaluate`` and ``analyze`` run. "The paper" is arXiv 1512.03385, "Deep Residual
Learning for Image Recognition". Needs the extra ``recipes`` (torchvision, scikit-learn, matplotlib, numpy,
Pillow), each imported on first use; docs/recipes.md has the options and what was measured.
"""

from __future__ import annotations
