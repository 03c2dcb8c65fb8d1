"""torchvision, where it has no compiled operators: by itself it then stops at registering their shapes.

No benchmark uses one. Import this before timm, which imports torchvision as well.
"""

import sys
import types

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import torchvision  # noqa: E402, F401
