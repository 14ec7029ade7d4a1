"""From data files to records."""
