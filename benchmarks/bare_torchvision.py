"""Imports torchvision without its compiled operators; by itself it would then stop at registering their shapes.

No benchmark uses these operators. Import this module before timm, which also imports torchvision.
"""

import sys
import types

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import torchvision  # noqa: E402, F401
