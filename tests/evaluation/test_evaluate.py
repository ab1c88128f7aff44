"""A measurement does not depend on actors or kills; rows add up; what cannot be measured is said before any work."""

from __future__ import annotations
