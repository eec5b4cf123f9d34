"""The report: what was measured, as a page for the browser and as tables for the terminal."""
