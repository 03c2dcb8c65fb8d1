"""Imported before torchvision (timm imports it, too) where it has no compiled operators: no benchmark uses one, but it
stops where it cannot register their shapes."""

import sys
import types

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
