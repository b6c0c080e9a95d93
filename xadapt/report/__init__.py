"""One HTML page for check, transfer and verify that needs nothing but itself: style, plots, pictures and data are inside."""

from .page import check_report, parts_of, render, write_report

__all__ = ["check_report", "parts_of", "render", "write_report"]
