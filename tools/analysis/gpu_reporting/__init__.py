"""What ``gpu_report.py`` measures, in which order, and how it is kept and printed."""
