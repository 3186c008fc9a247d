"""The paper's tables from images on, beside what the paper prints."""

from pipeline.reproduce.backbone import TABLES
from pipeline.reproduce.run import PLAN, Part, Reproduction, reproduce

__all__ = ["PLAN", "TABLES", "Part", "Reproduction", "reproduce"]
