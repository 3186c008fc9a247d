"""The paper's tables from images on, beside what the paper prints."""

from pipeline.reproduce.backbone import TABLES
from pipeline.reproduce.run import Part, Reproduction, plan, prepare_reproduce, reproduce
from pipeline.text import callable_as

__all__ = ["TABLES", "Part", "Reproduction", "plan", "prepare_reproduce", "reproduce"]

callable_as(__name__, reproduce)
