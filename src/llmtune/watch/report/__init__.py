"""A run, or several, as HTML: charts, sections, one self-contained page."""
