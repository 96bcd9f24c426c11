"""Coefficients that follow the statistics of the run."""

from polopt.controllers.adaptive_kl import AdaptiveKL
from polopt.controllers.follow import Follow
from polopt.controllers.kl_threshold import KLThreshold
from polopt.controllers.linear_schedule import LinearSchedule
from polopt.controllers.stages import Stages
from polopt.controllers.target_entropy import TargetEntropy

__all__ = ["AdaptiveKL", "Follow", "KLThreshold", "LinearSchedule", "Stages", "TargetEntropy"]
