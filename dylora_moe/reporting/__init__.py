"""What a run has learned, as numbers in results.json and as a page for people in report.html."""
