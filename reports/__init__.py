"""What people look at: the HTML page, plots, the summary in plain words."""

from .comparison import Comparison, compared, comparisons, final_table
from .page import write_report
from .plots import BadPlot, write_curve, write_predicted_measured
from .report_data import Measured, ReportData, TileGain
from .summary import headline
from .tables import Table, as_csv, as_text

__all__ = [
    "BadPlot",
    "Comparison",
    "Measured",
    "ReportData",
    "Table",
    "TileGain",
    "as_csv",
    "as_text",
    "compared",
    "comparisons",
    "final_table",
    "headline",
    "write_curve",
    "write_predicted_measured",
    "write_report",
]
