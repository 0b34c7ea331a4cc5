"""The report of an evaluation, as Markdown and as one HTML page."""
