"""Tables, figures and the page that shows a run."""

from pipeline.report.html import Report, prepare_report, write_report

__all__ = ["Report", "prepare_report", "write_report"]
