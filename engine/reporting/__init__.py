"""What a run writes for people: metrics, summary, charts, report."""
