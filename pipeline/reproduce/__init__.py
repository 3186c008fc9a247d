"""The paper's tables from images on, beside what the paper prints."""

from pipeline.reproduce.backbone import TABLES
from pipeline.reproduce.run import Reproduction, ReproductionPart, plan, prepare_reproduce, reproduce
from pipeline.text import callable_as

__all__ = ["TABLES", "Reproduction", "ReproductionPart", "plan", "prepare_reproduce", "reproduce"]

callable_as(__name__, reproduce)
