"""The parts of scripts/report.py: reading runs, charts, the sections of the page. Python alone, PyYAML where it is."""
