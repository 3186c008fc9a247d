"""Tables, figures and the page that shows a run."""

from pipeline.report.html import Report, write_report

__all__ = ["Report", "write_report"]
