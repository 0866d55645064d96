"""What people look at: the HTML page, plots, the summary in plain words."""
