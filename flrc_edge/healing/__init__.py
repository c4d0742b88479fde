"""Healing: a short distillation of a checkpoint's factors from the dense model, all stages in turn."""

from flrc_edge.healing.run import REPORT, Healed, heal
from flrc_edge.healing.session import Interrupted, Point
from flrc_edge.healing.settings import Settings

__all__ = ["REPORT", "Healed", "Interrupted", "Point", "Settings", "heal"]
